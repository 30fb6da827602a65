"""Plain updates whose factors are 0-d tensors: what a recording has in place of Python's numbers.

Each gives the bits of the op that takes the factor as a number.
"""

from __future__ import annotations

from typing import Any

import vibetensor.torch as torch


def flat(tensor: Any) -> Any:
    """With a dimension at least: beside that a 0-d float64 tensor is as weak as a number is."""
    return tensor if tensor.dim() else tensor.view(1)


def add_scaled(param: Any, value: Any, factor: Any, divisor: Any = None) -> None:
    """``param.add_(value, alpha=factor)``, or with a divisor ``param.addcdiv_(value, divisor,
    value=factor)``, for a factor (0-d, float64 unless it belongs to tensor betas) on the device."""
    if not isinstance(factor, torch.Tensor):
        if divisor is None:
            param.add_(value, alpha=factor)
        else:
            param.addcdiv_(value, divisor, value=factor)
        return
    param, value = flat(param), flat(value)
    # Those ops compute 16-bit floats in float32 and round once.
    narrow = param.dtype in (torch.bfloat16, torch.float16)
    target = param.float() if narrow else param
    if narrow:
        value = value.float()
        divisor = None if divisor is None else divisor.float()
    if divisor is not None:
        value = value / divisor
    target.addcmul_(value, factor)
    if narrow:
        param.copy_(target)


def as_number(rate: Any, other: Any) -> Any:
    """A rate that a recording has made a tensor of, ready for arithmetic with ``other`` (0-d) as
    the number it stands for: that would not widen the result."""
    return rate.to(other.dtype) if getattr(rate, "stands_for_number", False) else rate


def bias_corrections(beta1: Any, beta2: Any, step: Any) -> tuple[Any, Any]:
    """``1 - beta1**step`` and the root of ``1 - beta2**step``, as 0-d tensors: of float64 for
    numbers, as Python computes them, and of the betas' dtype for tensors."""
    if isinstance(beta1, torch.Tensor):
        return 1 - beta1**step, (1 - beta2**step) ** 0.5
    betas = torch.tensor([beta1, beta2], dtype=torch.float64, device=step.device)
    # One exponent for all would be taken for a number, and small ones are products then.
    exponents = torch.zeros(2, dtype=torch.float64, device=step.device) + step
    corrections = 1 - betas**exponents
    return corrections[0], corrections[1].sqrt()
