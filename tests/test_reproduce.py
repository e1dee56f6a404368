"""What `make reproduce` compares is what it says; that it runs is what tests of compare are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_grpo import reproduce
from lit_grpo.reports.compare import check_scores, entry_of, parsed

ROOT = Path(__file__).parent.parent


def test_every_run_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch):
    """Prompts and rollouts per phase, rollouts per update, and the rate, which goes with the prompts per update."""
    monkeypatch.chdir(ROOT)
    command = reproduce.command()
    entries, common = command[: command.index("--common")], command[command.index("--common") + 1 : -2]
    found = {}
    for entry in (entry_of(text, Path("out")) for text in entries):
        config = parsed(entry.name, [f"--config={file}" for file in [*common, *entry.files]])
        check_scores(entry.name, config)
        found[entry.name] = config
    assert len(found) == 14

    def sizes(name: str) -> tuple[int, int, int, float]:
        data, optimizer = found[name]["data"]["init_args"], found[name]["model"]["optimizer"]["init_args"]
        prompts, group_size, updates = (data[k] for k in ("prompts_per_phase", "group_size", "updates_per_phase"))
        return prompts, group_size, prompts * group_size // updates, optimizer["lr"] / (prompts / updates)

    scaled, same_rate = (3e-4 / 256, 3.75e-5 / 32)
    assert scaled == same_rate  # the paper's 8e-6 / 256 and 1e-6 / 32 are the same as well
    for group_size, name in ((2, "2-GRPO"), (4, "4-GRPO"), (8, "8-GRPO"), (16, "16-GRPO")):
        assert sizes(name) == pytest.approx((256, group_size, 512, scaled))
        if group_size < 16:
            assert sizes(f"{name}_same_rate") == pytest.approx((256, group_size, 32 * group_size, same_rate))
        if group_size > 2:
            prompts, size, rollouts, _ = sizes(f"{name}_same_rollouts")
            assert (prompts * size, size, rollouts) == (512, group_size, 512)
    assert found["2-GRPO+RS"]["data"]["init_args"]["max_rollouts"] == 256 * 16
    for name in ("DPO", "IPO", "KTO"):
        assert found[name]["model"]["loss"]["class_path"] == f"lit_grpo.losses.{name}"
        assert found[name]["data"] == found["2-GRPO"]["data"]
    assert {config["trainer"]["max_epochs"] for config in found.values()} == {120}
    assert all(config["model"]["lr_scheduler"]["init_args"]["total_iters"] == 10 for config in found.values())
