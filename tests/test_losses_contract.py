"""What every loss promises, whatever it computes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import FIELDS, LOSSES, grad, make_inputs
from torch import Tensor

from lit_grpo import losses
from lit_grpo.losses import Loss, LossInputs, LossOutput, diagnostics


def part_of(x: LossInputs, rows: Tensor, **fields: object) -> LossInputs:
    """Some rows of a step, as one of its micro-batches."""
    whole = {"total_rows": x.total_rows, "total_tokens": x.total_tokens, "kl_baseline": x.kl_baseline, "step": x.step}
    return LossInputs(**({name: getattr(x, name)[rows] for name in FIELDS} | whole | fields))


def combined(outputs: list[LossOutput]) -> dict[str, float]:
    """The step's loss and metrics from its micro-batches, as the module puts them together."""
    found = {"loss": sum(o.loss.item() for o in outputs)}
    for name in outputs[0].metrics:
        values = [o.metrics[name] for o in outputs]
        if isinstance(values[0], tuple):
            found[name] = sum(v[0].item() for v in values) / max(sum(v[1].item() for v in values), 1)
        elif name.startswith("loss"):
            found[name] = sum(v.item() for v in values)
        else:
            found[name] = {"min": min, "max": max}.get(name[-3:], lambda vs: sum(vs) / len(vs))(
                [v.item() for v in values]
            )
    return found


