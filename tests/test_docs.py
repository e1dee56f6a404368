"""What the documentation shows runs, parses and links to something."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lit_grpo.__main__ import main
from lit_grpo.data.base import RewardFn
from lit_grpo.losses import Loss
from lit_grpo.reports import compare, inspection

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


def python_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name: ``configs/``, the README's run, losses and rewards of the user's own."""
    run, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name in ("run.yaml", "config.yaml"):
        (tmp_path / name).write_text(run)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_file.py").write_text(python_of("docs/adding_a_loss.md"))
    (tmp_path / "my_rewards.py").write_text(python_of("docs/adding_a_reward.md"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_by(*args: str) -> str:
    """What a command prints that parses everything and then stops."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(said):
        main([*args, "--print_config"])
    assert stop.value.code == 0
    return said.getvalue()


def commands() -> list[object]:
    """Every command line of ``lit-grpo`` in a block, and those between backticks that are whole."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^lit-grpo .*", "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)), re.MULTILINE)
        lines += [line for line in re.findall(r"`(lit-grpo \w+ [^`]+)`", text) if not re.search(r"\.\.\.| \| ", line)]
        found += [pytest.param(line, id=f"{page.relative_to(ROOT)}-{i}") for i, line in enumerate(lines)]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    command, *args = shlex.split(line.replace("FILE", "run.yaml"), comments=True)[1:]
    if command == "export":
        asked: list[Any] = []
        monkeypatch.setattr("lit_grpo.cli.checkpoint_at", lambda path, key: path)
        monkeypatch.setattr("lit_grpo.cli.export", lambda *arguments: asked.extend(arguments))
        main([command, *args])
        assert asked[:3] == [Path(args[0]), Path(args[1]), "--merge" in args]
    elif command == "inspect":
        assert inspection.parser().parse_args(args).RUN
    elif command == "compare":
        own, extra = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
        assert compare.parser().parse_args(own).CONFIG_OR_RUN
        assert said_by("fit", "-c", "run.yaml", *extra)
    else:
        assert said_by(command, *args)


def whole(block: str) -> dict[str, Any]:
    """A block of a page as a file: what shows one key alone is put where it belongs."""
    given = yaml.safe_load(block)
    if "loss" in given:
        return {"model": given}
    return {"data": {"init_args": given}} if "train" in given or "reward" in given else given


def is_in(given: Any, found: Any) -> bool:
    """Whether a configuration has everything that was given; names of classes may be short."""
    if isinstance(found, dict) and isinstance(given, dict):
        return all(key in found and is_in(value, found[key]) for key, value in given.items())
    if isinstance(found, dict) and isinstance(given, str):
        return is_in(given, found["class_path"])
    if isinstance(found, list) and isinstance(given, list):
        return len(given) == len(found) and all(map(is_in, given, found))
    if found == given or not isinstance(given, str):
        return found == given
    try:
        return resolve_name(given) is resolve_name(str(found))
    except (ValueError, ImportError, AttributeError):  # the short name of a class
        return str(found).endswith(f".{given}")


@pytest.mark.parametrize("block", [p for p in blocks("yaml") if "docs/losses" not in str(p.id)])
def test_yaml_parses_and_nothing_of_it_is_lost(block: str, workplace: Path):
    given = whole(block)
    evaluates = "test" in given.get("data", {}).get("init_args", {})
    base = ["test", "-c", "configs/eval/math.yaml"] if evaluates else ["fit", "-c", "configs/quickstart.yaml"]
    (workplace / "block.yaml").write_text(yaml.safe_dump(given))
    found = yaml.safe_load(said_by(*base, "-c", "block.yaml"))
    assert is_in(given, found), found


def test_the_readmes_run_is_short(workplace: Path):
    assert len((workplace / "run.yaml").read_text().splitlines()) <= 25


def test_commands_of_the_readme_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", "".join(page.read_text() for page in PAGES)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_losses_and_rewards_of_the_users_own_files_work(workplace: Path, task: Path):
    """The examples of the pages, in a folder of their own, named by their import path alone."""
    main(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            "--run_dir=run",
            f"--model.model={task / 'model'}",
            "--model.loss=my_file.MeanBaseline",
            f"--data.train.path={task / 'train.jsonl'}",
            "--data.val=null",
            "--data.reward={class_path: my_rewards.Within, init_args: {distance: 10}}",
            "--data.prompts_per_phase=4",
            "--trainer.max_epochs=1",
        ]
    )
    assert (workplace / "run" / "pretrained").is_dir()


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
