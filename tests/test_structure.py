"""Who may import whom, what importing costs, and that every config parses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lit_grpo
from lit_grpo.__main__ import main

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("lit_grpo", "callbacks")
    for path in (ROOT / package).rglob("*.py")
)
HEAVY = {"vllm", "datasets", "matplotlib"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_free():
    loaded = loaded_by("import lit_grpo")
    assert not loaded & {*HEAVY, "torch", "lightning", "transformers", "lit_grpo.cli"}


@pytest.mark.parametrize("name", lit_grpo.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(lit_grpo, name).__doc__


def test_losses_and_rewards_stand_alone():
    assert not loaded_by("import lit_grpo.losses") & {*HEAVY, "lightning", "transformers"}
    assert not loaded_by("import lit_grpo.rewards") & {*HEAVY, "torch", "lightning", "transformers"}


def test_the_library_imports_neither_callbacks_nor_heavy_extras():
    modules = [m for m in MODULES if m.startswith("lit_grpo") and m not in ("lit_grpo.cli", "lit_grpo.quickstart")]
    assert len(modules) > 25
    assert not loaded_by(f"import {', '.join(modules)}") & {"callbacks", "vllm", "datasets", "lit_grpo.cli"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_parses(path: Path, capsys: pytest.CaptureFixture[str]):
    """With the real parser; nothing is instantiated."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={path}", "--print_config"])
    assert stop.value.code == 0
    assert "class_path" in capsys.readouterr().out
