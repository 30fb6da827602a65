"""Gradient clipping. Nothing here waits for the device, except where a check asks for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops


def _list(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Any]:
    return [p.grad for p in _list(parameters) if p.grad is not None]


def _groups(tensors: list[Any]) -> list[list[Any]]:
    """The tensors by device and dtype: what one multi-tensor op can take."""
    groups: dict[tuple[Any, Any], list[Any]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _norms(tensors: list[Any], order: float) -> list[Any]:
    """Norms whose norm is the total: one a group, or one a tensor for the two orders of which
    the norm of norms is something else (torch's result is that one)."""
    if order in (0.0, -math.inf):
        return [t.norm(order) for t in tensors]
    return [_ops._multi_tensor_norm(group, order) for group in _groups(tensors)]


def _stack(norms: list[Any]) -> Any:
    """0-d norms of several devices and dtypes as one vector, in the widest dtype."""
    return torch.cat([n.reshape(1).to(norms[0].device) for n in norms])


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors as one vector, 0-d, on the first one's device (0 for none).

    Raises RuntimeError with ``error_if_nonfinite`` if it is not finite, which waits for the
    device. ``foreach`` is accepted; the result is the same.
    """
    del foreach
    tensors = _list(tensors)
    norm_type = float(norm_type)
    if not tensors:
        return torch.tensor(0.0)
    with torch.no_grad():
        norms = _norms(tensors, norm_type)
        # Of order 0 the norm of one norm is not that norm: it is 1, or 0 for 0.
        alone = len(norms) == 1 and norm_type != 0.0
        total = norms[0] if alone else _stack(norms).norm(norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    return total


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scales the gradients by max_norm / (total_norm + 1e-6), in place, if that is below 1."""
    del foreach
    grads = _gradients(parameters)
    if not grads:
        return
    with torch.no_grad():
        # Multiplying by a clamped factor even where it is 1 keeps the value on the device.
        factor = (float(max_norm) / (total_norm + 1e-6)).clamp(max=1.0)
        for group in _groups(grads):
            device = group[0].device
            _ops._foreach_mul_(group, factor if device == factor.device else factor.to(device))


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales the gradients, in place, so that their total norm is at most ``max_norm``.

    Returns the norm before clipping, 0-d. ``norm_type`` may be inf. Raises RuntimeError with
    ``error_if_nonfinite`` if that norm is not finite.
    """
    parameters = _list(parameters)
    total = get_total_norm(_gradients(parameters), norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(parameters, max_norm, total, foreach)
    return total


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps the gradients to [-clip_value, clip_value], in place."""
    del foreach
    bound = float(clip_value)
    with torch.no_grad():
        for grad in _gradients(parameters):
            grad.clamp_(min=-bound, max=bound)
