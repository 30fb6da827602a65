"""Pointwise kernels and copies over every kind of layout: dense rows, broadcasts, transposes, parts
of rows, unaligned starts. Integers up to 2048 are exact in every dtype, so results are exact too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int8]


def _numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-5, 6, size=shape).astype(np.float64)


def _numpy(t: Any) -> np.ndarray:
    return t.cpu().to(torch.float64).numpy()


# Each takes a [48, 64] array and gives a view of it; the same for an array and a tensor.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.swapaxes(0, 1),
    "columns": lambda x: x[:, 8:40],
    "odd columns": lambda x: x[:, 1:34],
    "steps": lambda x: x[::3, ::2],
    "four dimensions": lambda x: x.reshape(4, 3, 4, 64).swapaxes(1, 2),
    "transposed batch": lambda x: x.reshape(3, 16, 64).swapaxes(1, 2),
    "one row": lambda x: x[3:4],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_unary_and_copies(view: str, dtype: Any) -> None:
    array = _numbers((48, 64), 1)
    expected = VIEWS[view](array)
    x = VIEWS[view](torch.tensor(array, dtype=dtype, device="cuda"))
    np.testing.assert_array_equal(_numpy(-x), -expected)
    np.testing.assert_array_equal(_numpy(x.contiguous()), expected)
    target = torch.zeros(tuple(reversed(expected.shape)), dtype=dtype, device="cuda")
    target = target.permute(*reversed(range(expected.ndim)))
    target.copy_(x)
    np.testing.assert_array_equal(_numpy(target), expected)
    for other in (torch.float32, torch.bfloat16, torch.int64):
        np.testing.assert_array_equal(_numpy(x.to(other)), expected)
        converted = torch.zeros(tuple(reversed(expected.shape)), dtype=other, device="cuda")
        converted = converted.permute(*reversed(range(expected.ndim)))
        converted.copy_(x)
        np.testing.assert_array_equal(_numpy(converted), expected)


@pytest.mark.parametrize("shape", [(3, 384, 64), (2, 100, 65), (5, 17, 16), (1, 2000, 33)], ids=str)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transposes_that_convert(dtype: Any, to: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    parts = [torch.ones(shape[0], 1, shape[1], device="cuda").to(to), x.transpose(1, 2)]
    wide = torch.promote_types(dtype, to)
    expected = np.concatenate([_numpy(p) for p in parts], axis=1)
    joined = torch.cat(parts, 1)
    assert joined.dtype == wide
    np.testing.assert_array_equal(_numpy(joined), expected)
    target = torch.zeros(shape[0], shape[2], shape[1] + 3, device="cuda").to(to)
    target[:, :, 1:-2].copy_(x.transpose(1, 2))
    np.testing.assert_array_equal(_numpy(target[:, :, 1:-2]), _numpy(x.to(to)).swapaxes(1, 2))
    assert not _numpy(target[:, :, :1]).any() and not _numpy(target[:, :, -2:]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", ["row", "column", "number", "zero-d", "outer", "same"])
@pytest.mark.parametrize("view", VIEWS)
def test_broadcasting(view: str, other: str, dtype: Any) -> None:
    array = _numbers((48, 64), 2)
    a = VIEWS[view](array)
    x = VIEWS[view](torch.tensor(array, dtype=dtype, device="cuda"))
    shape = {
        "row": a.shape[-1:],
        "column": (a.shape[-2], 1),
        "number": (),
        "zero-d": (),
        "outer": (3, *(1 for _ in a.shape)),
        "same": a.shape,
    }[other]
    b = _numbers(shape, 3)
    y = float(b) if other == "number" else torch.tensor(b, dtype=dtype, device="cuda")
    if other == "number" and not dtype.is_floating_point:
        y = int(b)
    np.testing.assert_array_equal(_numpy(x + y), a + b)
    np.testing.assert_array_equal(_numpy(y * x), b * a)
    np.testing.assert_array_equal(_numpy(x > y), a > b)
    where = torch.where(x > 0, x, y)
    np.testing.assert_array_equal(_numpy(where), np.where(a > 0, a, b))
    if other != "outer":
        inplace = x.clone()
        inplace -= y
        np.testing.assert_array_equal(_numpy(inplace), a - b)


def test_narrow_integers_take_part_in_their_own_width() -> None:
    x = torch.tensor([44, 45, 255], dtype=torch.uint8, device="cuda")
    wide = torch.tensor(300, dtype=torch.int64, device="cuda")  # 44 as uint8
    assert (x == wide).cpu().numpy().tolist() == [True, False, False]
    assert torch.maximum(x, wide).cpu().numpy().tolist() == [44, 45, 255]


def test_integer_division_by_zero_gives_zero() -> None:
    x = torch.tensor([7, -7, 0], device="cuda")
    zero = torch.zeros_like(x)
    for result in (x // zero, x % zero, torch.fmod(x, zero)):
        assert result.cpu().numpy().tolist() == [0, 0, 0]


def test_overlapping_copy_is_refused_and_moves_through_a_clone() -> None:
    x = torch.arange(1000, device="cuda")
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        x[1:].copy_(x[:-1])
    assert x.tolist() == list(range(1000))
    x[1:].copy_(x[:-1].clone())
    assert x.tolist() == [0, *range(999)]


@pytest.mark.parametrize("shape", [(5, 5), (3, 7, 4), (2, 300, 513), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("diagonal", [-400, -2, 0, 1, 600])
def test_triangles(shape: tuple[int, ...], diagonal: int) -> None:
    array = _numbers(shape, 4)
    for dtype in (torch.float32, torch.int8, torch.bfloat16):
        x = torch.tensor(array, dtype=dtype, device="cuda")
        np.testing.assert_array_equal(_numpy(x.tril(diagonal)), np.tril(array, diagonal))
        np.testing.assert_array_equal(_numpy(x.triu(diagonal)), np.triu(array, diagonal))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim: int) -> None:
    shapes = [[4, 6, 8], [4, 6, 8], [4, 6, 8]]
    for shape, extent in zip(shapes, (1, 5, 16), strict=True):
        shape[dim] = extent
    arrays = [_numbers(tuple(s), 9) for s in shapes]
    tensors = [torch.tensor(a, dtype=torch.float32, device="cuda") for a in arrays]
    tensors[1] = tensors[1].swapaxes(0, 2).contiguous().swapaxes(0, 2)
    np.testing.assert_array_equal(_numpy(torch.cat(tensors, dim)), np.concatenate(arrays, axis=dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8], ids=str)
def test_arange(dtype: Any) -> None:
    for n in (0, 1, 200):
        np.testing.assert_array_equal(
            _numpy(torch.arange(0, n, dtype=dtype, device="cuda")), np.arange(n)
        )
    if dtype.is_floating_point:
        np.testing.assert_array_equal(
            _numpy(torch.arange(-3, 3, 0.5, dtype=dtype, device="cuda")), np.arange(-3, 3, 0.5)
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [0, 1, 5, 4096, 100_003])
@pytest.mark.parametrize("skewed", [False, True])
def test_sums_of_float32_and_a_16_bit_float(n: int, dtype: str, skewed: bool) -> None:
    """Each way around, in place, and where the operands do not begin at whole vectors."""
    wide = torch.randn(n + 1)[int(skewed) :][:n]
    narrow = torch.randn(n + 1)[int(skewed) :][:n].to(getattr(torch, dtype))
    expected = wide.numpy() + narrow.float().numpy()
    a, b = torch.zeros(n + 1, device="cuda"), torch.zeros(n + 1, device="cuda", dtype=narrow.dtype)
    a, b = a[int(skewed) :][:n].copy_(wide), b[int(skewed) :][:n].copy_(narrow)
    for made in (a + b, b + a, a.clone().add_(b)):
        assert made.dtype == torch.float32
        np.testing.assert_array_equal(made.cpu().numpy(), expected)
    np.testing.assert_array_equal((a - b).cpu().numpy(), wide.numpy() - narrow.float().numpy())
