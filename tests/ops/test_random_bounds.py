"""Random numbers whose bounds a dtype does not hold, and seeds."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt


@pytest.mark.parametrize(
    ("dtype", "bounds", "message"),
    [
        (vt.float32, (-3e38, 3e38), "to - from"),
        (vt.float32, (0, 1e39), "to is out of bounds for float32"),
        (vt.float32, (0, float("inf")), "to is out of bounds"),
        (vt.float32, (-float("inf"), 0), "from is out of bounds"),
        (vt.float16, (0, 1e6), "to is out of bounds for float16"),
        (vt.bfloat16, (0, 3.4e38), "to is out of bounds for bfloat16"),
        (vt.float64, (-1e308, 1e308), "to - from"),
        (vt.float32, (1, 0), "expects to return"),
        (vt.float32, (float("nan"), 0), "expects to return"),
    ],
)
def test_bounds_of_uniform_numbers(dtype: Any, bounds: tuple[float, float], message: str) -> None:
    x = vt.ones(3, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        x.uniform_(*bounds)
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [(vt.float32, (0, 3.4e38)), (vt.float16, (-3e4, 3e4)), (vt.bfloat16, (0, 3.3e38)),
     (vt.float64, (-8e307, 8e307)), (vt.float32, (2, 2))],
)  # fmt: skip
def test_wide_ranges_of_uniform_numbers(dtype: Any, bounds: tuple[float, float]) -> None:
    x = vt.empty(1000, dtype=dtype).uniform_(*bounds).double()
    low, high = bounds
    assert x.isfinite().all() and x.min().item() >= low and x.max().item() <= high
    if low < high:
        assert (x / (high - low)).std().item() > 0.25


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(vt.uint8, 256), (vt.int8, 128), (vt.int16, 32768), (vt.float16, 2049), (vt.bfloat16, 257)],
)
def test_permutations_that_a_dtype_holds(dtype: Any, most: int) -> None:
    x = vt.randperm(most, dtype=dtype)
    assert sorted(x.tolist()) == list(range(most))
    with pytest.raises(RuntimeError, match="n is too large for"):
        vt.randperm(most + 1, dtype=dtype)


def test_seeds_are_of_64_bits() -> None:
    generator = vt.Generator()
    for seed in (0, 2**64 - 1, -1, -(2**63), 2**63):
        assert generator.manual_seed(seed).initial_seed() == seed % 2**64
    for seed in (2**64, -(2**63) - 1, 10**30):
        with pytest.raises(ValueError, match=f"seed in .*, got {seed}"):
            generator.manual_seed(seed)
    assert generator.initial_seed() == 2**63
