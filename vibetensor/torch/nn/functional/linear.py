"""Affine maps and table look-ups."""

from __future__ import annotations

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch._tensor import written

_ops = _C._ops


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b: input (*, in), weight (out, in) and bias (out,) or () give (*, out); weight (in,)
    and bias () give (*)."""
    if weight.dim() != 1 and (bias is None or bias.dim() != 0):
        if out is not None:
            return _ops.linear(input, weight, bias, out=out)
        return _ops.linear(input, weight, bias)
    if weight.dim() != 1:
        result = _ops.linear(input, weight)
    elif bias is None or bias.dim() == 0:
        result = _ops.matmul(input, weight)
    else:
        raise RuntimeError(
            f"linear: a weight of shape {tuple(weight.shape)} takes a bias of shape (), got "
            f"{tuple(bias.shape)}"
        )
    result = result if bias is None else result + bias
    return written(result, out)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x1ᵀ W x2 + b: inputs (*, in1) and (*, in2), weight (out, in1, in2), result (*, out)."""
    return _ops.bilinear(input1, input2, weight, bias)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight`` (num, dim) at integer indices (*): the result is (*, dim).

    ``padding_idx``'s row gets no gradient. ``max_norm`` first scales the rows that are used down
    to that norm, in place. Raises NotImplementedError for ``sparse`` and IndexError for indices
    out of range.
    """
    if sparse:
        raise NotImplementedError(
            "embedding: sparse gradients are not supported; use sparse=False (dense gradients)"
        )
    if padding_idx is None:
        padding_idx = -1
    else:
        rows = weight.shape[0]
        if not -rows <= padding_idx < rows:
            raise AssertionError("Padding_idx must be within num_embeddings")
        padding_idx %= rows
    if max_norm is not None:
        _renormalise(weight, input, max_norm, norm_type)
    return _ops.embedding(weight, input, padding_idx, scale_grad_by_freq, False)


def _renormalise(weight: Tensor, input: Tensor, max_norm: float, norm_type: float) -> None:
    before = _C.is_grad_enabled()
    _C._set_grad_enabled(False)
    try:
        rows = _ops._unique(input.reshape(-1))[0]
        used = weight.index_select(0, rows)
        norms = used.norm(norm_type, 1, True)
        scale = _ops.where(norms > max_norm, max_norm / (norms + 1e-7), _ops.ones_like(norms))
        weight[rows] = used * scale
    finally:
        _C._set_grad_enabled(before)


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """int64 class indices (*) as 0/1 rows (*, num_classes); -1 takes the largest index plus 1."""
    return _ops.one_hot(tensor, num_classes)
