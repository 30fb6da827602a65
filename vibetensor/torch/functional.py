"""Dtype queries: finfo, iinfo, promotion."""

from __future__ import annotations

from typing import Any

from vibetensor import _C

_FLOATS = {
    # bits, eps, max, smallest normal, smallest subnormal, decimal digits
    "float64": (64, 2.0**-52, 1.7976931348623157e308, 2.0**-1022, 5e-324, 1e-15),
    "float32": (32, 2.0**-23, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, 1e-6),
    "float16": (16, 2.0**-10, 65504.0, 2.0**-14, 2.0**-24, 1e-3),
    "bfloat16": (16, 2.0**-7, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 1e-2),
    "float8_e4m3fn": (8, 2.0**-3, 448.0, 2.0**-6, 2.0**-9, 1.0),
    "float8_e5m2": (8, 2.0**-2, 57344.0, 2.0**-14, 2.0**-16, 1.0),
}
_BITS = {
    "uint8": (8, False),
    "int8": (8, True),
    "int16": (16, True),
    "int32": (32, True),
    "int64": (64, True),
}
_FLOAT8 = (_C.float8_e4m3fn, _C.float8_e5m2)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class finfo:
    """Limits of a floating dtype: bits, eps, max, min, tiny, smallest_normal, resolution."""

    def __init__(self, dtype: Any = None) -> None:
        name = _name(dtype if dtype is not None else _C.get_default_dtype())
        if name not in _FLOATS:
            raise TypeError(
                f"torch.finfo() requires a floating point input type. Use torch.iinfo to handle '{name}'"
            )
        self.dtype = name
        self.bits, self.eps, self.max, self.tiny, self.smallest_subnormal, self.resolution = (
            _FLOATS[name]
        )
        self.min = -self.max
        self.smallest_normal = self.tiny

    def __repr__(self) -> str:
        return (
            f"finfo(resolution={self.resolution:g}, min={self.min:g}, max={self.max:g}, eps={self.eps:g}, "
            f"smallest_normal={self.tiny:g}, tiny={self.tiny:g}, dtype={self.dtype})"
        )


class iinfo:
    """Limits of an integer dtype: bits, max, min."""

    def __init__(self, dtype: Any) -> None:
        name = _name(dtype)
        if name not in _BITS:
            raise TypeError(
                f"torch.iinfo() requires an integer input type. Use torch.finfo to handle '{name}'"
            )
        self.dtype = name
        self.bits, signed = _BITS[name]
        self.max = 2 ** (self.bits - signed) - 1
        self.min = -(2 ** (self.bits - 1)) if signed else 0

    def __repr__(self) -> str:
        return f"iinfo(min={self.min:g}, max={self.max:g}, dtype={self.dtype})"


def promote_types(type1: Any, type2: Any) -> Any:
    """The smallest dtype to which both convert safely."""
    return result_type(*(_C._ops.empty((1,), dtype=t, device="cpu") for t in (type1, type2)))


def result_type(tensor1: Any, tensor2: Any) -> Any:
    """The dtype an op over these two (tensors or Python numbers) would give."""
    first, second = _probe(tensor1), _probe(tensor2)
    narrow = [t for t in (first, second) if isinstance(t, _C.Tensor) and t.dtype in _FLOAT8]
    if narrow:  # they have no sums
        chosen = _C.tensor(True, device=narrow[0].device)
        return _C._ops.where(chosen, first, second).dtype
    return (first + second).dtype


def _probe(value: Any) -> Any:
    """An empty-handed stand-in that promotes like `value`; numbers stay numbers."""
    if not isinstance(value, _C.Tensor):
        return value if not isinstance(value, bool) else _C.tensor(value, device="cpu")
    return value.detach()[..., :0] if value.dim() else value.detach()


def can_cast(from_: Any, to: Any) -> bool:
    """False for conversions that lose the kind: float to integer, anything to bool."""
    order = {"bool": 0, "uint8": 1, "int8": 1, "int16": 1, "int32": 1, "int64": 1}
    return order.get(_name(from_), 2) <= order.get(_name(to), 2)