def test_every_public_loss_is_under_the_contract():
    concrete = {name for name, item in vars(losses).items() if isinstance(item, type) and issubclass(item, Loss)}
    assert concrete - {"Loss", "PolicyGradient", "Clipped", "Pairwise"} == {
        type(loss).__name__ for loss in LOSSES.values()
    }


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_finite_scalar_in_the_dtype_it_was_given(self, name: str, dtype: torch.dtype):
        loss = LOSSES[name]
        x = make_inputs(loss)
        x = part_of(x, torch.arange(4), kl_baseline=x.kl_baseline.to(dtype))
        for field in FIELDS:
            if (value := getattr(x, field)).is_floating_point():
                setattr(x, field, value.to(dtype))
        out = loss(x)
        assert out.loss.shape == ()
        assert out.loss.dtype == dtype
        assert out.loss.isfinite()

    def test_metrics_are_detached_scalars(self, name: str):
        x = make_inputs(LOSSES[name])
        x.logps.requires_grad_()
        x.entropy.requires_grad_()
        out = LOSSES[name](x)
        for value in (out.metrics | diagnostics(x)).values():
            for tensor in value if isinstance(value, tuple) else (value,):
                assert tensor.shape == ()
                assert not tensor.requires_grad

    def test_backward_works_without_any_signal(self, name: str):
        loss = LOSSES[name]
        x = make_inputs(loss)
        x.advantages = torch.zeros_like(x.advantages)
        gradient = grad(loss, x)
        assert gradient.isfinite().all()
        x.entropy.requires_grad_()
        entropy = torch.autograd.grad(loss(x).loss, x.entropy, allow_unused=True)[0]
        assert loss.drops_zero_advantages == (not gradient.any() and entropy is None)

    def test_gradcheck(self, name: str):
        loss = LOSSES[name]
        # CISPO's weights have no gradient by definition: on-policy they are 1, and it is the gradient of its value.
        x = make_inputs(loss, seed=3, **({"old_logps": None} if name == "CISPO" else {}))

        def f(logps: Tensor, entropy: Tensor) -> Tensor:
            return loss(replace(x, logps=logps, entropy=entropy)).loss

        assert torch.autograd.gradcheck(f, (x.logps.requires_grad_(), x.entropy.requires_grad_()))

    def test_padding_changes_nothing(self, name: str):
        x = make_inputs(LOSSES[name])
        junk = {"logps": -7.0, "mask": 0, "old_logps": 5.0, "ref_logps": 9.0, "sampler_logps": 3.0, "entropy": 2.0}
        fields = {k: torch.nn.functional.pad(getattr(x, k), (0, 3), value=v) for k, v in junk.items()}
        padded = part_of(x, torch.arange(4), **fields)
        whole, wide = combined([LOSSES[name](x)]), combined([LOSSES[name](padded)])
        assert wide == pytest.approx(whole, abs=1e-14)

    def test_order_of_groups_changes_nothing(self, name: str):
        x = make_inputs(LOSSES[name], rows=6)
        other = part_of(x, torch.tensor([4, 5, 0, 1, 2, 3]))
        assert combined([LOSSES[name](other)]) == pytest.approx(combined([LOSSES[name](x)]), abs=1e-14)

    @pytest.mark.parametrize("sizes", [(2, 4), (2, 2, 2), (1, 5), (1, 2, 3)])
    def test_any_split_into_micro_batches_changes_nothing(self, name: str, sizes: tuple[int, ...]):
        """KTO too: its baseline is one of the whole step, which every micro-batch is given."""
        loss = LOSSES[name]
        if any(size % loss.unit for size in sizes):
            pytest.skip("the two rows of a pair stay together")
        x = make_inputs(loss, rows=6)
        whole = combined([loss(x)])
        parts = [loss(part_of(x, rows)) for rows in torch.arange(6).split(sizes)]
        assert combined(parts) == pytest.approx(whole, abs=1e-14)

        gradient = grad(loss, x)
        split = torch.cat([grad(loss, part_of(x, rows)) for rows in torch.arange(6).split(sizes)])
        torch.testing.assert_close(split, gradient, rtol=0, atol=1e-14)

    @given(data=st.data())
    @settings(max_examples=25, deadline=None)
    def test_select_takes_as_many_rows_whatever_the_rewards(self, name: str, data: st.DataObject):
        loss = LOSSES[name]
        rewards = torch.tensor(data.draw(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=1)))
        index, advantages = loss.select(rewards.double())
        assert index.shape == advantages.shape[:2] == (len(rewards), loss.select(torch.zeros(1, 2))[0].shape[1])
        assert index.dtype == torch.int64
        assert index.sort(-1).values.tolist() == [[0, 1]] * len(rewards)  # each completion once
        assert advantages.isfinite().all()

    def test_completions_of_one_token(self, name: str):
        loss = LOSSES[name]
        x = make_inputs(loss, width=5)
        mask = torch.zeros_like(x.mask)
        mask[:, 2] = True
        assert grad(loss, part_of(x, torch.arange(4), mask=mask, logps=x.logps - 0.1)).isfinite().all()

    def test_no_token_at_all(self, name: str):
        """An empty completion has no gradient, and is no reason for NaN."""
        loss = LOSSES[name]
        x = make_inputs(loss)
        mask = x.mask.clone()
        mask[:2] = False
        empty = part_of(x, torch.arange(4), mask=mask)
        gradient = grad(loss, empty)
        assert loss(empty).loss.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[:2].any()

    @pytest.mark.parametrize("far", [1e2, 1e4])
    def test_extreme_log_ratios_stay_finite(self, name: str, far: float):
        loss = LOSSES[name]
        x = make_inputs(loss)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
        for moved in ("old_logps", "ref_logps", "sampler_logps"):
            wild = part_of(x, torch.arange(4), **{moved: getattr(x, moved) + far * signs * x.mask})
            out = loss(wild)
            assert out.loss.isfinite(), moved
            assert grad(loss, wild).isfinite().all(), moved
            for value in (out.metrics | diagnostics(wild)).values():
                assert math.isfinite((value[0] if isinstance(value, tuple) else value).item())
            if moved != "sampler_logps":
                total, count = diagnostics(wild)["clamped_share"]
                assert total == count > 0  # every token is beyond +-20, and counted

    def test_rewards_that_are_all_equal_select_nothing_to_prefer(self, name: str):
        loss = LOSSES[name]
        if name in ("KL", "KTO", "APOZero", "SFT"):
            pytest.skip("does not compare")
        advantages = loss.select(torch.full((3, 2), 0.1))[1]
        assert not (advantages[..., 0] if "+" in name else advantages).any()

    def test_prints_its_settings(self, name: str):
        if type(LOSSES[name]).__name__ != "WeightedSum":
            assert "(" in repr(LOSSES[name])
            assert "needs" not in repr(LOSSES[name])


class TestDiagnostics:
    def test_by_hand(self):
        # One token with policy 0.5, old 0.25, reference 0.5 e: ratio 2, k3 = e - 1 - 1.
        half = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
        x = LossInputs(
            half, torch.tensor([[True, False]]), torch.ones(1), half - math.log(2), half + 1, entropy=torch.ones(1, 2)
        )
        found = {k: (v[0] / v[1] if isinstance(v, tuple) else v).item() for k, v in diagnostics(x).items()}
        ratios = {"ratio_mean": 2, "ratio_min": 2, "ratio_max": 2}
        assert found == pytest.approx({"kl": math.e - 2, "clamped_share": 0, "entropy": 1} | ratios)

    def test_nothing_to_compare_with(self):
        assert diagnostics(LossInputs(torch.zeros(1, 2), torch.ones(1, 2).bool(), torch.ones(1))) == {}
