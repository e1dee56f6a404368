"""Metrics over samples against enumeration and counting, in one process and in several."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from lit_grpo.metrics import (
    BestAtN,
    MajAtK,
    MeanAtK,
    PassAtK,
    PassHatK,
    best_at_n,
    maj_at_k,
    mean_at_k,
    mean_interval,
    paired_bootstrap,
    pass_at_k,
    pass_hat_k,
)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_hat_k_is_the_share_of_subsets_without_a_wrong_one(n: int):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(all(subset) for subset in subsets) / len(subsets)
        assert pass_hat_k(doubles(c), doubles(n), k).item() == pytest.approx(share, abs=1e-12)


def test_best_at_n_is_the_share_of_draws_with_replacement():
    for samples, n in itertools.product(range(1, 5), range(1, 6)):
        for c in range(samples + 1):
            draws = list(itertools.product([True] * c + [False] * (samples - c), repeat=n))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert best_at_n(doubles(c), doubles(samples), n).item() == pytest.approx(share, abs=1e-12)


def test_best_at_n_is_what_a_bootstrap_of_a_thousand_draws_estimates():
    generator = torch.Generator().manual_seed(42)
    correct = torch.arange(32) < 2
    found = [correct[torch.randint(32, (32,), generator=generator)].any().item() for _ in range(1000)]
    share = best_at_n(torch.tensor([2]), torch.tensor([32]), 32).item()
    assert statistics.mean(found) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 1000))


@given(st.lists(st.lists(st.integers(-1, 3), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_maj_at_k_counts_votes(votes: list[list[int]], k: int):
    """``Counter.most_common`` keeps the order of insertion among equals: the first given wins."""
    gold = 2
    expected = []
    for row in votes:
        counts = Counter(vote for vote in row[:k] if vote >= 0).most_common(1)
        expected.append(float(bool(counts) and counts[0][0] == gold))
    tensor = torch.tensor(votes)
    assert maj_at_k(tensor, tensor == gold, k).tolist() == expected


def test_interval_is_that_of_the_normal_distribution():
    values = torch.tensor([0.1, 0.4, 0.4, 0.9, 1.0])
    standard_error = statistics.stdev([0.1, 0.4, 0.4, 0.9, 1.0]) / math.sqrt(5)
    for level in (0.9, 0.95):
        z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
        mean, half_width = mean_interval(values, level)
        assert mean == pytest.approx(0.56)
        assert half_width == pytest.approx(z * standard_error, rel=1e-6)
    assert math.isnan(mean_interval(torch.tensor([1.0])).half_width)


class TestPairedBootstrap:
    def test_interval_is_that_of_all_possible_draws(self):
        first, second = torch.tensor([1.0, 0.5, 0.25, 1.0]), torch.tensor([0.5, 0.75, 0.25, 0.0])
        differences = (first - second).tolist()
        means = torch.tensor([statistics.mean(draw) for draw in itertools.product(differences, repeat=4)])
        found = paired_bootstrap(first, second, level=0.8)
        assert found.difference == pytest.approx(statistics.mean(differences))
        assert [found.low, found.high] == pytest.approx(
            means.quantile(torch.tensor([0.1, 0.9])).tolist(), abs=0.0626 / 2
        )
        extreme = ((means - found.difference).abs() >= abs(found.difference) - 1e-6).double().mean().item()
        assert found.p_value == pytest.approx(extreme, abs=4 * math.sqrt(extreme * (1 - extreme) / 10_000))

    def test_equal_results_do_not_differ(self):
        values = torch.rand(20, generator=torch.Generator().manual_seed(0))
        assert paired_bootstrap(values, values) == (0, 0, 0, 1)

    def test_false_alarms_are_as_rare_as_the_level_says(self):
        """Two hundred comparisons of models that do not differ: about ten intervals miss 0."""
        generator = torch.Generator().manual_seed(0)
        alarms = 0
        for _ in range(200):
            skill = torch.rand(60, generator=generator)
            first, second = (torch.bernoulli(skill, generator=generator) for _ in range(2))
            result = paired_bootstrap(first, second, draws=300)
            alarms += not result.low <= 0 <= result.high
        assert 2 <= alarms <= 24

    @pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 2), (2, 2)), ((0,), (0,))])
    def test_results_on_other_problems_are_refused(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]):
        with pytest.raises(ValueError, match=r"two result sets of one shape \[P\]"):
            paired_bootstrap(*(torch.zeros(shape) for shape in shapes))


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
        ([1], [4], 5, "k = 5 needs at least 5 samples per problem, got 4"),
        ([1], [4], 0, "`k` >= 1, got 0"),
    ],
)
def test_counts_that_do_not_fit(correct: list[int], samples: list[int], k: int, message: str):
    with pytest.raises(ValueError, match=message):
        pass_at_k(torch.tensor(correct), torch.tensor(samples), k)


COUNTED = {
    "mean": lambda **options: MeanAtK(**options),
    "pass": lambda **options: PassAtK(k=[1, 2, 4], **options),
    "hat": lambda **options: PassHatK(k=[1, 3], **options),
    "best": lambda **options: BestAtN(k=8, **options),
}
CORRECT, SAMPLES, IDS = torch.arange(10) % 5, torch.full((10,), 4), torch.arange(100, 110)
VOTES = torch.arange(40).reshape(10, 4) % 7 % 3


def flat(result: torch.Tensor | dict[int, torch.Tensor]) -> list[float]:
    tensors = result.values() if isinstance(result, dict) else [result]
    return [number for tensor in tensors for number in tensor.flatten().tolist()]


@pytest.mark.parametrize("name", COUNTED)
def test_rows_of_one_problem_count_once(name: str):
    plain, repeated = COUNTED[name](), COUNTED[name]()
    plain.update(CORRECT, SAMPLES)
    order = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 7, 8, 0])
    for part in order.split(4):
        repeated.update(CORRECT[part], SAMPLES[part], IDS[part])
    assert flat(repeated.compute()) == pytest.approx(flat(plain.compute()))


@pytest.mark.parametrize("name", COUNTED)
def test_with_a_level_the_interval_comes_along(name: str):
    plain, metric = COUNTED[name](), COUNTED[name](level=0.9)
    for each in (plain, metric):
        each.update(CORRECT, SAMPLES)
    values = metric.per_problem()
    for i, (mean, half_width) in enumerate(zip(flat(metric.compute())[::2], flat(metric.compute())[1::2], strict=True)):
        assert mean == pytest.approx(flat(plain.compute())[i])
        assert half_width == pytest.approx(mean_interval(values[:, i], 0.9).half_width)


def test_nothing_yet_is_nan():
    assert math.isnan(MeanAtK().compute())
    assert math.isnan(PassAtK(k=2).compute()[2])


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_is_a_share(level: float):
    with pytest.raises(ValueError, match=f"`level` between 0 and 1, got {level}"):
        MeanAtK(level=level)


@pytest.mark.parametrize("k", [0, 5])
def test_votes_that_do_not_fit(k: int):
    with pytest.raises(ValueError, match=f"k = {k} needs at least 1 and at most"):
        maj_at_k(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool), k)
    with pytest.raises(ValueError, match="one shape"):
        maj_at_k(torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("k", [0, [], [2, 0]])
def test_metric_refuses_k(k):
    with pytest.raises(ValueError, match="`k`"):
        PassAtK(k=k)


def test_mean_at_k_by_hand():
    assert mean_at_k(torch.tensor([3]), torch.tensor([4])).item() == 0.75


def _worker(rank: int, world: int, store: str, results: mp.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    uneven = slice(0, 7) if rank == 0 else slice(7, 10)
    padded = torch.tensor([0, 2, 4, 6, 8, 0] if rank == 0 else [1, 3, 5, 7, 9, 2])  # what a DistributedSampler does
    found = []
    for make in COUNTED.values():
        for mine, ids in ((uneven, None), (padded, IDS[padded])):
            metric = make(level=0.95)
            metric.update(CORRECT[mine], SAMPLES[mine], ids)
            found += flat(metric.compute())
    majority = MajAtK(k=[1, 4])
    majority.update(VOTES[padded], VOTES[padded] == 2, IDS[padded])
    results.put(found + flat(majority.compute()))
    torch.distributed.destroy_process_group()


def test_processes_agree_with_one(tmp_path):
    expected = []
    for make in COUNTED.values():
        metric = make(level=0.95)
        metric.update(CORRECT, SAMPLES)
        expected += flat(metric.compute()) * 2
    majority = MajAtK(k=[1, 4])
    majority.update(VOTES, VOTES == 2)
    expected += flat(majority.compute())
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
