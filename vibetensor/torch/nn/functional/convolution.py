"""Convolutions and padding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch.nn.functional.sizes import sizes

_ops = _C._ops


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation: input (N, C, L) or (C, L), weight (out, C / groups, k).

    ``padding`` is a number or "valid" or "same" (which needs stride 1).
    """
    if isinstance(padding, str):
        input, padding = _named_padding(input, weight, stride, padding, dilation, 1)
    return _ops.conv1d(input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation: input (N, C, H, W) or (C, H, W), weight (out, C / groups, kH, kW).

    ``padding`` is one or two numbers or "valid" or "same" (which needs stride 1).
    """
    if isinstance(padding, str):
        input, padding = _named_padding(input, weight, stride, padding, dilation, 2)
    return _ops.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation: input (N, C, D, H, W) or (C, D, H, W), weight
    (out, C / groups, kD, kH, kW).

    ``padding`` is one or three numbers or "valid" or "same" (which needs stride 1).
    """
    if isinstance(padding, str):
        input, padding = _named_padding(input, weight, stride, padding, dilation, 3)
    return _ops.conv3d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """The gradient of conv1d as a layer: input (N, C, L) or (C, L), weight (C, out / groups, k)."""
    return _ops.conv_transpose1d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """The gradient of conv2d as a layer: input (N, C, H, W) or (C, H, W), weight
    (C, out / groups, kH, kW)."""
    return _ops.conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def unfold(
    input: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor:
    """The windows of (N, C, H, W) as columns: (N, C * kH * kW, windows)."""
    return _ops.im2col(input, kernel_size, dilation, padding, stride)


def fold(
    input: Tensor,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Tensor:
    """Adds columns (N, C * kH * kW, windows) up in their windows of (N, C, *output_size)."""
    return _ops.col2im(input, output_size, kernel_size, dilation, padding, stride)


def _named_padding(
    input: Tensor, weight: Tensor, stride: Any, padding: str, dilation: Any, ndim: int
) -> tuple[Tensor, Any]:
    """ "valid" and "same" as numbers; where "same" is lopsided, one side is padded beforehand."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    if any(s != 1 for s in sizes(stride, ndim)):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    dilations = sizes(dilation, ndim)
    if len(dilations) == 1:
        dilations *= ndim
    total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:])]
    extra = [t % 2 for t in total]
    if any(extra):
        warnings.warn(
            "Using padding='same' where kernel and dilation make the padding odd copies the input "
            "first, with one more zero at the end.",
            stacklevel=3,
        )
        # The odd element goes to the end of its dimension.
        input = pad(input, [n for e in reversed(extra) for n in (0, e)])
    return input, tuple(t // 2 for t in total)


def pad(
    input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """Grows (or, where negative, shrinks) the last dimensions: pairs (before, after), last first.

    ``mode`` is constant, reflect, replicate or circular; the last three pad the spatial
    dimensions of (N, C, …) or (C, …) inputs.
    """
    return _ops.pad(input, tuple(pad), mode, value)
