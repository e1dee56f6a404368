"""What the documentation shows runs, parses and links to something."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lit_grpo.__main__ import main
from lit_grpo.data.base import RewardFn
from lit_grpo.losses import Loss

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.md")])


def blocks(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str):
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation", "torch": torch})


def test_pages_of_losses_are_current_and_complete():
    """Formula, knobs with defaults, metrics and reference are generated from the code; two sections are written."""
    update = runpy.run_path(str(ROOT / "docs" / "losses" / "update.py"))
    for path, page in update["pages"]().items():
        assert path.exists(), f"python docs/losses/update.py begins {path.name}"
        assert path.read_text() == page, f"{path.name} is not current: run python docs/losses/update.py"
        for heading in ("When it is right", "When it carries no signal"):
            text = re.search(rf"## {heading}\n(.*?)(?=\n##|<!--|\Z)", page, re.DOTALL)
            assert path.name == "README.md" or (text and len(text[1].split()) > 5), f"{path.name}: {heading}"
    assert {path.stem for path in (ROOT / "docs" / "losses").glob("*.md")} == {"README", *update["NAMES"]}


@pytest.mark.parametrize("text", [p for p in blocks("yaml") if "losses" in str(p.id)])
def test_yaml_of_the_pages_of_losses_makes_them(text: str):
    parser = ArgumentParser()
    parser.add_argument("--loss", type=Loss)
    parser.add_argument("--reward", type=RewardFn)
    found = yaml.safe_load(text)
    config = {"loss": found["model"]["loss"]} if "model" in found else {"reward": found["data"]["init_args"]["reward"]}
    made = parser.instantiate_classes(parser.parse_object(config))
    assert isinstance(made.loss, Loss) if "loss" in config else callable(made.reward)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(page: Path):
    assert "@@" not in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readmes_run_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(run)
    assert len(run.splitlines()) <= 25
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
    (tmp_path / "my_loss.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", loss, re.DOTALL)))
    (tmp_path / "my_rewards.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", reward, re.DOTALL)))
    monkeypatch.chdir(tmp_path)
    main(
        [
            "fit",
            f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
            "--run_dir=run",
            f"--model.model={task / 'model'}",
            "--model.loss=my_loss.MeanBaseline",
            f"--data.train.path={task / 'train.jsonl'}",
            "--data.val=null",
            "--data.reward={class_path: my_rewards.Within, init_args: {distance: 10}}",
            "--data.prompts_per_phase=4",
            "--trainer.max_epochs=1",
        ]
    )
    assert (tmp_path / "run" / "pretrained").is_dir()


@pytest.mark.parametrize("script", sorted((ROOT / "configs" / "cluster").iterdir()), ids=lambda path: path.name)
def test_jobs_of_clusters_are_shell_and_their_commands_parse(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    subprocess.run(["bash", "-n", script], check=True)
    command = re.search(r" fit (-c .*?--ckpt_path last)", script.read_text().replace("\\\n", ""), re.DOTALL)
    assert command is not None
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *command[1].replace('"$NODES"', "2").split(), "--print_config"])
    assert stop.value.code == 0
    assert "strategy: fsdp2" in capsys.readouterr().out


def test_yaml_of_the_page_on_processes_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    files = [tmp_path / f"{i}.yaml" for i in range(len(blocks))]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
                *(f"--config={file}" for file in files),
                "--print_config",
            ]
        )
    assert stop.value.code == 0
    found = capsys.readouterr().out
    assert "tensor_parallel_size: 2" in found
    assert "alpha: 32" in found
