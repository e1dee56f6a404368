"""Benchmarks run, at sizes that measure nothing, and what they compare does the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = {"rollouts": 16, "max_tokens": 8, "micro_batches": 2, "steps": 2}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def work(**settings: Any) -> Any:
    from vs_trl import Work

    return Work("0.6 M", 2, 0.5, **{"lengths": "long-tailed", "engine": "HFRollout", **SMALL, **settings})


@pytest.mark.filterwarnings("ignore")
def test_every_technique_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import techniques
    from vs_trl import VOCABULARY, make_task

    monkeypatch.setattr(techniques, "WORK", work())
    monkeypatch.setattr("lit_grpo.engines.hf_engine.TOKENS_AT_ONCE", 32)
    make_task(tmp_path, techniques.WORK)

    def counts(settings: dict[str, Any]) -> tuple[int, int, int]:
        """Embeddings taken, in how many calls, and logits that the head's own forward gave."""
        embedded, calls, logits = 0, 0, 0

        def look(part: Any, inputs: Any, output: torch.Tensor) -> None:
            nonlocal embedded, calls, logits
            if isinstance(part, torch.nn.Embedding):
                embedded, calls = embedded + inputs[0].numel(), calls + 1
            elif isinstance(part, torch.nn.Linear) and output.shape[-1] == VOCABULARY and output.requires_grad:
                logits += output.numel()

        handle = torch.nn.modules.module.register_module_forward_hook(look)
        assert techniques.seconds(tmp_path, settings) > 0
        handle.remove()
        return embedded, calls, logits

    whole = counts({})
    assert counts({}) == whole
    for way, (settings, patch) in techniques.WAYS.items():
        with patch():
            assert counts(settings()) != whole, way
    assert counts({"reward": techniques.judge}) == counts({"reward": techniques.judge_afterwards})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharing", [True, False])
def test_trl_and_we_do_the_same_work(tmp_path: Path, sharing: bool):
    import vs_trl

    vs_trl.make_task(tmp_path, work())
    assert vs_trl.check_gradient(tmp_path, work(share_prompts=sharing))["difference"] < vs_trl.MOST_DIFFERENT
    even = work(share_prompts=sharing, lengths="even")
    vs_trl.make_task(tmp_path, even)
    ours, theirs = (vs_trl.SIDES[side](tmp_path, even) for side in ("ours", "trl"))
    assert ours["sampled"] == theirs["sampled"] == theirs["trained"] == 16 * 8
    assert 0 < ours["trained"] < 16 * 8


@pytest.mark.filterwarnings("ignore")
def test_ways_to_take_log_probs_give_gradients_of_one_norm(monkeypatch: pytest.MonkeyPatch):
    import memory

    monkeypatch.setattr(memory, "VOCABULARY", 512)
    norms = [memory.step(way)["norm"] for way in memory.WAYS]
    torch.testing.assert_close(norms, [norms[0]] * len(norms), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_breakdown_has_every_part(tmp_path: Path):
    import breakdown
    from vs_trl import make_task

    make_task(tmp_path, work())
    ledger = breakdown.train(tmp_path, work())
    assert breakdown.seconds(ledger, work()) > 0
    assert all(f"tokens_{kind}" in ledger for kind in breakdown.TOKENS)
    parts = {part: ledger[part] for part in breakdown.PARTS}
    breakdown.draw({"a": parts, "b": parts}, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 5_000
