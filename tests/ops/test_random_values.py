"""Random ops draw from the distributions they name: Kolmogorov-Smirnov and chi-squared statistics of
large draws from fixed seeds, moments for the 16-bit floats, whose values are rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

COUNT = 60_000
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ALL_INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20_240_607)


def _numpy(t: Any) -> np.ndarray:
    return t.detach().to(torch.float64).numpy().ravel()


def _kolmogorov_smirnov(values: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and `cdf`; above 1.95
    for one in a thousand samples of the right distribution."""
    values = np.sort(values)
    n = len(values)
    expected = cdf(values)
    ranks = np.arange(n + 1) / n
    return math.sqrt(n) * max((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())


def _chi_squared(values: np.ndarray, probabilities: np.ndarray) -> float:
    """(chi² - k) / sqrt(2k) of counts of 0, 1, …: above 3.5 for about one in two thousand."""
    n = len(values)
    counts = np.bincount(values.astype(np.int64), minlength=len(probabilities))
    assert len(counts) == len(probabilities), "a value outside the range"
    assert (counts[probabilities == 0] == 0).all()
    kept = probabilities > 0
    expected = n * probabilities[kept]
    chi = ((counts[kept] - expected) ** 2 / expected).sum()
    k = kept.sum() - 1
    return (chi - k) / math.sqrt(2 * k)


def _normal_cdf(mean: float = 0.0, std: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    def cdf(x: np.ndarray) -> np.ndarray:
        z = torch.from_numpy((x - mean) / (std * math.sqrt(2)))
        return 0.5 * (1 + torch.erf(z).numpy())

    return cdf


def _empty(dtype: Any = torch.float32) -> Any:
    return torch.empty(COUNT, dtype=dtype)


# name → draw(dtype), distribution function, mean, variance
CONTINUOUS = {
    "uniform_": (
        lambda d: _empty(d).uniform_(-2, 3),
        lambda x: np.clip((x + 2) / 5, 0, 1),
        0.5,
        25 / 12,
    ),
    "rand": (lambda d: torch.rand(COUNT, dtype=d), lambda x: np.clip(x, 0, 1), 0.5, 1 / 12),
    "rand_like": (lambda d: torch.rand_like(_empty(d)), lambda x: np.clip(x, 0, 1), 0.5, 1 / 12),
    "normal_": (lambda d: _empty(d).normal_(0.5, 2), _normal_cdf(0.5, 2), 0.5, 4.0),
    "randn": (lambda d: torch.randn(300, COUNT // 300, dtype=d), _normal_cdf(), 0.0, 1.0),
    "randn_like": (lambda d: torch.randn_like(_empty(d)), _normal_cdf(), 0.0, 1.0),
    "exponential_": (
        lambda d: _empty(d).exponential_(1.5),
        lambda x: 1 - np.exp(-1.5 * np.maximum(x, 0)),
        1 / 1.5,
        1 / 2.25,
    ),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous(name: str, dtype: Any) -> None:
    draw, cdf, mean, variance = CONTINUOUS[name]
    drawn = draw(dtype)
    assert drawn.dtype == dtype
    values = _numpy(drawn)
    assert np.isfinite(values).all()
    if dtype.itemsize > 2:
        assert _kolmogorov_smirnov(values, cdf) < 1.95
    else:  # a value stands for an interval of its rounding: 2^-8 of a density below 1
        assert _kolmogorov_smirnov(values, cdf) < 1.95 + math.sqrt(COUNT) * 2**-8
    assert abs(values.mean() - mean) < 4 * math.sqrt(variance / COUNT) + 2**-10 * abs(mean)
    assert values.var() == pytest.approx(variance, rel=0.05)


def test_neighbours_are_independent() -> None:
    for draw in (torch.rand, torch.randn):
        values = _numpy(draw(COUNT))
        values = (values - values.mean()) / values.std()
        for lag in (1, 2, 3, 4, 8, 64, 1024):
            correlation = (values[lag:] * values[:-lag]).mean()
            assert abs(correlation) < 4 / math.sqrt(COUNT), lag


def test_draws_one_after_another_differ() -> None:
    a, b = torch.rand(1000), torch.rand(1000)
    assert abs(np.corrcoef(a.numpy(), b.numpy())[0, 1]) < 0.15


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_normal_with_means_and_deviations(dtype: Any) -> None:
    mean = torch.linspace(-50, 50, COUNT).to(dtype)
    std = torch.linspace(0.5, 4, COUNT).to(dtype)
    for drawn, m, s in (
        (torch.normal(mean, std), mean, std),
        (torch.normal(mean, 2.0), mean, 2.0),
        (torch.normal(3.0, std), 3.0, std),
        (torch.normal(3.0, 2.0, (COUNT,)).to(dtype), 3.0, 2.0),
    ):
        m, s = (_numpy(v) if isinstance(v, torch.Tensor) else v for v in (m, s))
        values = (_numpy(drawn) - m) / s
        assert abs(values.mean()) < 4 / math.sqrt(COUNT) + 2**-8
        assert values.std() == pytest.approx(1, rel=0.02)
        if dtype.itemsize > 2:
            assert _kolmogorov_smirnov(values, _normal_cdf()) < 1.95


def test_normal_refuses_deviations_below_zero() -> None:
    mean = torch.zeros(2)
    for bad in (-1.0, math.nan):
        with pytest.raises(RuntimeError, match="normal expects std >= 0.0, but found std"):
            torch.normal(mean, bad)
        with pytest.raises(RuntimeError, match="std >= 0.0"):
            torch.normal(0.0, bad, (3,))


def test_normal_refuses_tensors_of_deviations_below_zero() -> None:
    mean = torch.zeros(2)
    for bad in (-1.0, math.nan):
        for first in (mean, 0.0):
            with pytest.raises(RuntimeError, match="normal expects all elements of std >= 0.0"):
                torch.normal(first, torch.tensor([1.0, bad]))
    assert torch.normal(mean[:0], mean[:0]).shape == (0,)


def test_normal_has_the_dtype_of_the_means() -> None:
    for mean, std in ((torch.float32, torch.float64), (torch.float64, torch.float16)):
        assert torch.normal(torch.zeros(3, dtype=mean), torch.ones(3, dtype=std)).dtype == mean
    with pytest.raises(RuntimeError, match="expected a floating tensor, got int64"):
        torch.normal(torch.zeros(3, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("dtype", [*ALL_INTEGERS, *FLOATS], ids=str)
def test_integers_of_a_range(dtype: Any) -> None:
    uniform = np.full(11, 1 / 11)
    draws = {
        "randint": lambda: torch.randint(3, 14, (COUNT,), dtype=dtype),
        "randint_like": lambda: torch.randint_like(torch.empty(COUNT, dtype=dtype), 3, 14),
        "random_": lambda: _empty(dtype).random_(3, 14),
    }
    for name, draw in draws.items():
        drawn = draw()
        assert drawn.dtype == dtype
        assert _chi_squared(_numpy(drawn) - 3, uniform) < 3.5, name
    assert _chi_squared(_numpy(_empty(dtype).random_(7)), np.full(7, 1 / 7)) < 3.5


def test_negative_and_wide_ranges() -> None:
    values = torch.randint(-5, 6, (COUNT,)).numpy()
    assert _chi_squared(values + 5, np.full(11, 1 / 11)) < 3.5
    wide = torch.randint(-(2**62), 2**62, (COUNT,)).numpy() / 2**63
    assert _kolmogorov_smirnov(wide, lambda x: np.clip(x + 0.5, 0, 1)) < 1.95


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.bool], ids=str)
def test_random_fills_the_whole_type(dtype: Any) -> None:
    """random_() without a range: 0 to the largest value of an integer type."""
    values = _numpy(_empty(dtype).random_())
    largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    assert values.min() >= 0 and values.max() <= largest
    buckets = min(int(largest) + 1, 128)
    scaled = values * buckets // (int(largest) + 1)
    assert _chi_squared(scaled, np.full(buckets, 1 / buckets)) < 3.5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
def test_randperm(dtype: Any) -> None:
    for n in (0, 1, 2, 1000):
        p = torch.randperm(n, dtype=dtype)
        assert p.dtype == dtype and sorted(p.tolist()) == list(range(n))
    # Every order of three is as likely.
    orders = np.array([torch.randperm(3).tolist() for _ in range(3000)]) @ [9, 3, 1]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 6 and ((counts - 500) ** 2 / 500).sum() < 25
    # So is every place of an element of a long one.
    places = np.array([torch.randperm(50).tolist().index(17) for _ in range(3000)])
    assert _chi_squared(places, np.full(50, 1 / 50)) < 3.5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bernoulli(dtype: Any) -> None:
    for p in (0.0, 0.125, 0.5, 0.8125, 1.0):
        variants = {
            "bernoulli": torch.bernoulli(torch.full((COUNT,), p, dtype=dtype)),
            "bernoulli(p)": torch.bernoulli(_empty(dtype), p),
            "bernoulli_": _empty(dtype).bernoulli_(p),
            "bernoulli_(tensor)": _empty(dtype).bernoulli_(torch.full((COUNT,), p)),
        }
        for name, drawn in variants.items():
            values = _numpy(drawn)
            assert drawn.dtype == dtype and set(values) <= {0.0, 1.0}, name
            assert abs(values.mean() - p) <= 4 * math.sqrt(p * (1 - p) / COUNT), name


def test_bernoulli_of_integers_and_of_its_own_probabilities() -> None:
    for dtype in (*ALL_INTEGERS, torch.bool):
        drawn = _empty(dtype).bernoulli_(0.25)
        assert drawn.dtype == dtype
        assert abs(_numpy(drawn).mean() - 0.25) < 4 * math.sqrt(0.1875 / COUNT)
    p = torch.linspace(0, 1, COUNT)
    drawn = torch.bernoulli(p).numpy()
    halves = drawn.reshape(10, -1).mean(1)
    np.testing.assert_allclose(halves, np.arange(10) / 10 + 0.05, atol=0.03)
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(RuntimeError):
            torch.zeros(3).bernoulli_(bad)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
def test_dropout(p: float) -> None:
    x = torch.full((COUNT,), 2.0)
    for out in (torch.dropout(x, p, True), torch.dropout_(x.clone(), p, True)):
        values = _numpy(out)
        kept = values != 0
        assert abs(kept.mean() - (1 - p)) <= 4 * math.sqrt(p * (1 - p) / COUNT)
        np.testing.assert_allclose(values[kept], 2 / (1 - p) if p < 1 else 0, rtol=1e-6)
    with pytest.raises(RuntimeError, match="between 0 and 1, but got 1.5"):
        torch.dropout_(x.clone(), 1.5, False)
    y = x.clone()
    assert torch.dropout_(y, p, False) is y and (y == 2).all()


def test_dropout_in_place_has_the_gradient_of_what_it_kept() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = x * 1
    assert torch.dropout_(y, 0.25, True) is y
    y.sum().backward()
    assert x.grad.tolist() == y.tolist() and 0 < (y == 0).sum().item() < 1000


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_multinomial(dtype: Any) -> None:
    weights = torch.tensor([[1.0, 2, 0, 5], [4, 0, 0, 4]], dtype=dtype)
    drawn = torch.multinomial(weights, 20_000, replacement=True)
    assert drawn.dtype == torch.int64 and drawn.shape == (2, 20_000)
    for row, expected in zip(drawn.numpy(), ([1, 2, 0, 5], [4, 0, 0, 4])):
        assert _chi_squared(row, np.array(expected) / 8) < 3.5
    # Without replacement the first is drawn as with it, and the next from what is left.
    pairs = torch.multinomial(weights[:1].expand(20_000, 4), 2).numpy()
    assert _chi_squared(pairs[:, 0], np.array([1, 2, 0, 5]) / 8) < 3.5
    assert (pairs[:, 0] != pairs[:, 1]).all()
    after_3 = pairs[pairs[:, 0] == 3, 1]
    assert _chi_squared(after_3, np.array([1, 2, 0]) / 3) < 3.5
    everything = torch.multinomial(torch.ones(5, dtype=dtype), 5)
    assert sorted(everything.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_draws_do_not_depend_on_the_threads(threads: int) -> None:
    def everything() -> list[Any]:
        torch.manual_seed(5)
        n = 300_000
        return [
            torch.rand(n),
            torch.randn(n, dtype=torch.bfloat16),
            torch.randint(100, (n,)),
            torch.randperm(n),
            torch.empty(n).exponential_(),
            torch.dropout(torch.ones(n), 0.3, True),
            torch.bernoulli(torch.full((n,), 0.4)),
            torch.multinomial(torch.ones(300, 50), 20),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        torch.set_num_threads(threads)
        for a, b in zip(everything(), expected):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
