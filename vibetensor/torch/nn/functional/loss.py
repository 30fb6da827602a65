"""Losses. `reduction` is "mean" (the default), "sum" or "none"."""

from __future__ import annotations

import warnings

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def reduction_code(
    reduction: str, size_average: bool | None = None, reduce: bool | None = None
) -> int:
    """The number the native losses take; the two older flags still win over the name.

    Raises ValueError for an unknown name.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    code = _REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return code


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The name that the flags of old torch stand for."""
    name = "none" if reduce is False else ("sum" if size_average is False else "mean")
    warnings.warn(
        f"size_average and reduce args will be deprecated, please use reduction='{name}' instead.",
        stacklevel=3,
    )
    return name


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """-log softmax(input)[target], fused.

    input (N, C), (C,) or (N, C, d1, …); target int64 class indices (N,), () or (N, d1, …), or
    class probabilities of input's shape. ``weight`` (C,). "mean" divides by the total weight of
    the targets that are not ``ignore_index``.

    ``z_loss``, which torch does not have, keeps the logits from drifting: it adds ``z_loss *
    logsumexp(input)**2`` to the loss of each row, before its class weight and the reduction; rows
    that are ignored have none. Class probabilities have no class weight of a row.
    """
    code = reduction_code(reduction, size_average, reduce)
    return _ops.cross_entropy_loss(
        input, target, weight, code, ignore_index, label_smoothing, z_loss=z_loss
    )


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-input[target] for log-probabilities; shapes as in cross_entropy."""
    code = reduction_code(reduction, size_average, reduce)
    return _ops.nll_loss(input, target, weight, code, ignore_index)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """(input - target)², times ``weight`` if given; "mean" then divides by the total weight."""
    _warn_if_broadcast(input, target)
    if weight is not None:
        return _weighted(_ops.mse_loss(input, target, 0), input, weight, reduction)
    return _ops.mse_loss(input, target, reduction_code(reduction, size_average, reduce))


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """|input - target|, times ``weight`` if given; "mean" then divides by the total weight."""
    _warn_if_broadcast(input, target)
    if weight is not None:
        return _weighted(_ops.l1_loss(input, target, 0), input, weight, reduction)
    return _ops.l1_loss(input, target, reduction_code(reduction, size_average, reduce))


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """d² / (2 beta) where d = |input - target| < beta, else d - beta / 2; beta 0 is l1_loss."""
    _warn_if_broadcast(input, target)
    code = reduction_code(reduction, size_average, reduce)
    if beta == 0.0:
        return _ops.l1_loss(input, target, code)
    return _ops.smooth_l1_loss(input, target, code, beta)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """delta * smooth_l1_loss with beta = delta, times ``weight`` if given.

    "mean" divides by the number of elements, also with weights. Raises RuntimeError unless
    delta > 0.
    """
    if delta <= 0:
        raise RuntimeError("huber_loss does not support non-positive values for delta.")
    _warn_if_broadcast(input, target)
    if weight is not None:
        loss = _ops.huber_loss(input, target, 0, delta)
        # Unlike the weighted mse_loss and l1_loss, whose mean is over the weights, as in torch.
        return _weighted(loss, input, weight, reduction, mean_of_elements=True)
    return _ops.huber_loss(input, target, reduction_code(reduction), delta)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-(t log p + (1 - t) log(1 - p)) for probabilities; logs are clamped at -100.

    ``target`` has input's shape. Raises RuntimeError for probabilities outside [0, 1].
    """
    code = reduction_code(reduction, size_average, reduce)
    _same_shape(input, target, "Using a target size ({1}) that is different to the input size ({0})"
                " is deprecated. Please ensure they have the same size.")  # fmt: skip
    return _ops.binary_cross_entropy(input, target, weight, code)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """binary_cross_entropy of sigmoid(input), without overflow.

    ``pos_weight`` multiplies the loss of positive targets; it broadcasts.
    """
    code = reduction_code(reduction, size_average, reduce)
    _same_shape(input, target, "Target size ({1}) must be the same as input size ({0})")
    return _ops.binary_cross_entropy_with_logits(input, target, weight, pos_weight, code)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """target * (log target - input) for log-probabilities ``input``.

    "batchmean" divides the sum by the batch size, which is the mathematical value; "mean" divides
    by the number of elements.
    """
    if reduction == "batchmean":
        total = _ops.kl_div(input, target, 2, log_target=log_target)
        return total / input.shape[0] if input.dim() else total
    if reduction == "mean" and size_average is None and reduce is None:
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support "
            "size.'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition.'mean' will be changed to behave the same as 'batchmean' in the next "
            "major release.",
            stacklevel=2,
        )
    code = reduction_code(reduction, size_average, reduce)
    return _ops.kl_div(input, target, code, log_target=log_target)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """1 - cos where target is 1, max(0, cos - margin) where it is -1; inputs (N, D) or (D,)."""
    code = reduction_code(reduction, size_average, reduce)
    return _ops.cosine_embedding_loss(input1, input2, target, margin, code)


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """max(0, margin - target * (input1 - input2)) for targets 1 and -1."""
    code = reduction_code(reduction, size_average, reduce)
    return _ops.margin_ranking_loss(input1, input2, target, margin, code)


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """input where target is 1, max(0, margin - input) where it is -1."""
    code = reduction_code(reduction, size_average, reduce)
    return _ops.hinge_embedding_loss(input, target, margin, code)


def _weighted(
    loss: Tensor, input: Tensor, weight: Tensor, reduction: str, mean_of_elements: bool = False
) -> Tensor:
    """Reduces element losses with weights of input's shape; "mean" divides by the total weight or,
    with ``mean_of_elements``, by the number of elements."""
    code = reduction_code(reduction)
    if weight.shape != input.shape:
        raise ValueError("Weights and input must have the same size.")
    loss = loss * weight
    if code == 0:
        return loss
    if code == 2:
        return loss.sum()
    return loss.mean() if mean_of_elements else loss.sum() / weight.sum()


def _warn_if_broadcast(input: Tensor, target: Tensor) -> None:
    if input.shape != target.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )


def _same_shape(input: Tensor, target: Tensor, message: str) -> None:
    if input.shape != target.shape:
        raise ValueError(message.format(input.shape, target.shape))
