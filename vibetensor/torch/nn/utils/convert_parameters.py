"""Parameters as one vector, and back."""

from __future__ import annotations

from collections.abc import Iterable

import vibetensor.torch as torch
from vibetensor._C import Tensor


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All elements in order, as a 1-d tensor (differentiable). Raises TypeError if the
    parameters are on different devices."""
    parameters = list(parameters)
    _one_device(parameters)
    return torch.cat([p.reshape(-1) for p in parameters])


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Makes each parameter's data a view of its part of ``vec``."""
    if not isinstance(vec, Tensor):
        raise TypeError(f"expected torch.Tensor, but got: {type(vec).__name__}")
    parameters = list(parameters)
    _one_device(parameters)
    start = 0
    for parameter in parameters:
        count = parameter.numel()
        parameter.data = vec.detach()[start : start + count].view(tuple(parameter.shape))
        start += count


def _one_device(parameters: list[Tensor]) -> None:
    if any(p.device != parameters[0].device for p in parameters):
        raise TypeError(
            "Found two parameters on different devices, this is currently not supported."
        )
