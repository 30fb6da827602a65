"""8-bit floats: every code and every rounding against their definition, what moves and what refuses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BOTH = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3fn", "e5m2"])
LAYOUT = {E4M3: (3, 7), E5M2: (2, 15)}  # bits of the mantissa, bias


def values_of(dtype: torch.dtype) -> np.ndarray:
    """What the 256 codes mean, from the definition of the format."""
    mantissa, bias = LAYOUT[dtype]
    values = np.empty(256)
    for code in range(256):
        exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
        if exponent == 0:
            size = fraction * 2.0 ** (1 - bias - mantissa)
        else:
            size = (1 + fraction / 2**mantissa) * 2.0 ** (exponent - bias)
        if dtype is E4M3 and code & 0x7F == 0x7F:
            size = np.nan
        if dtype is E5M2 and exponent == 31:
            size = np.inf if fraction == 0 else np.nan
        values[code] = -size if code & 0x80 else size
    return values


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The codes nearest to float32 values, ties to the even code; too large: 448 or infinity."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = x.astype(np.float64)
    sizes = values_of(dtype)[: 0x7F if dtype is E4M3 else 0x7C]
    a = np.abs(x)
    above = np.clip(np.searchsorted(sizes, a), 1, len(sizes) - 1)
    low, high = sizes[above - 1], sizes[above]
    middle = (low + high) / 2
    up = (a > middle) | ((a == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    code = np.where(a >= sizes[-1], len(sizes) - 1, code)
    if dtype is E5M2:
        code = np.where(a >= 61440, 0x7C, code)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def codes(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.uint8).numpy()


def all_codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype)


@BOTH
def test_every_code(dtype: torch.dtype) -> None:
    x, expected = all_codes(dtype), values_of(dtype)
    for wide in (torch.float32, torch.float64, torch.float16):
        got = x.to(wide).numpy().astype(np.float64)
        np.testing.assert_array_equal(got, expected)
        # The sign of a NaN means nothing, and devices may drop it.
        signed = slice(None) if x.device.type == "cpu" else ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(got)[signed], np.signbit(expected)[signed])
    np.testing.assert_array_equal(x.bfloat16().float().numpy(), expected)
    np.testing.assert_array_equal(x.reshape(16, 16).t().float().numpy().T.reshape(-1), expected)
    finite = np.isfinite(expected)
    integers = x[torch.from_numpy(finite)].to(torch.int32).numpy()
    np.testing.assert_array_equal(integers, np.trunc(expected[finite]))
    np.testing.assert_array_equal(x.to(torch.bool).numpy(), expected != 0)
    assert x.tolist()[:8] == list(expected[:8]) and x[9].item() == expected[9]
    np.testing.assert_array_equal(codes(x.float().to(dtype))[~np.isnan(expected)],
                                  np.arange(256)[~np.isnan(expected)])  # fmt: skip


@BOTH
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_rounding_of_all_16_bit_floats(dtype: torch.dtype, source: torch.dtype) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(source)
    values = x.float()
    expected = rounded(values.numpy(), dtype)
    np.testing.assert_array_equal(codes(x.to(dtype)), expected)
    np.testing.assert_array_equal(codes(values.to(dtype)), expected)
    strided = torch.stack([x, x], 1)[:, 0].to(dtype)
    np.testing.assert_array_equal(codes(strided.contiguous()), expected)


@BOTH
def test_rounding_of_floats(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(8)
    bits = rng.integers(0, 2**32, 1 << 18, dtype=np.uint32)
    sizes = values_of(dtype)[: 0x7E if dtype is E4M3 else 0x7B]
    middles = ((sizes[1:] + sizes[:-1]) / 2).astype(np.float32)
    near = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    edges = np.array([448, 464, 465, 480, 57344, 61439, 61440, 1e9, np.inf, np.nan, 0], np.float32)
    # Exponents that the format has, where its rounding happens.
    usual = (rng.standard_normal(1 << 16) * np.exp2(rng.uniform(-18, 17, 1 << 16))).astype(
        np.float32
    )
    x = np.concatenate([bits.view(np.float32), near, -near, edges, -edges, usual])
    expected = rounded(x, dtype)
    np.testing.assert_array_equal(codes(torch.from_numpy(x).to(dtype)), expected)
    with np.errstate(invalid="ignore"):
        doubles = torch.from_numpy(x.astype(np.float64)).to(dtype)
    np.testing.assert_array_equal(codes(doubles), expected)
    into = torch.zeros(len(x), dtype=dtype)
    into.copy_(torch.from_numpy(x))
    np.testing.assert_array_equal(codes(into), expected)
    integers = np.arange(-500, 500)
    got = torch.from_numpy(integers).to(dtype)
    np.testing.assert_array_equal(codes(got), rounded(integers.astype(np.float32), dtype))
    assert (
        codes(torch.tensor([True, False]).to(dtype)).tolist()
        == rounded(np.array([1.0, 0.0]), dtype).tolist()
    )


def test_between_the_two() -> None:
    for dtype, other in ((E4M3, E5M2), (E5M2, E4M3)):
        expected = rounded(values_of(dtype).astype(np.float32), other)
        np.testing.assert_array_equal(codes(all_codes(dtype).to(other)), expected)
        into = torch.empty(256, dtype=other).copy_(all_codes(dtype))
        np.testing.assert_array_equal(codes(into), expected)


@BOTH
def test_what_the_dtype_says(dtype: torch.dtype) -> None:
    name = "float8_e4m3fn" if dtype is E4M3 else "float8_e5m2"
    assert repr(dtype) == f"torch.{name}" and dtype.itemsize == 1
    assert dtype.is_floating_point and dtype.is_signed and not dtype.is_complex
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    info = torch.finfo(dtype)
    finite = values_of(dtype)[np.isfinite(values_of(dtype))]
    assert (info.max, info.min, info.bits) == (finite.max(), finite.min(), 8)
    assert info.tiny == finite[1 << LAYOUT[dtype][0]] and info.eps == 2.0 ** -LAYOUT[dtype][0]
    x = torch.ones(2, 3, dtype=dtype)
    assert x.element_size() == 1 and x.is_floating_point() and x.nbytes == 6
    assert x.type().endswith(f".{name.capitalize()}Tensor")
    assert torch.can_cast(dtype, torch.float32) and torch.can_cast(torch.int64, dtype)
    assert not torch.can_cast(dtype, torch.int32)
    with pytest.raises(TypeError, match=name):
        torch.set_default_dtype(dtype)


@BOTH
def test_promotion(dtype: torch.dtype) -> None:
    assert torch.promote_types(dtype, dtype) is dtype
    x = torch.ones(3, dtype=dtype)
    assert torch.result_type(x, 1.5) is dtype and torch.result_type(x, 2) is dtype
    others = [
        torch.bool,
        torch.int64,
        torch.float16,
        torch.float32,
        E5M2 if dtype is E4M3 else E4M3,
    ]
    for other in others:
        with pytest.raises(RuntimeError, match="Promotion for Float8 Types is not supported"):
            torch.promote_types(dtype, other)
        with pytest.raises(RuntimeError, match="Promotion for Float8 Types is not supported"):
            x + torch.ones(3).to(other)
        with pytest.raises(RuntimeError, match="Promotion for Float8 Types is not supported"):
            torch.cat([x, torch.ones(3).to(other)])


@BOTH
def test_making(dtype: torch.dtype) -> None:
    assert codes(torch.zeros(5, dtype=dtype)).tolist() == [0] * 5
    one = 0x38 if dtype is E4M3 else 0x3C
    assert codes(torch.ones(5, dtype=dtype)).tolist() == [one] * 5
    assert codes(torch.tensor([1.0, -1.0], dtype=dtype)).tolist() == [one, one | 0x80]
    assert torch.full((3,), 0.3, dtype=dtype).tolist() == [0.3125] * 3
    assert torch.tensor([1, 2], dtype=dtype).tolist() == [1.0, 2.0]
    x = torch.empty(4, 6, dtype=dtype).fill_(-2.5)
    assert x.float().eq(-2.5).all()
    x[1:3, ::2].fill_(3)
    x[0] = 1.0
    x[3, 1:3] = torch.tensor([7.0, 0.5]).to(dtype)
    expected = np.full((4, 6), -2.5)
    expected[1:3, ::2], expected[0], expected[3, 1:3] = 3, 1, [7, 0.5]
    np.testing.assert_array_equal(x.float().numpy(), expected)
    assert x.zero_().float().abs().sum() == 0
    assert torch.ones_like(x).dtype is dtype and torch.eye(3, dtype=dtype).float().sum() == 3
    assert x.new_full((2,), 4).dtype is dtype
    assert torch.empty(0, dtype=dtype).to(torch.float32).shape == (0,)


@BOTH
def test_moving(dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    x = bits.view(dtype)
    index, places = torch.tensor([3, 0, 15]), torch.arange(256).reshape(16, 16) % 16
    mask = bits % 3 == 0
    moves = {
        "transpose": lambda t: t.t().contiguous(),
        "slice": lambda t: t[2:9, ::3].contiguous(),
        "clone": lambda t: t.clone(),
        "cat": lambda t: torch.cat([t, t[:3]]),
        "stack": lambda t: torch.stack([t, t], 1),
        "index": lambda t: t[index],
        "two indices": lambda t: t[index, index],
        "mask": lambda t: t[mask],
        "index_select": lambda t: t.index_select(1, index),
        "gather": lambda t: t.gather(1, places),
        "take_along_dim": lambda t: torch.take_along_dim(t, places, 0),
        "flip": lambda t: t.flip(0),
        "roll": lambda t: t.roll(3, 1),
        "repeat": lambda t: t.repeat(2, 3),
        "repeat_interleave": lambda t: t.repeat_interleave(2, 0),
        "tril": lambda t: t.tril(),
        "expand": lambda t: t[:1].expand(4, 16).contiguous(),
        "embedding": lambda t: F.embedding(index, t),
        "chunk": lambda t: torch.cat(t.chunk(4), 1),
        "index_copy": lambda t: t.clone().index_copy_(0, index, t[:3]),
        "scatter": lambda t: t.clone().scatter_(1, index.reshape(1, 3), t[:1, :3]),
        "index_put": lambda t: t.clone().index_put_((index,), t[4:7]),
        "deepcopy": lambda t: copy.deepcopy(t),
        "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    }  # fmt: skip
    for name, move in moves.items():
        got, expected = move(x), move(bits)
        assert got.dtype is dtype and got.shape == expected.shape, name
        np.testing.assert_array_equal(codes(got), expected.numpy(), err_msg=name)
    padded = F.pad(x, (1, 2), value=1.0)
    assert padded.shape == (16, 19) and padded[:, -1].float().eq(1).all()
    assert (codes(padded[:, 1:17].contiguous()) == bits.numpy()).all()


@BOTH
def test_comparing(dtype: torch.dtype) -> None:
    x, values = all_codes(dtype), values_of(dtype).astype(np.float32)
    np.testing.assert_array_equal((x == x).numpy(), ~np.isnan(values))
    np.testing.assert_array_equal((x != x.flip(0)).numpy(), values != values[::-1])
    np.testing.assert_array_equal((x == 1.0).numpy(), values == 1)
    np.testing.assert_array_equal(x.isnan().numpy(), np.isnan(values))
    near = torch.full((3,), 0.3, dtype=dtype)
    assert (near == 0.3).all()  # the number is one of the dtype first
    assert torch.equal(x[:100], x[:100]) and not torch.equal(x[:100], x[1:101])
    chosen = torch.where(x == 1.0, x, near[0]) if x.device.type == "cpu" else x
    assert chosen.dtype is dtype
    picked = torch.where(torch.from_numpy(values > 0), x, torch.zeros_like(x))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(codes(picked), np.where(values > 0, np.arange(256), 0))
    assert bool(near[0]) and float(near[0]) == 0.3125 and int(torch.full((), 5, dtype=dtype)) == 5


@BOTH
def test_refusing(dtype: torch.dtype) -> None:
    x, m = torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=torch.bool)
    name = "Float8_e4m3fn" if dtype is E4M3 else "Float8_e5m2"
    refused = {
        "add": lambda: x + x, "add number": lambda: x + 1.0, "mul": lambda: x * 2, "neg": lambda: -x,
        "exp": lambda: x.exp(), "relu": lambda: F.relu(x), "sum": lambda: x.sum(),
        "sum to 8 bits": lambda: torch.ones(3).sum(dtype=dtype), "max": lambda: x.max(),
        "sort": lambda: x.sort(), "lt": lambda: x < x, "mm": lambda: x @ x, "linear": lambda: F.linear(x, x),
        "clamp": lambda: x.clamp(0, 1), "softmax": lambda: x.softmax(0), "cumsum": lambda: x.cumsum(0),
        "masked_fill": lambda: x.masked_fill(m, 1.0), "arange": lambda: torch.arange(3, dtype=dtype),
        "rand": lambda: torch.rand(3, dtype=dtype), "randn": lambda: torch.randn(3, dtype=dtype),
        "randint": lambda: torch.randint(3, (3,), dtype=dtype), "add_": lambda: x.add_(1),
        "index_add_": lambda: x.index_add_(0, torch.tensor([0]), x[:1]),
        "scatter_add_": lambda: x.scatter_add_(0, torch.zeros(1, 4, dtype=torch.int64), x[:1]),
        "addcmul": lambda: torch.addcmul(x, x, x), "lerp": lambda: torch.lerp(x, x, 0.5),
        "logical_not": lambda: x.logical_not(), "pow": lambda: x**2, "bmm": lambda: torch.bmm(x[None], x[None]),
    }  # fmt: skip
    for op, call in refused.items():
        with pytest.raises(NotImplementedError, match=f"not implemented for '{name}'.*float32"):
            pytest.fail(f"{op} gave {call()}")
    assert x.float().eq(1).all()  # nothing was written
    with pytest.raises(NotImplementedError, match=name):
        torch.ones(4, 4) + x[0, 0]


@BOTH
def test_outside(dtype: torch.dtype) -> None:
    x = all_codes(dtype)
    with pytest.raises(TypeError, match="Got unsupported ScalarType Float8.*uint8"):
        x.numpy()
    np.testing.assert_array_equal(x.numpy(force=True), values_of(dtype).astype(np.float32))
    back = torch.from_dlpack(x)
    assert back.dtype is dtype and back.data_ptr() == x.data_ptr()


def test_printing() -> None:
    x = torch.tensor([[0.3, 1.0], [48.0, float("nan")]])
    assert repr(x.to(E5M2)) == (
        "tensor([[ 0.3125,  1.0000],\n        [48.0000,     nan]], dtype=torch.float8_e5m2)"
    )
    assert repr(torch.tensor(2.0).to(E4M3)) == "tensor(2., dtype=torch.float8_e4m3fn)"
    assert repr(torch.empty(0, dtype=E4M3)) == "tensor([], dtype=torch.float8_e4m3fn)"


@BOTH
def test_gradients_pass_conversions(dtype: torch.dtype) -> None:
    x = torch.tensor([0.3, -7.0, 2.0], requires_grad=True)
    (x.to(dtype).float() * torch.tensor([1.0, 2.0, 0.3])).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), np.float32([1, 2, 0.3125]))  # through 8 bits
    assert torch.ones(2, dtype=dtype, requires_grad=True).requires_grad
