"""Mean@k and Pass@k against enumeration of subsets, in one process and in several."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.multiprocessing as mp

from lit_grpo.metrics import MeanAtK, PassAtK, mean_at_k, pass_at_k


def by_enumeration(c: int, n: int, k: int) -> float:
    """Share of the k-subsets of n samples, c of them correct, that hold a correct one."""
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets(n: int):
    for c in range(n + 1):
        for k in range(1, n + 1):
            estimate = pass_at_k(
                torch.tensor([float(c)], dtype=torch.float64), torch.tensor([float(n)], dtype=torch.float64), k
            )
            assert estimate.item() == pytest.approx(by_enumeration(c, n, k), abs=1e-12)


def test_pass_at_k_is_unbiased():
    # The expectation over Binomial(n, p) is 1 - (1 - p)^k.
    n, k = 10, 4
    for p in (0.05, 0.3, 0.9):
        c = torch.arange(n + 1, dtype=torch.float64)
        weights = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64)).log_prob(c).exp()
        expected = (weights * pass_at_k(c, torch.full_like(c, n), k)).sum()
        assert expected.item() == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_problems_weigh_the_same_whatever_their_number_of_samples():
    metric = MeanAtK()
    metric.update(torch.tensor([1]), torch.tensor([2]))
    metric.update(torch.tensor([0, 8]), torch.tensor([8, 8]))
    assert metric.compute().item() == pytest.approx((0.5 + 0 + 1) / 3)


def test_several_k_at_once_and_in_pieces():
    correct, samples = torch.tensor([0, 1, 2, 4]), torch.tensor([4, 5, 6, 7])
    whole, pieces = PassAtK(k=(1, 3)), PassAtK(k=(1, 3))
    whole.update(correct, samples)
    for i in range(4):
        pieces.update(correct[i : i + 1], samples[i : i + 1])
    expected = sum(by_enumeration(int(c), int(n), 3) for c, n in zip(correct, samples, strict=True)) / 4
    assert whole.compute()[3].item() == pytest.approx(expected, abs=1e-6)
    assert {k: v.item() for k, v in whole.compute().items()} == pytest.approx(
        {k: v.item() for k, v in pieces.compute().items()}
    )


def test_a_rank_without_problems_is_fine():
    metric = PassAtK(k=2)
    metric.update(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    metric.update(torch.tensor([1]), torch.tensor([2]))
    assert metric.compute()[2].item() == 1


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ([1], [4, 4], 1, r"one shape \[P\].*\[1\] and \[2\]"),
        ([5], [4], 1, "0 <= `num_correct` <= `num_samples`"),
        ([-1], [4], 1, "0 <= `num_correct`"),
        ([0], [0], 1, "at least one sample"),
        ([1], [4], 5, "pass@5 needs at least 5 samples per problem, got 4"),
        ([1], [4], 0, "`k` >= 1, got 0"),
    ],
)
def test_counts_that_do_not_fit(correct: list[int], samples: list[int], k: int, message: str):
    with pytest.raises(ValueError, match=message):
        pass_at_k(torch.tensor(correct), torch.tensor(samples), k)


@pytest.mark.parametrize("k", [0, [], [2, 0]])
def test_metric_refuses_k(k):
    with pytest.raises(ValueError, match="`k`"):
        PassAtK(k=k)


def test_mean_at_k_by_hand():
    assert mean_at_k(torch.tensor([3]), torch.tensor([4])).item() == 0.75


def _worker(rank: int, world: int, store: str, results: mp.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    correct, samples = torch.arange(10) % 5, torch.full((10,), 4)
    mean, passed = MeanAtK(), PassAtK(k=[1, 2, 4])
    mine = slice(0, 7) if rank == 0 else slice(7, 10)  # uneven shares
    mean.update(correct[mine], samples[mine])
    passed.update(correct[mine], samples[mine])
    results.put([mean.compute().item(), *(value.item() for value in passed.compute().values())])
    torch.distributed.destroy_process_group()


def test_processes_agree_with_one(tmp_path):
    mean, passed = MeanAtK(), PassAtK(k=[1, 2, 4])
    for metric in (mean, passed):
        metric.update(torch.arange(10) % 5, torch.full((10,), 4))
    expected = [mean.compute().item(), *(value.item() for value in passed.compute().values())]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_worker, args=(rank, 2, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found == [pytest.approx(expected, abs=1e-7)] * 2
