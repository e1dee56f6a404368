"""From groups to padded micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_grpo.data.collate import Row, checked_select, collate, make_rows, micro_batches
from lit_grpo.data.loader import FilledLoader
from lit_grpo.data.types import Completion, Group
from lit_grpo.errors import UserError
from lit_grpo.losses import TwoGRPO


def row(prompt: int, completion: int, advantage: float = 1.0) -> Row:
    return Row([1] * prompt, Completion([2] * completion, [-0.5] * completion), advantage)


def test_the_example_of_the_data_types_page():
    group = Group(
        [1, 2, 10, 3, 4, 15],
        [Completion([4, 6, 0], [-0.1, -0.2, -0.3]), Completion([4, 0, 0], [-0.4, -0.5, -0.6])],
        [1.0, 0.0],
    )
    rows = make_rows([group], *checked_select(TwoGRPO(), torch.tensor([group.rewards])), TwoGRPO())
    batch = collate(rows, total_rows=2, total_tokens=6)
    assert batch.tokens.tolist() == [[1, 2, 10, 3, 4, 15, 4, 6, 0], [1, 2, 10, 3, 4, 15, 4, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] * 2
    assert batch.advantages.tolist() == [1, -1]
    assert batch.sampler_logps is not None
    torch.testing.assert_close(batch.sampler_logps[batch.mask].tolist(), [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6])
    assert not batch.sampler_logps[~batch.mask].any()


class Wrong(TwoGRPO):
    """Selects what ``made`` makes of the rewards."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def select(self, rewards):
        return self.made(rewards)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda r: (torch.zeros(1, 2).long(), r / 0), "advantages that are not finite from the rewards"),
        (
            lambda r: (torch.zeros(1, 2).long(), torch.ones(1, 3)),
            r"index of shape \[1, 2\] and advantages of shape \[1, 3\]",
        ),
        (lambda r: (torch.full((1, 2), 2), torch.ones(1, 2)), r"from 0 to 1; got \[2, 2\]"),
        (lambda r: (torch.zeros(1, 2), torch.ones(1, 2)), r"int64 .* got .*float32"),
        (lambda r: (torch.zeros(1, 2).long(), 1e60 * torch.ones(1, 2, dtype=torch.float64)), "not finite"),
        (lambda r: (torch.zeros(2).long(), torch.ones(2)), r"index of shape \[2\]"),
        (lambda r: r, "select returned Tensor"),
    ],
)
def test_a_selection_that_is_none_is_refused(made, message: str):
    with pytest.raises(UserError, match=message):
        checked_select(Wrong(made), torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_rows_are_trimmed_to_their_own_longest_and_padded_at_the_right():
    batch = collate([row(2, 3), row(1, 1)], 2, 4)
    assert batch.tokens.tolist() == [[1, 1, 2, 2, 2], [1, 2, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]


def test_offline_rows_have_no_sampler_logps():
    assert collate([Row([1], Completion([2]), 1.0)], 1, 1).sampler_logps is None


def test_to_moves_tensors_and_keeps_counts():
    batch = collate([row(1, 1)], 5, 7).to("meta")
    assert {batch.tokens.device.type, batch.mask.device.type, batch.advantages.device.type} == {"meta"}
    assert (batch.total_rows, batch.total_tokens) == (5, 7)


def test_a_batch_moves_to_a_gpu_while_the_process_goes_on(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, bool]] = []

    class Pinned:
        def to(self, device: str, non_blocking: bool = False) -> str:
            asked.append((device, non_blocking))
            return "there"

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: Pinned())
    batch = collate([row(1, 1)], 5, 7).to("cuda")
    assert (batch.tokens, batch.places) == ("there", "there")
    assert asked == [("cuda", True)] * len([x for x in vars(batch).values() if x == "there"])


