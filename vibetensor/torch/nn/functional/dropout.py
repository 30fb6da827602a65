"""Dropout of elements and of whole channels."""

from __future__ import annotations

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zeroes each element with probability ``p`` and scales the rest by 1 / (1 - p)."""
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return _ops.dropout_(input, p, training) if inplace else _ops.dropout(input, p, training)


def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zeroes whole channels of (N, C, L) or (C, L)."""
    return _channels(input, p, training, inplace, 1)


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zeroes whole channels of (N, C, H, W) or (C, H, W)."""
    return _channels(input, p, training, inplace, 2)


def _channels(input: Tensor, p: float, training: bool, inplace: bool, ndim: int) -> Tensor:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if input.dim() not in (ndim + 1, ndim + 2):
        raise RuntimeError(
            f"dropout{ndim}d: expected {ndim + 1}-d or {ndim + 2}-d input, got {tuple(input.shape)}"
        )
    if not training or p == 0.0:
        return input
    kept = tuple(input.shape[:-ndim]) + (1,) * ndim
    mask = _ops.dropout(_ops.ones(kept, dtype=input.dtype, device=input.device), p, True)
    return input.mul_(mask) if inplace else input * mask
