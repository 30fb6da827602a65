"""Training with products of 8-bit floats, under torchao.float8's names.

``convert_to_float8_training(model)`` makes the `Linear` layers of a model multiply in FP8. Parameters,
activations and gradients stay in their dtype; each operand of a product is scaled as a whole, by the
largest magnitude it has at that moment, and rounded to 8 bits: inputs and weights to float8_e4m3fn,
gradients to float8_e5m2, which trades precision for range. The three products of a layer (the
result, the gradients of its input and of its weight) add up in float32.

    from vibetensor.float8 import convert_to_float8_training
    convert_to_float8_training(model, module_filter_fn=lambda module, name: name != "head")

On a GPU the products need compute capability 8.9 and are fast where all extents (rows of the input,
in_features, out_features) are multiples of 16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import vibetensor.torch as torch
from vibetensor import _C
from vibetensor.torch import Tensor, nn

__all__ = ["Float8Linear", "convert_to_float8_training"]

_LEAST_AMAX = 1e-12  # of a tensor of zeros: the scale stays finite


def _quantize(t: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
    """`t` as 8-bit floats, and the float32 number that scales them back."""
    amax = t.abs().amax().float().clamp(min=_LEAST_AMAX)
    largest = torch.finfo(dtype).max
    return (t.float() * (largest / amax)).to(dtype), amax / largest


class _Float8Product(torch.autograd.Function):
    """x Wᵀ + b of x (rows, in) and W (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x8, x_scale = _quantize(x, torch.float8_e4m3fn)
        weight8, weight_scale = _quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return _C._ops._scaled_mm(
            x8, weight8.t(), x_scale, weight_scale, bias=bias, out_dtype=x.dtype
        )

    @staticmethod
    @torch.autograd.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        grad8, grad_scale = _quantize(grad, torch.float8_e5m2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _C._ops._scaled_mm(grad8, weight8, grad_scale, weight_scale, out_dtype=of_x)
        if ctx.needs_input_grad[1]:
            grad_weight = _C._ops._scaled_mm(
                grad8.t(), x8, grad_scale, x_scale, out_dtype=of_weight
            )
        if of_bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(of_bias)
        return grad_x, grad_weight, grad_bias


class Float8Linear(nn.Linear):
    """A Linear whose products are of 8-bit floats: input (*, in_features), result (*, out_features).

    Input and parameters are float32, bfloat16 or float16, and the result has the input's dtype (that
    of autocast where it is on). Scales follow the values of each call. Only first derivatives exist.
    """

    @classmethod
    def from_float(cls, module: nn.Module) -> Float8Linear:
        """A layer with the parameters, hooks and attributes of `module`, which are shared."""
        made = cls.__new__(cls)
        for name, value in module.__dict__.items():
            made.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        return made

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if input.dtype is torch.float64 or self.weight.dtype is torch.float64:
            raise TypeError(
                f"Float8Linear: expected floats of 32 or 16 bits, got an input of {input.dtype} and a "
                f"weight of {self.weight.dtype}"
            )
        if input.numel() == 0 or self.weight.numel() == 0:  # nothing to scale by
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return nn.functional.linear(input, self.weight.to(input.dtype), bias)
        rows = input.reshape(-1, input.shape[-1])
        result = _Float8Product.apply(rows, self.weight, self.bias)
        return result.reshape(*input.shape[:-1], result.shape[-1])


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Replaces the Linear layers of `module` by Float8Linear, in place, and returns it.

    ``module_filter_fn(layer, name)``, with the layer's dotted name, says which ones (default: all).
    Parameters stay the same objects, so an optimizer made before goes on working. If `module` is
    itself a Linear, its replacement is returned.
    """

    def wanted(layer: nn.Module, name: str) -> bool:
        plain = type(layer) is nn.Linear
        return plain and (module_filter_fn is None or bool(module_filter_fn(layer, name)))

    if wanted(module, ""):
        return Float8Linear.from_float(module)
    made: dict[nn.Module, Float8Linear] = {}  # a layer used in two places stays one
    for prefix, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child in made or wanted(child, f"{prefix}.{name}" if prefix else name):
                if child not in made:
                    made[child] = Float8Linear.from_float(child)
                setattr(parent, name, made[child])
    return module
