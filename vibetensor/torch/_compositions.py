"""Functions that are a few ops in a row: the ops do the work and carry the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch._tensor import check_tensor, written

_ops = _C._ops


def _wrapped(dim: int, dims: int) -> int:
    """`dim` counted from the front. IndexError unless it is one of `dims` dimensions."""
    most = max(dims, 1)
    if not -most <= dim < most:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-most}, {most - 1}], but got {dim})"
        )
    return dim % most


def diag(input: Tensor, diagonal: int = 0, *, out: Tensor | None = None) -> Tensor:
    """Of a vector the matrix that has it on a diagonal and zeros elsewhere, of a matrix a copy of its
    diagonal: the main one, or the one `diagonal` places above (below, if negative)."""
    check_tensor("diag", "input", input)
    if input.dim() == 1:
        return written(diag_embed(input, diagonal), out)
    if input.dim() != 2:
        raise RuntimeError(f"diag(): expected 1 or 2 dimensions, got shape {tuple(input.shape)}")
    return written(input.diagonal(diagonal).clone(), out)


def diag_embed(input: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    """Matrices, in dimensions dim1 and dim2 of the result, with the last dimension of `input` on the
    diagonal that lies `offset` places above the main one, and zeros elsewhere."""
    check_tensor("diag_embed", "input", input)
    if not isinstance(offset, int):
        raise TypeError(f"diag_embed(): argument 'offset' must be int, not {type(offset).__name__}")
    dims = input.dim() + 1
    first, second = _wrapped(dim1, dims), _wrapped(dim2, dims)
    if first == second:
        raise RuntimeError(f"diag_embed(): dim1 and dim2 are the same dimension: {dim1}, {dim2}")
    *shape, length = input.shape
    for dim in sorted((first, second)):
        shape.insert(dim, length + abs(offset))
    zeros = _ops.zeros(shape, dtype=input.dtype, device=input.device)
    return _ops.diagonal_scatter(zeros, input, offset, first, second)


def fill_diagonal_(self: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """Writes a number on the main diagonal, in place. `wrap`: in a matrix with more rows than columns
    the diagonal starts again, one row after it ended."""
    dims = self.dim()
    if dims < 2:
        raise RuntimeError(f"fill_diagonal_(): expected 2 dimensions or more, got {dims}")
    if dims > 2 and len(set(self.shape)) != 1:
        raise RuntimeError(
            f"fill_diagonal_(): all dimensions must be of equal length, got shape {tuple(self.shape)}"
        )
    scalar = isinstance(fill_value, Tensor) and fill_value.dim() == 0
    if not scalar and not isinstance(fill_value, Number):
        given = type(fill_value).__name__
        raise TypeError(f"fill_diagonal_(): argument 'fill_value' must be Number, not {given}")
    if self.numel() == 0:
        return self
    rows, columns = self.shape[:2]
    if dims > 2 or not wrap or rows <= columns:
        index = _ops.arange(min(rows, columns), device=self.device)
        self[(index,) * dims] = fill_value
    else:
        place = _ops.arange(0, rows * columns, columns + 1, device=self.device)
        self[place // columns, place % columns] = fill_value
    return self


def cross(
    input: Tensor, other: Tensor, dim: int | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The cross product of vectors along `dim`, whose size is 3; by default the first such dimension.
    The other dimensions broadcast."""
    check_tensor("cross", "input", input)
    check_tensor("cross", "other", other)
    shapes = f"shapes {tuple(input.shape)} and {tuple(other.shape)}"
    if input.dim() != other.dim():
        raise RuntimeError(f"cross: inputs must have the same number of dimensions, got {shapes}")
    if input.dtype is not other.dtype:
        raise RuntimeError(
            f"cross: inputs must have one dtype, got {input.dtype} and {other.dtype}"
        )
    if input.dtype is _C.bool:
        raise NotImplementedError("cross is not implemented for bool tensors")
    if dim is None:
        if 3 not in input.shape:
            raise RuntimeError(f"cross: no dimension of size 3 in {shapes}")
        along = tuple(input.shape).index(3)
    else:
        along = _wrapped(dim, input.dim())
    if input.dim() == 0 or input.shape[along] != 3 or other.shape[along] != 3:
        raise RuntimeError(f"cross: dimension {along} must have size 3, got {shapes}")
    a, b = _ops._broadcast_tensors([input, other])
    # Component i of the product is a[i+1] b[i+2] - a[i+2] b[i+1].
    result = a.roll(-1, along) * b.roll(-2, along) - a.roll(-2, along) * b.roll(-1, along)
    return written(result, out)


