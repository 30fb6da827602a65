"""Pooling over windows."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch.nn.functional.sizes import sizes

_ops = _C._ops


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of (N, C, H, W) or (C, H, W).

    With ``return_indices`` also its int64 flat place in each (H, W) plane.
    """
    if stride is None:
        stride = kernel_size
    if return_indices:
        return _ops.max_pool2d_with_indices(
            input, kernel_size, stride, padding, dilation, ceil_mode
        )
    return _ops.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of (N, C, L) or (C, L), with indices if asked for."""
    if stride is None:
        stride = kernel_size
    if not return_indices:
        return _ops.max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode)
    values, indices = _ops.max_pool2d_with_indices(
        input.unsqueeze(-2),
        (1, _one(kernel_size)),
        (1, _one(stride)),
        (0, _one(padding)),
        (1, _one(dilation)),
        ceil_mode,
    )
    return values.squeeze(-2), indices.squeeze(-2)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The mean of each window of (N, C, H, W) or (C, H, W).

    ``divisor_override`` replaces the number of elements that the sum is divided by.
    """
    arguments = (
        input,
        kernel_size,
        kernel_size if stride is None else stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return _ops.avg_pool2d(*arguments) if out is None else _ops.avg_pool2d(*arguments, out=out)


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window of (N, C, L) or (C, L)."""
    if stride is None:
        stride = kernel_size
    return _ops.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Means over windows chosen so that the result is (…, H', W'); None keeps an extent.

    Raises ValueError for inputs of fewer than three dimensions, RuntimeError unless ``output_size``
    is one number or two.
    """
    if input.dim() < 3:
        raise ValueError(
            f"Input dimension should be at least 3, got {input.dim()} (shape {tuple(input.shape)})"
        )
    if not isinstance(output_size, Integral):
        if len(output_size) != 2:
            raise RuntimeError(
                f"adaptive_avg_pool2d: output_size must be 2 numbers, got {output_size}"
            )
        output_size = [
            extent if n is None else n for extent, n in zip(input.shape[-2:], output_size)
        ]
    size = sizes(output_size, 2)
    return _ops.adaptive_avg_pool2d(input, size)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Means over windows chosen so that the result is (…, L')."""
    return _ops.adaptive_avg_pool1d(input, output_size)


def _one(value: Any) -> int:
    """The only number of a 1-d setting, which may come as a tuple."""
    numbers = sizes(value, 1)
    if len(numbers) != 1:
        raise RuntimeError(f"max_pool1d: a setting of one dimension is one int, got {value}")
    return numbers[0]
