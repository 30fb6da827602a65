"""torch.autograd: backward, grad, Function, hooks, grad modes and gradient checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vibetensor import _C
from vibetensor.torch.autograd import graph as graph
from vibetensor.torch.autograd.anomaly_mode import detect_anomaly, set_detect_anomaly
from vibetensor.torch.autograd.function import Function, FunctionCtx, once_differentiable
from vibetensor.torch.autograd.grad_mode import (
    enable_grad,
    inference_mode,
    no_grad,
    set_grad_enabled,
)

Variable = _C.Tensor

__all__ = [
    "Function",
    "FunctionCtx",
    "Variable",
    "backward",
    "detect_anomaly",
    "enable_grad",
    "grad",
    "gradcheck",
    "gradgradcheck",
    "graph",
    "inference_mode",
    "no_grad",
    "once_differentiable",
    "set_detect_anomaly",
    "set_grad_enabled",
]


def _tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, _C.Tensor) else tuple(value)


def _gradients(outputs: tuple[Any, ...], grads: Any) -> tuple[Any, ...]:
    given = _tuple(grads) or (None,) * len(outputs)
    if len(given) != len(outputs):
        raise RuntimeError(f"got {len(outputs)} tensors and {len(given)} gradients")
    return given


def backward(
    tensors: _C.Tensor | Sequence[_C.Tensor],
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """Adds the gradients of `tensors` to the leaves' .grad (to `inputs` only, if given).

    `grad_tensors` match `tensors` in shape; None stands for ones and is allowed for single elements.
    Raises RuntimeError for a tensor without history or a graph that was freed.
    """
    if tensors is None:
        raise TypeError("backward: expected a Tensor or a sequence of Tensors, got None")
    outputs = _tuple(tensors)
    if inputs is not None and len(_tuple(inputs)) == 0:
        raise RuntimeError("`inputs` argument to `backward()` cannot be empty.")
    keep = create_graph if retain_graph is None else retain_graph
    grads = _gradients(outputs, grad_tensors if grad_variables is None else grad_variables)
    _C._backward(outputs, grads, bool(keep), bool(create_graph), _tuple(inputs) or None)


def grad(
    outputs: _C.Tensor | Sequence[_C.Tensor],
    inputs: _C.Tensor | Sequence[_C.Tensor],
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """The gradients of `outputs` with respect to `inputs`, as a tuple.

    An input that the outputs do not depend on raises RuntimeError, unless `allow_unused` (then its
    gradient is None) or `materialize_grads` (then zeros).
    """
    if is_grads_batched:
        raise NotImplementedError(
            "grad: is_grads_batched is not supported; call grad() once per row of grad_outputs"
        )
    if not only_inputs:
        raise ValueError("grad: only_inputs=False is not supported")
    if materialize_grads and allow_unused is False:
        raise ValueError(
            "Expected allow_unused to be True or not passed when materialize_grads=True, but got: allow_unused=False."
        )
    allow = materialize_grads if allow_unused is None else allow_unused
    roots, wanted = _tuple(outputs), _tuple(inputs)
    keep = create_graph if retain_graph is None else retain_graph
    found = _C._grad(
        roots, _gradients(roots, grad_outputs), wanted, bool(keep), bool(create_graph), bool(allow)
    )
    if materialize_grads:
        found = tuple(
            _C._ops.zeros_like(x).requires_grad_(bool(create_graph)) if g is None else g
            for g, x in zip(found, wanted)
        )
    return found


def gradcheck(*args: Any, **kwargs: Any) -> bool:
    """Compares analytical with numerical gradients; see vibetensor.torch.autograd.gradient_check."""
    from vibetensor.torch.autograd.gradient_check import gradcheck as check

    return check(*args, **kwargs)


def gradgradcheck(*args: Any, **kwargs: Any) -> bool:
    """gradcheck of the gradient function; see vibetensor.torch.autograd.gradient_check."""
    from vibetensor.torch.autograd.gradient_check import gradgradcheck as check

    return check(*args, **kwargs)