def test_only_the_memory_of_the_cpu_is_pinned(monkeypatch: pytest.MonkeyPatch):
    batch = collate([row(1, 1)], 5, 7).to("meta")
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: "there")
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    assert batch.to("cuda").tokens == "there"


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([-1.0, 0.0, 1.0])), min_size=4, max_size=40),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_micro_batches_lose_nothing_that_has_a_gradient(lengths, count, unit, drop):
    rows = [row(1, length, advantage) for length, advantage in lengths]
    rows = rows[: len(rows) // unit * unit]
    if len(rows) // unit < count:
        return
    parts = micro_batches(rows, count, unit, drop)
    kept = [r for part in parts for r in part]
    assert len(parts) == count
    assert all(parts)
    assert len({id(r) for r in kept}) == len(kept)
    assert {id(r) for r in rows if r.advantage != 0} <= {id(r) for r in kept}
    assert drop or len(kept) == len(rows)
    units = {tuple(id(r) for r in rows[i : i + unit]) for i in range(0, len(rows), unit)}
    assert all(tuple(id(r) for r in part[i : i + unit]) in units for part in parts for i in range(0, len(part), unit))


def test_zero_rows_are_dropped_except_to_fill_up():
    signal, zeros = [row(1, 9), row(1, 9)], [row(1, 5, 0.0), row(1, 2, 0.0), row(1, 7, 0.0)]
    assert [len(p) for p in micro_batches(signal + zeros, 2, drop_zeros=True)] == [1, 1]
    filled = micro_batches(signal + zeros, 3, drop_zeros=True)
    assert [r.advantage for part in filled for r in part] == [1, 1, 0]
    assert len(filled[-1][0].completion.token_ids) == 2  # the shortest


def test_micro_batches_carry_about_equal_tokens():
    parts = micro_batches([row(1, 99)] * 4 + [row(1, 9)] * 40, 4)
    tokens = [sum(len(r) for r in part) for part in parts]
    assert tokens == [200, 200, 200, 200]


def test_rows_that_share_a_prompt_stay_together_and_count_it_once():
    groups = [[row(10, n), row(10, m)] for n, m in ((1, 9), (5, 5), (8, 8), (6, 1))]
    rows = [row for group in groups for row in group]
    first, second = micro_batches(rows, 2, sharing=2)  # lengths 20, 20, 26 and 17
    assert first == groups[2]
    assert second == groups[0] + groups[1] + groups[3]
    silent = [row(10, 30, 0.0), row(10, 2, 0.0)]
    five = [row(10, n) for n in (1, 2, 3, 4, 5)]  # three and two
    assert micro_batches(five * 2, 4, sharing=5) == [five[:3], five[:3], five[3:], five[3:]][::-1]
    told = [row(10, 3), *silent]  # of a group of three, one speaks
    assert micro_batches([*silent, row(10, 2, 0.0), *told], 1, drop_zeros=True, sharing=3) == [told[:1]]
    assert micro_batches([*silent, *told[:2]], 1, unit=2, drop_zeros=True, sharing=2) == [told[:2]]


def test_too_few_rows_for_the_micro_batches():
    with pytest.raises(ValueError, match="2 units of 1 rows cannot fill 3"):
        micro_batches([row(1, 1)] * 2, 3)


class TestFilledLoader:
    def test_yields_what_was_put_in_once(self):
        loader = FilledLoader(2, "hint")
        loader.fill([1, 2])
        assert len(loader) == 2
        assert list(loader) == [1, 2]
        with pytest.raises(UserError, match="hint"):
            list(loader)

    def test_body_runs_at_the_first_item_and_not_before(self):
        loader = FilledLoader(1, "hint")
        iterator = iter(loader)  # Lightning makes the iterator before the hooks that fill it
        loader.fill(["fresh"])
        assert next(iterator) == "fresh"

    def test_wrong_number_of_items(self):
        with pytest.raises(ValueError, match="Expected 2 items, got 1"):
            FilledLoader(2, "hint").fill([1])
