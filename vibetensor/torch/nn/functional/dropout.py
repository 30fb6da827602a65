"""Dropout of elements and of whole channels."""

from __future__ import annotations

import warnings

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zeroes each element with probability ``p`` and scales the rest by 1 / (1 - p)."""
    _check_probability(p)
    return _ops.dropout_(input, p, training) if inplace else _ops.dropout(input, p, training)


def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zeroes whole channels of (N, C, L) or (C, L)."""
    _check_probability(p)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: expected a 2-d or 3-d input, (N, C, L) or (C, L), got {tuple(input.shape)}"
        )
    return _channels(input, p, training, inplace, input.dim() - 1)


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Zeroes whole channels of (N, C, H, W).

    Inputs of other dimensions are read as (N, C, …) too, with a warning: (C, H, W) is not a form
    of its own.
    """
    _check_probability(p)
    if input.dim() == 3:
        warnings.warn(
            f"dropout2d: a 3-d input is read as (N, C, L), got {tuple(input.shape)}; use dropout1d "
            "for it, and give (C, H, W) a batch dimension.",
            stacklevel=2,
        )
    elif input.dim() != 4:
        warnings.warn(
            f"dropout2d: expected a 4-d input (N, C, H, W), got {tuple(input.shape)}; other "
            "dimensions are deprecated.",
            stacklevel=2,
        )
    return _channels(input, p, training, inplace, 2)


def _check_probability(p: float) -> None:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _channels(input: Tensor, p: float, training: bool, inplace: bool, leading: int) -> Tensor:
    """Zeroes whole slices, one for each index of the ``leading`` dimensions."""
    if not training or p == 0.0:
        return input
    if input.dim() < leading and p < 1.0:
        raise RuntimeError(
            f"dropout of channels needs at least {leading} dimensions, got {tuple(input.shape)}"
        )
    kept = tuple(input.shape[:leading]) + (1,) * (input.dim() - leading)
    mask = _ops.dropout(_ops.ones(kept, dtype=input.dtype, device=input.device), p, True)
    return input.mul_(mask) if inplace else input * mask
