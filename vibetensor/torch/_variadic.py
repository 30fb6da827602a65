"""Functions whose number of arguments or results varies: they pick ops, the ops do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch._tensor import check_tensor

_ops = _C._ops


def _listed(function: str, tensors: tuple[Any, ...]) -> list[Tensor]:
    """`f(a, b)` and `f([a, b])` mean the same."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}() takes tensors, number {i} is {type(tensor).__name__}")
    return list(tensors)


def _results(values: Tensor, inverse: Tensor, counts: Tensor, want: tuple[bool, bool]) -> Any:
    if not any(want):
        return values
    return (values, *(t for t, wanted in zip((inverse, counts), want) if wanted))


def unique(
    input: Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    """The distinct elements in ascending order, with (int64, on request) the index of each input
    element among them and how often each occurs. With `dim`, slices are compared instead."""
    check_tensor("unique", "input", input)
    if dim is not None:
        return _unique_slices(input, dim, return_inverse, return_counts)
    values, inverse, counts = _ops._unique(input)
    return _results(values, inverse, counts, (return_inverse, return_counts))


def _unique_slices(input: Tensor, dim: int, return_inverse: bool, return_counts: bool) -> Any:
    """The distinct slices along `dim`, in lexicographic order."""
    rows = _rows(input, dim)
    # A stable sort by each column, last to first, sorts the rows.
    order = _ops.arange(rows.shape[0], device=rows.device)
    for column in range(rows.shape[1] - 1, -1, -1):
        order = order[rows[order, column].argsort(stable=True)]
    fresh = _starts(rows[order])
    labels = fresh.cumsum(0) - 1
    inverse = _ops.zeros(rows.shape[0], dtype=_C.int64, device=rows.device)
    inverse[order] = labels
    values = input.index_select(dim, order[fresh])
    return _results(values, inverse, _ops.bincount(labels), (return_inverse, return_counts))


def _rows(input: Tensor, dim: int) -> Tensor:
    """The slices along `dim` as the rows of a matrix."""
    moved = input.movedim(dim, 0)
    return moved.reshape(moved.shape[0], moved[:1].numel())


def _starts(rows: Tensor) -> Tensor:
    """Which rows differ from the one before (the first does)."""
    fresh = _ops.ones(rows.shape[0], dtype=_C.bool, device=rows.device)
    if rows.shape[0] > 1:
        fresh[1:] = (rows[1:] != rows[:-1]).any(1)
    return fresh


def unique_consecutive(
    input: Tensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    """As `unique`, but only neighbours are compared and the order is kept."""
    check_tensor("unique_consecutive", "input", input)
    if dim is not None:
        fresh = _starts(_rows(input, dim))
        labels = fresh.cumsum(0) - 1
        values = input.index_select(dim, fresh.nonzero().reshape(-1))
        return _results(values, labels, _ops.bincount(labels), (return_inverse, return_counts))
    values, inverse, counts = _ops._unique_consecutive(input)
    return _results(values, inverse, counts, (return_inverse, return_counts))


def nonzero(input: Tensor, *, out: Tensor | None = None, as_tuple: bool = False) -> Any:
    """Positions of the elements that are not zero: int64 [n, ndim], or one [n] per dimension."""
    check_tensor("nonzero", "input", input)
    if not as_tuple:
        return _ops._nonzero(input) if out is None else _ops._nonzero(input, out=out)
    return _ops._nonzero(input.unsqueeze(0) if input.dim() == 0 else input).unbind(1)


def where(condition: Tensor, *values: Any, **named: Any) -> Any:
    """`where(c, a, b)`: a where c holds, else b. `where(c)`: nonzero(c, as_tuple=True)."""
    check_tensor("where", "condition", condition)
    if not values and not named:
        return nonzero(condition, as_tuple=True)
    if "input" in named:
        named["self"] = named.pop("input")
    return _ops.where(condition, *values, **named)


def einsum(equation: str, *operands: Any) -> Tensor:
    """Sums of products in Einstein's notation: einsum("bij,bjk->bik", a, b)."""
    return _ops.einsum(equation, _listed("einsum", operands))


def chain_matmul(*matrices: Any, out: Tensor | None = None) -> Tensor:
    """The product of one or more matrices, from left to right. RuntimeError if one is not 2-d."""
    return _ops.chain_matmul(_listed("chain_matmul", matrices), out=out)


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Tensor:
    """Contracts the last `dims` dimensions of a with the first of b, or the pairs in two lists."""
    if isinstance(dims, int):
        left, right = list(range(-dims, 0)), list(range(dims))
    else:
        left, right = (list(d) if isinstance(d, (list, tuple)) else [int(d)] for d in dims)
    result = _ops._tensordot(a, b, left, right)
    return result if out is None else out.resize_(tuple(result.shape)).copy_(result)


def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Tensor, ...]:
    """Coordinate grids of 0-d and 1-d tensors, with rows first ("ij") or columns first ("xy")."""
    return tuple(_ops._meshgrid(_listed("meshgrid", tensors), indexing=indexing))


def broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    """Every tensor expanded to their common shape."""
    return tuple(_ops._broadcast_tensors(_listed("broadcast_tensors", tensors)))


def broadcast_shapes(*shapes: Any) -> Any:
    """The shape that tensors of these shapes broadcast to. RuntimeError if there is none."""
    out: list[int] = []
    for shape in shapes:
        sizes = [shape] if isinstance(shape, int) else list(shape)
        out = [1] * (len(sizes) - len(out)) + out
        for i, size in enumerate(sizes, len(out) - len(sizes)):
            if size not in (out[i], 1) and out[i] != 1:
                raise RuntimeError(f"broadcast_shapes: {shapes} do not broadcast to one shape")
            out[i] = size if out[i] == 1 else out[i]
    return _C.Size(out)


def cartesian_prod(*tensors: Any) -> Tensor:
    """Every combination of the elements of 1-d tensors: [product of lengths, number of tensors]."""
    given = _listed("cartesian_prod", tensors)
    if len(given) == 1:
        return given[0]
    return _ops.stack([grid.reshape(-1) for grid in meshgrid(*given)], 1)


def block_diag(*tensors: Any) -> Tensor:
    """Matrices along the diagonal, zeros elsewhere; 0-d and 1-d tensors count as one row."""
    blocks = [t.reshape(1, -1) if t.dim() < 2 else t for t in _listed("block_diag", tensors)]
    for i, block in enumerate(blocks):
        if block.dim() > 2:
            raise RuntimeError(
                f"block_diag: tensors must have at most 2 dimensions, number {i} has {block.dim()}"
            )
    if not blocks:
        return _ops.empty((1, 0))
    width = sum(b.shape[1] for b in blocks)
    rows, left = [], 0
    for b in blocks:
        rows.append(_ops.constant_pad_nd(b, [left, width - left - b.shape[1]]))
        left += b.shape[1]
    return _ops.cat(rows, 0)


def _at_least(function: str, tensors: tuple[Any, ...], dims: int) -> Any:
    def lift(t: Tensor) -> Tensor:
        if t.dim() == 0:
            t = t.reshape(1)
        if dims >= 2 and t.dim() == 1:
            t = t.unsqueeze(0)
        if dims == 3 and t.dim() == 2:
            t = t.unsqueeze(-1)
        return t

    if len(tensors) == 1 and isinstance(tensors[0], Tensor):
        return lift(tensors[0])
    return tuple(lift(t) for t in _listed(function, tensors))


def atleast_1d(*tensors: Any) -> Any:
    """A view with one dimension or more of a tensor, or of each of several."""
    return _at_least("atleast_1d", tensors, 1)


def atleast_2d(*tensors: Any) -> Any:
    """A view with two dimensions or more of a tensor, or of each of several."""
    return _at_least("atleast_2d", tensors, 2)


def atleast_3d(*tensors: Any) -> Any:
    """A view with three dimensions or more of a tensor, or of each of several."""
    return _at_least("atleast_3d", tensors, 3)


def repeat_interleave(*args: Any, **named: Any) -> Tensor:
    """`repeat_interleave(x, repeats, dim=None, output_size=None)`: each element, or slice along `dim`,
    `repeats` times. `repeat_interleave(repeats)`: i `repeats[i]` times, in the dtype of `repeats`."""
    given = len(args) + sum(name in named for name in ("input", "self", "repeats"))
    if given != 1 or named.keys() - {"repeats", "output_size"}:
        return _ops.repeat_interleave(*args, **named)
    repeats = args[0] if args else named["repeats"]
    check_tensor("repeat_interleave", "repeats", repeats)
    if repeats.dim() != 1:
        raise RuntimeError(
            f"repeat_interleave: repeats must have one dimension, got shape {tuple(repeats.shape)}"
        )
    if repeats.dtype not in (_C.int64, _C.int32):
        raise NotImplementedError(
            f"repeat_interleave: repeats must be int64 or int32, got {repeats.dtype}"
        )
    count = repeats.shape[0]
    index = _ops.arange(count, dtype=repeats.dtype, device=repeats.device)
    return _ops.repeat_interleave(index, repeats, 0, output_size=named.get("output_size"))


def _where_method(self: Tensor, condition: Tensor, other: Any) -> Tensor:
    """self where `condition` holds, else `other`."""
    return _ops.where(condition, self, other)


for _function in (unique, unique_consecutive, nonzero):
    setattr(Tensor, _function.__name__, _function)
Tensor.where = _where_method

__all__: Sequence[str] = [
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "block_diag",
    "broadcast_shapes",
    "broadcast_tensors",
    "cartesian_prod",
    "einsum",
    "meshgrid",
    "nonzero",
    "repeat_interleave",
    "tensordot",
    "unique",
    "unique_consecutive",
    "where",
]
