"""What the documentation shows runs, parses and links to something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_grpo.__main__ import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")])


def blocks(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str):
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(page: Path):
    assert "@@" not in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readmes_run_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (yaml,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(yaml)
    assert len(yaml.splitlines()) <= 25
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={tmp_path / 'run.yaml'}", "--print_config"])
    assert stop.value.code == 0
    assert "group_size: 2" in capsys.readouterr().out


def test_commands_of_the_readme_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", "".join(page.read_text() for page in PAGES)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_losses_and_rewards_of_the_users_own_files_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Path):
    """The examples of the pages, in a folder of their own, named by their import path alone."""
    loss = (ROOT / "docs" / "adding_a_loss.md").read_text()
    reward = (ROOT / "docs" / "adding_a_reward.md").read_text()
    (tmp_path / "my_loss.py").write_text(re.findall(r"```python\n(.*?)```", loss, re.DOTALL)[0])
    (tmp_path / "my_rewards.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", reward, re.DOTALL)))
    monkeypatch.chdir(tmp_path)
    main(
        [
            "fit",
            f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
            "--run_dir=run",
            f"--model.model={task / 'model'}",
            "--model.loss=my_loss.Reinforce",
            f"--data.train.path={task / 'train.jsonl'}",
            "--data.val=null",
            "--data.reward={class_path: my_rewards.Within, init_args: {distance: 10}}",
            "--data.prompts_per_phase=4",
            "--trainer.max_epochs=1",
        ]
    )
    assert (tmp_path / "run" / "pretrained").is_dir()
