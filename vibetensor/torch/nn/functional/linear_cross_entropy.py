"""A linear layer and cross entropy of its results, which need not be whole in memory."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import vibetensor.torch as torch
from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch.autograd.function import Function
from vibetensor.torch.nn.functional.linear import linear
from vibetensor.torch.nn.functional.loss import cross_entropy, reduction_code

_ops = _C._ops
_POLICIES = ("auto", "accurate", "balanced", "compact")


class _Options(NamedTuple):  # nothing else that the package imports needs the dataclasses module
    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: Any = None


class LinearCrossEntropyOptions(_Options):
    """How linear_cross_entropy cuts the batch into chunks, with torch's names.

    ``batch_chunk_size``: rows of a chunk. ``chunking_method`` finds it where it is not given:
    ``"aspect_ratio"`` makes the logits of a chunk as large as the whole input (rounded up to a power
    of two rows), ``"aspect_ratio:N"`` an N-th of that; ``"auto"`` is ``"aspect_ratio:2"``; None one
    chunk. ``acc_policy``: ``"accurate"`` and ``"balanced"`` add the chunks' weight gradients in
    ``acc_dtype``, ``"compact"`` in the weight's dtype; ``"auto"`` is ``"balanced"`` for 16-bit
    weights. ``acc_dtype``: float32 for 16-bit weights, else the weight's own. With
    ``allow_retain_graph`` backward may run again; it costs a second copy of the gradients.

    Raises ValueError for values that are none of these.
    """

    __slots__ = ()

    def __new__(cls, *values: Any, **named: Any) -> LinearCrossEntropyOptions:
        self = super().__new__(cls, *values, **named)
        self._check()
        return self

    def _check(self) -> None:
        if self.acc_policy not in _POLICIES:
            raise ValueError(f"invalid acc_policy: {self.acc_policy!r}")
        if self.chunking_method not in (None, "auto"):
            name, colon, factor = str(self.chunking_method).partition(":")
            number = factor.isdigit() and int(factor) > 0 if colon else True
            if name != "aspect_ratio" or not number:
                raise ValueError(f"invalid chunking_method: {self.chunking_method!r}")
        size = self.batch_chunk_size
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ValueError(f"batch_chunk_size must be positive int or None, got {size!r}")
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if self.acc_dtype is not None and self.acc_dtype not in floats:
            raise ValueError(f"acc_dtype must be None or a float dtype, got {self.acc_dtype!r}")

    def rows(self, num_batches: int, in_features: int, num_classes: int) -> int:
        """Rows of a chunk. Raises ValueError where size and method are both given and disagree."""
        method, size = self.chunking_method, self.batch_chunk_size
        if method is None or (method == "auto" and size is not None):
            return max(1, num_batches if size is None else min(size, num_batches))
        factor = 2 if method == "auto" else int(method.partition(":")[2] or 1)
        wanted = -(-num_batches // max(1, -(-num_classes // max(in_features, 1))))
        rows = 1 << (wanted - 1).bit_length() if wanted > 0 else 1
        rows = max(1, min(rows // factor, num_batches))
        if size is not None and size != rows:
            raise ValueError(
                f"batch_chunk_size (={size}) and chunking_method ('{method}') give different "
                f"chunk sizes ({size} vs {rows}); pass only one."
            )
        return rows

    def accumulates_in(self, dtype: Any) -> Any:
        """The dtype in which gradients of a weight of ``dtype`` are added up."""
        if self.acc_policy == "compact":
            return dtype
        if self.acc_dtype is not None:
            return self.acc_dtype
        return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, …)``.

    input (N, in) or (in,), linear_weight (C, in), linear_bias (C,), target class indices (N,) or
    class probabilities (N, C). With ``options`` the logits are made and their gradients used a chunk
    of rows at a time, and at most two chunks of them are in memory: the forward pass computes the
    gradients of "mean" and "sum", the backward pass multiplies them by its own (once, unless
    ``options.allow_retain_graph``), and "none" makes the logits again there. The result is the same
    but for the order of sums. It cannot be differentiated twice. Class probabilities and weights of
    more dimensions (C, d1, …, in) are not cut; a warning says so.
    """
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    in_features = input.shape[-1]
    if in_features != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {in_features} and {linear_weight.shape[-1]}, respectively"
        )
    classes, outer = linear_weight.shape[0], tuple(linear_weight.shape[1:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *outer):
        raise RuntimeError(
            f"expected linear_bias shape {(classes, *outer)}, got {tuple(linear_bias.shape)}"
        )
    if outer and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {in_features}), got unbatched input with shape "
            f"{tuple(input.shape)}"
        )
    shape = (*input.shape[:-1], classes, *outer)
    if tuple(target.shape) == shape and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignored = -100 if ignore_index is None else ignore_index
    code = reduction_code(reduction)
    if options is not None:
        if not outer and not target.is_floating_point():
            return _chunked(
                input, linear_weight, target, linear_bias, weight, code, ignored, label_smoothing,
                z_loss, options,
            )  # fmt: skip
        warnings.warn(
            "linear_cross_entropy: ``options`` ignored; class probabilities and weights of more "
            f"than two dimensions are not cut into chunks. Got target.dtype={target.dtype}, "
            f"linear_weight.shape={tuple(linear_weight.shape)}.",
            stacklevel=2,
        )
    flat_bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = linear(input, linear_weight.reshape(-1, in_features), flat_bias).reshape(shape)
    return cross_entropy(
        logits, target, weight, ignore_index=ignored, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip


def _chunked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    code: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    options: LinearCrossEntropyOptions,
) -> Tensor:
    single = input.dim() == 1
    if single:
        input, target = input.unsqueeze(0), target.reshape(1)
    if target.dim() != 1 or target.shape[0] != input.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size "
            f"({target.shape[0] if target.dim() else 0})."
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    # What autocast does to the two ops; inside, nothing is cast again.
    enabled, low = _C._get_autocast(input.device.type)
    if enabled and torch.float64 not in (input.dtype, linear_weight.dtype):
        input, linear_weight = input.to(low), linear_weight.to(low)
        bias = None if bias is None else bias.to(low)
    loss_dtype = torch.float32 if enabled and input.dtype != torch.float64 else input.dtype
    rows = options.rows(input.shape[0], input.shape[1], linear_weight.shape[0])
    problem = _Problem(
        code, ignore_index, label_smoothing, z_loss, rows,
        options.accumulates_in(linear_weight.dtype), options.allow_retain_graph, loss_dtype,
        torch.is_grad_enabled(),
    )  # fmt: skip
    with torch.autocast(input.device.type, enabled=False):
        loss = _Chunks.apply(input, linear_weight, bias, target, weight, problem)
    return loss.squeeze(0) if single and code == 0 else loss


