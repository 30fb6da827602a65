"""_scaled_mm and nn.functional.scaled_mm against float64."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.torch.nn.functional import ScalingType, SwizzleType, scaled_mm

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, E4M3: 2.0**-4, E5M2: 2.0**-3}  # fmt: skip


def operands(m, k, n, of_a=E4M3, of_b=E4M3):
    rng = np.random.default_rng(m * 1000 + k * 10 + n)
    a = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)).to(of_a)
    b = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)).to(of_b).t()
    return a, b


def wide(t) -> np.ndarray:
    return t.double().numpy()


def close(got, expected: np.ndarray, dtype, terms: np.ndarray) -> None:
    """Within the rounding to the dtype, and of the sums, whose terms have these magnitudes."""
    assert got.dtype is dtype and tuple(got.shape) == expected.shape and got.is_contiguous()
    bound = ROUNDS[dtype] * np.abs(expected) + 2e-6 * terms
    if dtype in (E4M3, E5M2):
        bound += float(torch.finfo(dtype).smallest_subnormal) / 2
    assert (np.abs(wide(got) - expected) <= bound).all()


SIZES = [
    (32, 64, 48),
    (7, 13, 5),
    (1, 16, 16),
    (129, 257, 65),
    (3, 0, 4),
    (0, 8, 8),
    (300, 96, 520),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("out", list(ROUNDS), ids=str)
def test_one_scale(size, out) -> None:
    a, b = operands(*size)
    scale_a, scale_b = torch.tensor(0.25), torch.tensor([1.7])
    expected = wide(a) @ wide(b) * 0.25 * np.float64(np.float32(1.7))
    terms = np.abs(wide(a)) @ np.abs(wide(b)) * 0.425
    for left in (a, a.t().contiguous().t(), torch.cat([a, a], 1)[:, : size[1]]):
        for right in (b, b.contiguous()):
            got = torch._scaled_mm(left, right, scale_a, scale_b, out_dtype=out)
            close(got, expected, out, terms)


@pytest.mark.parametrize("pair", [(E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)], ids=str)
def test_dtypes(pair) -> None:
    a, b = operands(33, 48, 32, *pair)
    one = torch.tensor(1.0)
    got = torch._scaled_mm(a, b, one, one, out_dtype=torch.float32)
    close(got, wide(a) @ wide(b), torch.float32, np.abs(wide(a)) @ np.abs(wide(b)))
    assert torch._scaled_mm(a, b, one, one).dtype is pair[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_scales_by_row(size, biased) -> None:
    a, b = operands(*size)
    rng = np.random.default_rng(1)
    scale_a = torch.from_numpy(rng.uniform(0.1, 3, (size[0], 1)).astype(np.float32))
    scale_b = torch.from_numpy(rng.uniform(0.1, 3, (1, size[2])).astype(np.float32))
    bias = torch.from_numpy(rng.standard_normal(size[2]).astype(np.float32)) if biased else None
    expected = wide(a) @ wide(b) * wide(scale_a) * wide(scale_b)
    terms = np.abs(wide(a)) @ np.abs(wide(b)) * wide(scale_a) * wide(scale_b)
    if bias is not None:
        expected, terms = expected + wide(bias), terms + np.abs(wide(bias))
    for out in (torch.float32, torch.bfloat16):
        got = torch._scaled_mm(a, b, scale_a, scale_b, bias, None, out)
        close(got, expected, out, terms)


def test_bias_and_scale_of_the_result() -> None:
    a, b = operands(48, 32, 64)
    scale = torch.tensor(0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = torch.arange(64).to(dtype)
        expected = wide(a) @ wide(b) * 0.25 + np.arange(64)
        terms = np.abs(wide(a)) @ np.abs(wide(b)) + np.arange(64)
        for out in (torch.float32, torch.bfloat16, torch.float16):
            got = torch._scaled_mm(a, b, scale, scale, bias=bias, out_dtype=out)
            close(got, expected, out, terms)
    product, terms = wide(a) @ wide(b) * 0.25, np.abs(wide(a)) @ np.abs(wide(b))
    result = torch.tensor(4.0)
    got = torch._scaled_mm(a, b, scale, scale, scale_result=result)
    close(got, product / 4, E4M3, terms)
    got = torch._scaled_mm(a, b, scale, scale, scale_result=result, out_dtype=torch.float32)
    close(got, product, torch.float32, terms)
    out = torch.empty(48, 64)
    assert torch._scaled_mm(a, b, scale, scale, out_dtype=torch.float32, out=out) is out
    close(out, product, torch.float32, terms)


def test_what_is_wrong_is_named() -> None:
    (a, b), one = operands(32, 64, 48), torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(32x64 and 32x64\)"):
        torch._scaled_mm(a, a, one, one)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch._scaled_mm(a[None], b, one, one)
    wrong = {
        "float": (a.float(), b.float(), one, one),
        "one float": (a, b.float(), one, one),
        "bytes": (a.view(torch.uint8), b, one, one),
        "double scale": (a, b, one.double(), one),
        "one row": (a, b, torch.ones(32, 1), one),
        "rows": (a, b, torch.ones(31, 1), torch.ones(1, 48)),
    }
    for arguments in wrong.values():
        with pytest.raises(ValueError, match="Invalid scaling configuration"):
            torch._scaled_mm(*arguments)
    with pytest.raises(RuntimeError, match="Bias must be size 48 but got 47"):
        torch._scaled_mm(a, b, one, one, bias=torch.ones(47))
    with pytest.raises(ValueError, match="out_dtype must be"):
        torch._scaled_mm(a, b, one, one, out_dtype=torch.int32)


def test_under_the_public_name() -> None:
    a, b = operands(32, 64, 48)
    one = torch.tensor(0.5)
    tensor, row = ScalingType.TensorWise, ScalingType.RowWise
    expected = wide(a) @ wide(b) * 0.25
    terms = np.abs(wide(a)) @ np.abs(wide(b))
    close(scaled_mm(a, b, one, tensor, one, tensor), expected, torch.bfloat16, terms)
    got = scaled_mm(a, b, [one], [tensor], [one], [tensor], output_dtype=torch.float32)
    close(got, expected, torch.float32, terms)
    assert scaled_mm(a, b, one, tensor, one, tensor, output_dtype=None).dtype is E4M3
    by_row = scaled_mm(a, b, torch.full((32, 1), 0.5), row, torch.full((1, 48), 0.5), row)
    close(by_row, expected, torch.bfloat16, terms)
    with pytest.raises(NotImplementedError, match="both must be"):
        scaled_mm(a, b, one, tensor, one, row)
    with pytest.raises(NotImplementedError, match="not swizzled"):
        scaled_mm(a, b, one, tensor, one, tensor, SwizzleType.SWIZZLE_32_4_4)
    with pytest.raises(ValueError, match="scales of one number"):
        scaled_mm(a, b, torch.ones(32, 1), tensor, torch.ones(1, 48), tensor)
    with pytest.raises(ValueError, match="RowWise wants"):
        scaled_mm(a, b, one, row, one, row)