def kron(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Kronecker's product: `other` as often as `input` has elements, each time multiplied by one.
    The sizes multiply; missing dimensions come first and have size 1."""
    check_tensor("kron", "input", input)
    check_tensor("kron", "other", other)
    dims = max(input.dim(), other.dim())
    a, b = ((1,) * (dims - t.dim()) + tuple(t.shape) for t in (input, other))
    blocks = input.reshape([size for n in a for size in (n, 1)])
    tiles = other.reshape([size for n in b for size in (1, n)])
    return written((blocks * tiles).reshape([m * n for m, n in zip(a, b)]), out)


def quantile(
    input: Tensor,
    q: Any,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
    out: Tensor | None = None,
) -> Tensor:
    """The q-th quantiles, along `dim` or of all elements, of float32 or float64; NaN where one is NaN.

    `q` is a number in [0, 1] or a tensor of no or one dimension and the input's dtype; one of one
    dimension gives the result a first dimension. `interpolation`, of a place between two elements, is
    "linear", "lower", "higher", "midpoint" or "nearest".
    """
    return written(_quantile("quantile", input, q, dim, keepdim, interpolation, False), out)


def nanquantile(
    input: Tensor,
    q: Any,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
    out: Tensor | None = None,
) -> Tensor:
    """As `quantile`, of the elements that are not NaN; NaN where all are."""
    return written(_quantile("nanquantile", input, q, dim, keepdim, interpolation, True), out)


_INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")
_LONGEST = 2**24  # float32 has no larger whole numbers next to each other


def _quantile(
    name: str, input: Tensor, q: Any, dim: int | None, keepdim: bool, interpolation: str,
    skip_nan: bool,
) -> Tensor:  # fmt: skip
    check_tensor(name, "input", input)
    if input.dtype not in (_C.float32, _C.float64):
        raise RuntimeError(f"{name}() takes float32 or float64, got {input.dtype}")
    if input.numel() == 0:
        raise RuntimeError(f"{name}() input must not be empty, got shape {tuple(input.shape)}")
    if interpolation not in _INTERPOLATIONS:
        raise RuntimeError(
            f"{name}() interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {interpolation}"
        )
    q = _places(name, q, input)
    along = None if dim is None else _wrapped(dim, input.dim())
    if along is None or input.dim() == 0:
        rows = input.reshape(-1)
        kept = [1] * input.dim()
    else:
        rows = input.movedim(along, -1)
        kept = [1 if d == along else n for d, n in enumerate(input.shape)]
    if rows.shape[-1] > _LONGEST:
        raise RuntimeError(f"{name}() takes at most {_LONGEST} elements, got {rows.shape[-1]}")

    missing = rows.isnan()
    ordered = rows.sort(-1).values  # NaN comes last
    if skip_nan:
        last = ((~missing).sum(-1, keepdim=True) - 1).clamp(min=0)  # of no elements: a NaN
        ranks = q * last
    else:
        last = rows.shape[-1] - 1
        # A row with NaN is read at its end, where one is.
        ranks = _ops.where(missing.any(-1, keepdim=True), float(last), q * last)
    if interpolation in ("lower", "higher", "nearest"):
        step = {"lower": "floor", "higher": "ceil", "nearest": "round"}[interpolation]
        found = ordered.gather(-1, getattr(ranks, step)().long())
    else:
        below = ranks.long()
        weight = ranks - below if interpolation == "linear" else _ops.full_like(ranks, 0.5)
        found = _ops.lerp(
            ordered.gather(-1, below), ordered.gather(-1, ranks.ceil().long()), weight
        )

    result = found.movedim(-1, 0)  # one result for each of q
    if keepdim:
        result = result.reshape(-1, *kept)
    return result.squeeze(0) if q.dim() == 0 else result


def _places(name: str, q: Any, input: Tensor) -> Tensor:
    """`q` as a tensor like `input`."""
    if not isinstance(q, Tensor):
        if isinstance(q, bool) or not isinstance(q, (int, float)):
            raise TypeError(
                f"{name}(): argument 'q' must be float or Tensor, not {type(q).__name__}"
            )
        if not 0 <= q <= 1:
            raise RuntimeError(f"{name}() q must be in the range [0, 1], got {q}")
        return _ops.full((), q, dtype=input.dtype, device=input.device)
    if q.dim() > 1:
        raise RuntimeError(f"{name}() q must have no or one dimension, got shape {tuple(q.shape)}")
    if q.dtype is not input.dtype or q.device != input.device:
        raise RuntimeError(
            f"{name}() q must be {input.dtype} on {input.device} as the input is, got {q.dtype} on "
            f"{q.device}"
        )
    if q.device.type == "cpu" and not bool(((q >= 0) & (q <= 1)).all()):
        raise RuntimeError(f"{name}() q values must be in the range [0, 1]")
    return q


for _function in (diag, diag_embed, fill_diagonal_, cross, kron, quantile, nanquantile):
    setattr(Tensor, _function.__name__, _function)

__all__: Sequence[str] = [
    "cross",
    "diag",
    "diag_embed",
    "kron",
    "nanquantile",
    "quantile",
]
