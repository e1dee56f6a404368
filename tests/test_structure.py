"""Who may import whom, what importing costs, and that every config parses."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

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


MAY_IMPORT = {
    "lit_grpo/losses": {"lit_grpo.losses", "lit_grpo.errors"},
    "lit_grpo/metrics": {"lit_grpo.metrics"},
    "lit_grpo/rewards": {"lit_grpo.rewards", "lit_grpo.errors"},
    "lit_grpo/data/types.py": set(),
    "lit_grpo/engines": {"lit_grpo.engines", "lit_grpo.data.types", "lit_grpo.errors"},
    "lit_grpo/module.py": {"lit_grpo.data.types", "lit_grpo.losses", "lit_grpo.metrics", "lit_grpo.policy", "lit_grpo.lora", "lit_grpo.settings", "lit_grpo.sharding", "lit_grpo.tally", "lit_grpo.distributed", "lit_grpo.errors"},
    "lit_grpo/reports": {"lit_grpo.reports", "lit_grpo.files", "lit_grpo.csv_log", "lit_grpo.metrics", "lit_grpo.errors", "lit_grpo.cli"},
    "lit_grpo/reproduce": {"lit_grpo.reproduce", "lit_grpo.files", "lit_grpo.reports", "lit_grpo.theory", "lit_grpo.losses", "lit_grpo.quickstart", "lit_grpo.errors"},
    "lit_grpo/data": {"lit_grpo.data", "lit_grpo.engines.base", "lit_grpo.rewards", "lit_grpo.losses", "lit_grpo.errors", "lit_grpo.distributed"},
}  # fmt: skip


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_who_imports_whom(part: str):
    """Also inside functions; imports for types alone do not count."""
    path = ROOT / part
    for file in [path] if path.is_file() else path.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for_types = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name for name in names if name.split(".")[0] in ("lit_grpo", "callbacks")]
            if id(node) not in for_types:
                for name in ours:
                    allowed = any(f"{name}.".startswith(f"{other}.") for other in MAY_IMPORT[part])
                    assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def parsed(command: str, *files: str) -> dict[str, Any]:
    """What the real parser makes of configs; nothing is instantiated."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(said):
        main([command, *(f"--config={ROOT / 'configs' / file}" for file in files), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(said.getvalue())


CONFIGS = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS)
def test_every_config_parses(file: str):
    assert "class_path" in str(parsed("test" if file.startswith("eval") else "fit", file))


METHODS = {
    "2grpo.yaml": ("TwoGRPO", 8e-6, 2, 2, False),
    "2grpo_rs.yaml": ("TwoGRPO", 8e-6, 2, 2, True),
    "16grpo.yaml": ("GRPO", 1e-6, 16, 16, False),
    "ablation/g2.yaml": ("TwoGRPO", 1e-6, 2, 16, False),
    "ablation/g4.yaml": ("GRPO", 1e-6, 4, 16, False),
    "ablation/g8.yaml": ("GRPO", 1e-6, 8, 16, False),
    "ablation/g16.yaml": ("GRPO", 1e-6, 16, 16, False),
}
MODELS = {"qwen_math_7b.yaml": "7B", "r1_distill_1.5b.yaml": "R1-Distill", None: "Math-1.5B"}
DATA = {
    "../data/math.yaml": ("DigitalLearningGmbH/MATH-lighteval", None, "problem", "solution", "boxed", False, None),
    "../data/dapo_math_sub.yaml": ("open-r1/DAPO-Math-17k-Processed", "all", "prompt", "solution", "plain", True, 7500),
    "../data/gsm8k.yaml": ("openai/gsm8k", "main", "question", "answer", "hashes", False, None),
}
SOURCE = ("path", "name", "prompt", "answer", "read_answer", "deduplicate", "sample")


@pytest.mark.parametrize("order", list(itertools.permutations(DATA)))
def test_the_last_data_set_holds(order: tuple[str, ...]):
    """Nothing stays of those before: overlays merge."""
    found = parsed("fit", "paper/2grpo.yaml", *(f"paper/{file}" for file in order))
    assert tuple(found["data"]["init_args"]["train"][key] for key in SOURCE) == DATA[order[-1]]


@pytest.mark.parametrize("data", list(DATA)[:2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_paper_s_runs(method: str, model: str | None, data: str):
    overlays = [f"paper/{file}" for file in ("2grpo.yaml", method, model, data) if file]
    found = parsed("fit", *overlays)
    loss, rate, group_size, updates, resampled = METHODS[method]
    settings = found["model"]["loss"]["init_args"]
    assert found["model"]["loss"]["class_path"].endswith(f".{loss}")
    assert (settings["clip_low"], settings["clip_high"], settings["beta"]) == (0.2, 0.28, 0.0)
    assert found["model"]["optimizer"]["init_args"]["lr"] == rate
    assert found["model"]["lr_scheduler"]["init_args"]["total_iters"] == 10
    assert MODELS[model] in found["model"]["model"]
    rollouts = found["data"]["init_args"]
    assert tuple(rollouts["train"][key] for key in SOURCE) == DATA[data]
    assert (rollouts["prompts_per_phase"], rollouts["group_size"]) == (512, group_size)
    assert (rollouts["updates_per_phase"], rollouts["resample_ties"]) == (updates, resampled)
    assert rollouts["max_rollouts"] == (512 * 16 if resampled else None)
    assert found["trainer"]["max_epochs"] == 10 * 7500 // 512
    sampling = found["rollout"]["init_args"]
    assert sampling["max_tokens"] + 1024 == (8192 if model and "r1" in model else 4096)
    rows = 512 * group_size // updates
    devices = 8 if model == "qwen_math_7b.yaml" else 4
    assert rows % devices == 0
    assert rows // devices >= found["trainer"]["accumulate_grad_batches"]
