"""Reductions, scans and sorts on the device against NumPy in float64 and against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch

RNG = np.random.default_rng(5)

# Layouts that take the row kernel, the column kernel, split parts, and neither a multiple of a
# vector nor of a block.
SHAPES = [
    ((1,), None),
    ((1000003,), None),
    ((7, 100001), 1),
    ((100001, 7), 0),
    ((4099, 768), 0),
    ((4099, 768), 1),
    ((5, 33, 17), 1),
    ((3, 2, 5, 4, 3), (1, 3)),
    ((3, 2, 5, 4, 3), (0, 2, 4)),
    ((300000, 3), 1),
    ((2, 70000, 8), 1),
]


def on_device(values: np.ndarray, transposed: bool, offset: int) -> torch.Tensor:
    """`values` on the device, with permuted strides or off a 16-byte boundary if asked."""
    t = torch.tensor(np.ascontiguousarray(values.T) if transposed else values)
    padded = torch.zeros(t.numel() + offset, dtype=t.dtype, device="cuda")
    padded[offset:] = t.reshape(-1).cuda()
    out = padded[offset:].view(t.shape)
    return out.permute(*range(out.dim() - 1, -1, -1)) if transposed else out


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32", "bool"])
def test_sum(
    shape: tuple[int, ...], dim: object, dtype: str, transposed: bool, offset: int
) -> None:
    values = (RNG.standard_normal(shape) * 4).astype(dtype)
    x = on_device(values, transposed, offset)
    got = (x.sum() if dim is None else x.sum(dim)).cpu().numpy()
    want = values.sum(dim, dtype="float64" if "float" in dtype else "int64")
    if "float" in dtype:
        scale = np.abs(values).astype("float64").sum(dim) + 1e-30
        eps = np.finfo(dtype).eps
        assert np.all(np.abs(got - want) <= 16 * eps * scale), np.max(np.abs(got - want) / scale)
    else:
        assert np.array_equal(got, want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [s for s in SHAPES if not isinstance(s[1], tuple)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8"])
def test_extremes_name_the_first(
    shape: tuple[int, ...], dim: int | None, dtype: str, transposed: bool
) -> None:
    values = RNG.integers(0, 20, shape).astype(dtype)  # many ties
    if dtype.startswith("float") and values.size > 50:
        values.reshape(-1)[[10, 40]] = np.nan
    x = on_device(values, transposed, 0)
    for name, reference, position in (
        ("max", np.max, np.argmax),  # NumPy's let nan win, and name the first, too
        ("min", np.min, np.argmin),
    ):
        if dim is None:
            assert np.array_equal(
                getattr(x, name)().cpu().numpy(), reference(values), equal_nan=dtype[0] == "f"
            )
            assert getattr(x, "arg" + name)().item() == position(values)
            continue
        found = getattr(x, name)(dim)
        assert np.array_equal(
            found.values.cpu().numpy(), reference(values, dim), equal_nan=dtype[0] == "f"
        )
        assert np.array_equal(found.indices.cpu().numpy(), position(values, dim))


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32", "int64"])
def test_counts(shape: tuple[int, ...], dim: object, dtype: str) -> None:
    values = (RNG.random(shape) < 0.4).astype(dtype)
    x = torch.tensor(values).cuda()
    dims = dim if dim is not None else tuple(range(len(shape)))
    assert np.array_equal(x.count_nonzero(dims).cpu().numpy(), np.count_nonzero(values, dims))
    if isinstance(dim, int):
        assert np.array_equal(x.any(dim).cpu().numpy(), values.any(dim))
        assert np.array_equal(x.all(dim).cpu().numpy(), values.all(dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_of_16_bit_floats_rounds_once(dtype: torch.dtype) -> None:
    x = torch.tensor(RNG.standard_normal((513, 4104)).astype("float32")).to(dtype)
    for dim in (0, 1):
        want = x.double().sum(dim).numpy()
        got = x.cuda().sum(dim).double().cpu().numpy()
        step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        assert np.all(np.abs(got - want) <= step * np.abs(want) + 1e-3)


def test_empty_reductions_give_the_identity() -> None:
    x = torch.zeros(3, 0, device="cuda")
    assert x.sum(1).tolist() == [0.0] * 3 and x.prod(1).tolist() == [1.0] * 3
    assert torch.isnan(x.mean()).item() and x.sum(0).shape == (0,)
    assert x.all().item() is True and x.any().item() is False
    with pytest.raises(IndexError):
        x.amax(1)


def test_equal_inputs_give_equal_sums() -> None:
    x = torch.randn(1 << 22, device="cuda")
    first = x.sum().item()
    assert all(x.sum().item() == first for _ in range(5))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((5,), 0),
        ((1000003,), 0),
        ((3, 70001), 1),
        ((4000, 40), 1),
        ((70001, 3), 0),
        ((9, 300, 7), 1),
    ],
)
def test_scans(shape: tuple[int, ...], dim: int) -> None:
    values = RNG.standard_normal(shape).astype("float32")
    x = torch.tensor(values).cuda()
    want = values.astype("float64").cumsum(dim)
    np.testing.assert_allclose(x.cumsum(dim).cpu().numpy(), want, rtol=1e-6, atol=1e-5)
    whole = RNG.integers(-9, 9, shape)
    assert np.array_equal(torch.tensor(whole).cuda().cumsum(dim).cpu().numpy(), whole.cumsum(dim))
    signs = np.where(RNG.random(shape) < 0.5, -1.0, 1.0)
    got = torch.tensor(signs).cuda().cumprod(dim).cpu().numpy()
    assert np.array_equal(got, signs.cumprod(dim))
    ties = torch.tensor(RNG.integers(0, 50, shape).astype("float32"))
    ties.view(-1)[ties.numel() // 2] = float("nan")
    for name in ("cummax", "cummin"):
        here, there = getattr(ties, name)(dim), getattr(ties.cuda(), name)(dim)
        assert np.array_equal(there.values.cpu().numpy(), here.values.numpy(), equal_nan=True)
        assert np.array_equal(there.indices.cpu().numpy(), here.indices.numpy())


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
)
@pytest.mark.parametrize(
    ("shape", "dim"), [((1,), 0), ((100001,), 0), ((300, 257), 1), ((257, 300), 0), ((3, 50, 4), 1)]
)
def test_sort_is_stable(shape: tuple[int, ...], dim: int, dtype: str, descending: bool) -> None:
    values = RNG.integers(-60, 60, shape).astype(dtype)
    if dtype.startswith("float") and values.size > 9:
        values.reshape(-1)[[0, 3, 5, 7, 9]] = [np.nan, -np.inf, np.inf, -0.0, -np.nan]
    x = torch.tensor(values)
    here = x.sort(dim, descending=descending, stable=True)
    there = x.cuda().sort(dim, descending=descending, stable=True)
    assert np.array_equal(there.indices.cpu().numpy(), here.indices.numpy())
    assert there.values.cpu().numpy().tobytes() == here.values.numpy().tobytes()
