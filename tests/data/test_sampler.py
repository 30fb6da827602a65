"""Samplers: what they draw, how often, and that a seed repeats it."""

from collections import Counter

import pytest

import vibetensor.torch as vt
from vibetensor.torch.utils import data


def seeded(seed):
    generator = vt.Generator()
    generator.manual_seed(seed)
    return generator


def test_sequential():
    assert list(data.SequentialSampler("abc")) == [0, 1, 2]


def test_random_is_a_permutation_and_repeats():
    draws = [list(data.RandomSampler(range(50), generator=seeded(s))) for s in (1, 1, 2)]
    assert sorted(draws[0]) == list(range(50))
    assert draws[0] == draws[1] != draws[2]
    vt.manual_seed(5)
    first = [list(data.RandomSampler(range(50))) for _ in range(2)]
    vt.manual_seed(5)
    assert [list(data.RandomSampler(range(50))) for _ in range(2)] == first
    assert first[0] != first[1]


def test_random_with_more_samples_than_data():
    drawn = list(data.RandomSampler(range(4), num_samples=10))
    counts = Counter(drawn)
    assert len(drawn) == 10
    assert set(counts.values()) <= {2, 3}


def test_random_with_replacement():
    sampler = data.RandomSampler(range(5), replacement=True, num_samples=3000)
    counts = Counter(sampler)
    assert len(sampler) == sum(counts.values()) == 3000
    assert all(450 < counts[i] < 750 for i in range(5))


def test_subset():
    assert sorted(data.SubsetRandomSampler([7, 5, 3])) == [3, 5, 7]


def test_weighted():
    drawn = Counter(data.WeightedRandomSampler([0.0, 1.0, 3.0], 4000, generator=seeded(0)))
    assert drawn[0] == 0
    assert 0.2 < drawn[1] / 4000 < 0.3
    without = list(data.WeightedRandomSampler([1.0, 2.0, 3.0], 3, replacement=False))
    assert sorted(without) == [0, 1, 2]


def test_batches():
    assert list(data.BatchSampler(range(5), 2, False)) == [[0, 1], [2, 3], [4]]
    assert list(data.BatchSampler(range(5), 2, True)) == [[0, 1], [2, 3]]
    assert len(data.BatchSampler(range(5), 2, False)) == 3
    assert len(data.BatchSampler(range(5), 2, True)) == 2


@pytest.mark.parametrize("n,drop_last", [(10, False), (11, False), (11, True), (2, False)])
def test_distributed(n, drop_last):
    def shares(epoch):
        samplers = [
            data.DistributedSampler(range(n), 3, rank, seed=4, drop_last=drop_last)
            for rank in range(3)
        ]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [list(sampler) for sampler in samplers]

    first = shares(0)
    assert len({len(share) for share in first}) == 1
    seen = [i for share in first for i in share]
    if drop_last:
        assert len(set(seen)) == len(seen) == n // 3 * 3
    else:
        assert set(seen) == set(range(n))
    assert shares(0) == first
    if n > 2:
        assert shares(1) != first
    in_order = data.DistributedSampler(range(6), 2, 1, shuffle=False)
    assert list(in_order) == [1, 3, 5]


ERRORS = [
    (ValueError, lambda: data.RandomSampler([])),
    (ValueError, lambda: data.RandomSampler([1], num_samples=0)),
    (ValueError, lambda: list(data.RandomSampler([], num_samples=3))),
    (ValueError, lambda: list(data.RandomSampler([], True, num_samples=3))),
    (ValueError, lambda: list(data.DataLoader([], sampler=data.RandomSampler([], False, 3)))),
    (TypeError, lambda: data.RandomSampler([1], replacement=1)),
    (ValueError, lambda: data.WeightedRandomSampler([1.0], 0)),
    (ValueError, lambda: data.WeightedRandomSampler([[1.0]], 1)),
    (ValueError, lambda: data.BatchSampler([1], 0, False)),
    (ValueError, lambda: data.BatchSampler([1], 1, None)),
    (ValueError, lambda: data.DistributedSampler([1], 2, 2)),
    (RuntimeError, lambda: data.DistributedSampler([1])),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    kind, call = ERRORS[case]
    with pytest.raises(kind):
        call()
