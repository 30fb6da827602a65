"""Random numbers: a seed draws on CUDA what it draws on the CPU, whatever the shape and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

SHAPES = [(1,), (3,), (4,), (7, 9), (1030,), (5, 0), (333, 77)]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Logarithms and angles differ in the last places of the type.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def _numpy(t: Any) -> np.ndarray:
    return t.cpu().to(torch.float64).numpy()


def _pair(draw: Callable[[str, Any], Any]) -> tuple[np.ndarray, np.ndarray]:
    """`draw(device, generator)` on both devices, after an earlier draw has moved the offset."""
    results = []
    for device in ("cuda", "cpu"):
        generator = torch.Generator(device=device)
        generator.manual_seed(1234567890123)
        torch.empty(5, device=device).uniform_(generator=generator)
        results.append(_numpy(draw(device, generator)))
    return results[0], results[1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fill", ["uniform_", "normal_", "exponential_"])
def test_fills_are_those_of_the_cpu(fill: str, shape: tuple[int, ...], dtype: Any) -> None:
    arguments = {"uniform_": (-2.0, 3.0), "normal_": (0.5, 2.0), "exponential_": (1.5,)}[fill]

    def draw(device: str, generator: Any) -> Any:
        out = torch.empty(shape, dtype=dtype, device=device)
        return getattr(out, fill)(*arguments, generator=generator)

    ours, reference = _pair(draw)
    bound = TOLERANCE[dtype]
    np.testing.assert_allclose(ours, reference, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_change_the_numbers(dtype: Any) -> None:
    def draw(device: str, generator: Any) -> Any:
        base = torch.zeros(40, 65, dtype=dtype, device=device)
        base.t()[1::2].uniform_(generator=generator)  # strided
        base.view(-1)[1:6].uniform_(generator=generator)  # not aligned
        return base

    ours, reference = _pair(draw)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32], ids=str
)
@pytest.mark.parametrize("high", [2, 100, 2**40])
def test_integers_are_those_of_the_cpu(high: int, dtype: Any) -> None:
    if dtype == torch.bool and high > 2 or dtype != torch.int64 and high > 100:
        pytest.skip("the range does not fit the dtype")
    ours, reference = _pair(
        lambda device, g: torch.randint(0, high, (1001,), generator=g, dtype=dtype, device=device)
    )
    np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("probability", ["number", "tensor", "expanded"])
def test_bernoulli_is_that_of_the_cpu(probability: str) -> None:
    def draw(device: str, generator: Any) -> Any:
        out = torch.empty(30, 41, device=device)
        if probability == "number":
            return out.bernoulli_(0.3, generator=generator)
        p = torch.linspace(0, 1, 41, device=device)
        if probability == "tensor":
            p = p.expand(30, 41).contiguous()
        return out.bernoulli_(p, generator=generator)

    ours, reference = _pair(draw)
    np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3,), (8,), (129, 31), (4, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_is_that_of_the_cpu(p: float, shape: tuple[int, ...], dtype: Any) -> None:
    values = np.random.default_rng(3).normal(size=shape)
    results = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(11)
        x = torch.tensor(values, dtype=dtype, device=device)
        for layout in (x, x.t().contiguous().t() if x.dim() == 2 else x):
            out, mask = torch.native_dropout(layout, p, True)
            assert mask.dtype == torch.bool
            results.append((_numpy(out), _numpy(mask)))
    for ours, reference in zip(results[:2], results[2:], strict=True):
        np.testing.assert_array_equal(ours[1], reference[1])
        np.testing.assert_array_equal(ours[0], reference[0])


def test_dropout_gradient_is_masked_and_scaled() -> None:
    x = torch.ones(37, 24, device="cuda", requires_grad=True)
    out = torch.nn.functional.dropout(x, 0.25, training=True)
    out.sum().backward()
    kept = _numpy(out.detach()) != 0
    np.testing.assert_allclose(_numpy(x.grad), kept / 0.75, rtol=1e-6)
    assert 0.6 < kept.mean() < 0.9


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 100_001])
def test_randperm_is_a_permutation_and_repeats(n: int) -> None:
    generator = torch.Generator(device="cuda")
    draws = []
    for _ in range(2):
        generator.manual_seed(5)
        draws.append(torch.randperm(n, generator=generator, device="cuda").cpu().numpy())
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(np.sort(draws[0]), np.arange(n))
    if n >= 1000:
        assert (draws[0] != np.arange(n)).mean() > 0.9
        other = torch.randperm(n, generator=generator, device="cuda").cpu().numpy()
        assert (other != draws[0]).mean() > 0.9


@pytest.mark.parametrize("shape", [(7,), (3, 1000), (300, 5)], ids=str)
@pytest.mark.parametrize("samples", [1, 4, 65])
@pytest.mark.parametrize("replacement", [False, True])
def test_multinomial_is_that_of_the_cpu(
    shape: tuple[int, ...], samples: int, replacement: bool
) -> None:
    if not replacement and samples > shape[-1] - 1:
        pytest.skip("more samples than categories")
    weights = np.random.default_rng(8).uniform(size=shape)
    weights[..., 2] = 0  # never drawn
    ours, reference = _pair(
        lambda device, g: torch.multinomial(
            torch.tensor(weights, device=device), samples, replacement, generator=g
        )
    )
    np.testing.assert_array_equal(ours, reference)
    assert not (ours == 2).any()