class _Problem(NamedTuple):
    """Numbers of one call."""

    code: int  # of the reduction
    ignore_index: int
    label_smoothing: float
    z_loss: float
    rows: int  # of a chunk
    acc_dtype: Any
    retain: bool
    loss_dtype: Any
    differentiated: bool  # whether gradients may be asked for

    def row_weights(self, target: Tensor, weight: Tensor | None, dtype: Any) -> Tensor:
        """(N,): the class weight of each row's target, 0 for rows that are ignored."""
        valid = target != self.ignore_index
        if weight is None:
            return valid.to(dtype)
        return weight.to(dtype)[(target * valid).long()] * valid.to(dtype)


class _Gradients:
    """Sums over the chunks, as far as they are wanted."""

    def __init__(self, problem: _Problem, needed: tuple[bool, ...], tensors: tuple[Any, ...]):
        input, linear_weight, bias = tensors
        self.input = torch.empty_like(input) if needed[0] else None
        self.weight = self.bias = None
        if needed[1]:
            self.weight = torch.zeros_like(linear_weight, dtype=problem.acc_dtype)
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=problem.acc_dtype)

    def add(self, at: slice, grad: Tensor, input: Tensor, linear_weight: Tensor) -> None:
        """A chunk's gradient of the logits, and the rows of the input that they are of."""
        if self.input is not None:
            self.input[at] = grad @ linear_weight
        if self.weight is not None:
            if self.weight.dtype == grad.dtype:
                self.weight.addmm_(grad.t(), input)
            else:
                self.weight.add_(grad.t() @ input)
        if self.bias is not None:
            self.bias.add_(grad.sum(0, dtype=self.bias.dtype))

    def of(self, linear_weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """In the dtypes of what they are gradients of."""
        weight = None if self.weight is None else self.weight.to(linear_weight.dtype)
        slope = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return [self.input, weight, slope]


def _chunk_gradient(
    problem: _Problem,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    row_grad: Tensor,
    row_weights: Tensor,
    total: Tensor | None,
) -> Tensor:
    """The gradient of a chunk's logits; ``row_grad`` (rows,) is that of its rows' losses, for the
    mean 1 / ``total``: the kernel divides, so that the factor is not rounded to the logits' dtype."""
    one = torch.ones((), dtype=lse.dtype, device=lse.device)
    grad = _ops._cross_entropy_index_backward(
        (row_grad if total is None else one).to(logits.dtype), logits, target, weight,
        0 if total is None else 1, problem.ignore_index, problem.label_smoothing, lse,
        one if total is None else total.to(lse.dtype),
    )  # fmt: skip
    if problem.z_loss:
        factors = torch.where(row_weights != 0, row_grad * row_weights, 0.0)
        slope = (2 * problem.z_loss * factors * lse).unsqueeze(1)
        grad.add_(torch.where(slope != 0, torch.softmax(logits, 1) * slope, 0.0))
    return grad


class _Chunks(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        problem: _Problem,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        keeps = any(needed) and problem.code != 0 and problem.differentiated
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        row_weights = problem.row_weights(target, weight, wide)
        total = row_weights.sum() if problem.code == 1 else None
        row_grad = torch.ones_like(row_weights) if total is None else 1 / total.expand(target.shape)
        sums = _Gradients(problem, needed, (input, linear_weight, bias)) if keeps else None
        losses = torch.empty(target.shape, dtype=wide, device=input.device)
        for start in range(0, input.shape[0], problem.rows):
            at = slice(start, start + problem.rows)
            x, t = input[at], target[at]
            logits = linear(x, linear_weight, bias).to(problem.loss_dtype)
            loss, lse, _ = _ops._cross_entropy_index(
                logits, t, weight, 0, problem.ignore_index, problem.label_smoothing
            )
            loss = loss.to(wide)
            if problem.z_loss:
                loss = loss + problem.z_loss * row_weights[at] * lse * lse
            losses[at] = loss
            if sums is not None:
                grad = _chunk_gradient(
                    problem, logits, t, weight, lse, row_grad[at], row_weights[at], total
                )
                del logits
                sums.add(at, grad.to(x.dtype), x, linear_weight)
                del grad
        ctx.problem, ctx.sums, ctx.gradients = problem, None, None
        if sums is not None:
            ctx.gradients = sums.of(linear_weight, bias)
        elif any(needed):
            ctx.save_for_backward(input, linear_weight, bias, target, weight)
        if problem.code == 0:
            return losses.to(problem.loss_dtype)
        result = losses.sum() if total is None else losses.sum() / total
        return result.to(problem.loss_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        problem = ctx.problem
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError(
                "linear_cross_entropy in chunks cannot be differentiated twice; pass options=None"
            )
        if problem.code == 0:
            return (*_recomputed(ctx, grad), None, None, None)
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward called twice, but the gradients that the forward "
                "pass made were given out. Pass "
                "options=LinearCrossEntropyOptions(allow_retain_graph=True)"
            )
        if problem.retain:
            scaled = [None if g is None else g * grad.to(g.dtype) for g in ctx.gradients]
        else:
            scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.gradients]
            ctx.gradients = None
        return (*scaled, None, None, None)


def _recomputed(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients for a gradient of each row's loss."""
    input, linear_weight, bias, target, weight = ctx.saved_tensors
    problem = ctx.problem
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    row_weights = problem.row_weights(target, weight, wide)
    grad = grad.to(wide)
    sums = _Gradients(problem, ctx.needs_input_grad[:3], (input, linear_weight, bias))
    with torch.autocast(input.device.type, enabled=False):
        for start in range(0, input.shape[0], problem.rows):
            at = slice(start, start + problem.rows)
            x, t = input[at], target[at]
            logits = linear(x, linear_weight, bias).to(problem.loss_dtype)
            _, lse, _ = _ops._cross_entropy_index(
                logits, t, weight, 0, problem.ignore_index, problem.label_smoothing
            )
            slope = _chunk_gradient(
                problem, logits, t, weight, lse, grad[at], row_weights[at], None
            )
            del logits
            sums.add(at, slope.to(x.dtype), x, linear_weight)
            del slope
    return sums.of(linear_weight, bias)
