"""Normalisation by layers, groups, batches and vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimensions, times weight plus bias.

    ``weight`` and ``bias`` have shape ``normalized_shape``, which must be the end of input's.
    """
    return _ops.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimensions, times weight.

    ``eps`` None is the machine epsilon of the dtype.
    """
    return _ops.rms_norm(input, normalized_shape, weight, eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises (N, C, *) over each group of C / num_groups channels; weight and bias are (C,)."""
    if input.dim() < 2:
        raise RuntimeError(
            f"Expected at least 2 dimensions for input tensor but received {input.dim()}"
        )
    _more_than_one_value(
        (input.shape[0] * input.shape[1] // num_groups, num_groups, *input.shape[2:])
    )
    return _ops.group_norm(input, num_groups, weight, bias, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises (N, C, *) over everything but C: by the batch's statistics in training (which
    also updates the running ones), else by the running ones. All four vectors are (C,).

    Raises ValueError in training when there is one value per channel.
    """
    if training:
        _more_than_one_value(input.shape)
    return _ops.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises each channel of each sample of (N, C, *). All four vectors are (C,).

    Raises ValueError where statistics are taken of one value.
    """
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {input.shape}"
        )
    return _ops.instance_norm(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps
    )


def _more_than_one_value(shape: Sequence[int]) -> None:
    count = shape[0]
    for extent in shape[2:]:
        count *= extent
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {_C.Size(shape)}"
        )


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """x / max(norm_p(x), eps) along ``dim``."""
    result = input / input.norm(p, dim, True).clamp_min(eps).expand_as(input)
    if out is None:
        return result
    return out.resize_(tuple(result.shape)).copy_(result)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The cosine of the angle between x1 and x2 along ``dim`` (dropped); shapes broadcast."""
    return _ops.cosine_similarity(x1, x2, dim, eps)


def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    """norm_p(x1 - x2 + eps) along the last dimension."""
    return (x1 - x2 + eps).norm(p, -1, keepdim)
