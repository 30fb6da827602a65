"""Gradient clipping. Nothing here waits for the device, except where a check asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor._C import Tensor


def _list(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Any]:
    return [p.grad for p in _list(parameters) if p.grad is not None]


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
        norms = [t.norm(norm_type) for t in tensors]
        first = norms[0]
        if len(norms) == 1:
            total = first
        else:
            total = torch.stack([n.to(first.device, first.dtype) for n in norms]).norm(norm_type)
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
        for grad in grads:
            grad.mul_(factor if grad.device == factor.device else factor.to(grad.device))


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
