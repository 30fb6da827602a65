"""8-bit floats bit by bit against PyTorch: conversions, printing, limits, errors."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as vt

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

NAMES = ["float8_e4m3fn", "float8_e5m2"]
WIDE = ["float16", "bfloat16", "float32", "float64"]


def both(array: np.ndarray):
    return vt.from_numpy(array), torch.from_numpy(array.copy())


def bits(t) -> np.ndarray:
    size = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[t.element_size()]
    return t.view(getattr(torch if isinstance(t, torch.Tensor) else vt, size)).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_from_every_code(name: str) -> None:
    ours, theirs = (t.view(getattr(m, name)) for m, t in zip((vt, torch), both(np.arange(256, dtype=np.uint8))))  # fmt: skip
    for wide in [*WIDE, "bool", *NAMES]:
        a, b = ours.to(getattr(vt, wide)), theirs.to(getattr(torch, wide))
        nan = theirs.float().isnan().numpy()
        np.testing.assert_array_equal(a.isnan().numpy() if wide != "bool" else nan, nan)
        np.testing.assert_array_equal(bits(a)[~nan], bits(b)[~nan], err_msg=wide)
    assert repr(ours) == repr(theirs)
    for start in range(0, 256, 5):
        assert repr(ours[start : start + 5]) == repr(theirs[start : start + 5])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64", "int64"])
def test_to_codes(name: str, source: str) -> None:
    rng = np.random.default_rng(3)
    if source in ("float16", "bfloat16"):
        pair = both(np.arange(65536, dtype=np.uint16).view(np.int16))
        ours, theirs = (t.view(getattr(m, source)) for m, t in zip((vt, torch), pair))
    elif source == "int64":
        ours, theirs = both(rng.integers(-(2**20), 2**20, 4096))
    else:
        x = rng.integers(0, 2**32, 1 << 18, dtype=np.uint32).view(np.float32)
        usual = rng.standard_normal(1 << 17) * np.exp2(rng.uniform(-20, 17, 1 << 17))
        with np.errstate(invalid="ignore"):
            ours, theirs = both(np.concatenate([x, usual.astype(np.float32)]).astype(source))
    a, b = bits(ours.to(getattr(vt, name))), bits(theirs.to(getattr(torch, name)))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_limits_and_kinds(name: str) -> None:
    ours, theirs = getattr(vt, name), getattr(torch, name)
    for field in ("bits", "max", "min", "eps", "tiny", "smallest_normal", "resolution", "dtype"):
        assert getattr(vt.finfo(ours), field) == getattr(torch.finfo(theirs), field), field
    assert repr(vt.finfo(ours)) == repr(torch.finfo(theirs)) and repr(ours) == repr(theirs)
    for other in ["bool", "int32", *WIDE, *NAMES]:
        a, b = getattr(vt, other), getattr(torch, other)
        assert vt.can_cast(ours, a) == torch.can_cast(theirs, b)
        assert vt.can_cast(a, ours) == torch.can_cast(b, theirs)
        messages = []
        for module, first, second in ((vt, ours, a), (torch, theirs, b)):
            try:
                messages.append(str(module.promote_types(first, second)))
            except RuntimeError as error:
                messages.append(str(error).split(";")[0])
        assert messages[0] == messages[1]
    x, y = vt.ones(2, dtype=ours), torch.ones(2, dtype=theirs)
    assert x.type() == y.type()
    for t in (x, y):
        with pytest.raises(NotImplementedError, match="not implemented for 'Float8_e"):
            t.exp()
        with pytest.raises(TypeError, match="Got unsupported ScalarType Float8_e"):
            t.numpy()


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16", *NAMES])
@pytest.mark.parametrize("by_row", [False, True])
def test_scaled_mm(out: str, by_row: bool) -> None:
    rng = np.random.default_rng(5)
    left, right = (rng.standard_normal(s).astype(np.float32) for s in ((48, 64), (32, 64)))
    scales = [
        rng.uniform(0.5, 2, s if by_row else ()).astype(np.float32) for s in ((48, 1), (1, 32))
    ]
    bias, last = rng.standard_normal(32).astype(np.float32), np.float32(2)
    results = []
    for module in (vt, torch):
        a, b, x, y, c, s = (
            module.as_tensor(np.array(v)) for v in (left, right, *scales, bias, last)
        )
        a, b = a.to(module.float8_e4m3fn), b.to(module.float8_e4m3fn).t()
        got = module._scaled_mm(a, b, x, y, c, s, getattr(module, out))
        assert str(got.dtype) == f"torch.{out}"
        results.append(got.double().numpy())
    step = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10, NAMES[0]: 2**-3, NAMES[1]: 2**-2}
    np.testing.assert_allclose(results[0], results[1], rtol=step[out], atol=1e-3)
