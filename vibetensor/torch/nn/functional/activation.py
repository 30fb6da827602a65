"""Activation functions: torch's signatures over the pointwise ops and softmax."""

from __future__ import annotations

import warnings
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch._tensor import written

_ops = _C._ops


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(0, x)."""
    return _ops.relu_(input) if inplace else _ops.relu(input)


def relu_(input: Tensor) -> Tensor:
    """relu in place."""
    return _ops.relu_(input)


def gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """x * Phi(x), exact or with ``approximate="tanh"``."""
    return written(_ops.gelu(input, approximate=approximate), out)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(x)."""
    return _ops.silu_(input) if inplace else _ops.silu(input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """x * tanh(softplus(x))."""
    return _ops.mish_(input) if inplace else _ops.mish(input)


def softplus(
    input: Tensor, beta: float = 1, threshold: float = 20, *, out: Tensor | None = None
) -> Tensor:
    """log(1 + exp(beta x)) / beta; the identity where beta x > threshold."""
    return written(_ops.softplus(input, beta, threshold), out)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x where positive, else negative_slope * x."""
    if inplace:
        return _ops.leaky_relu_(input, negative_slope)
    return _ops.leaky_relu(input, negative_slope)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """leaky_relu in place."""
    return _ops.leaky_relu_(input, negative_slope)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where positive, else alpha * (exp(x) - 1)."""
    return _ops.elu_(input, alpha) if inplace else _ops.elu(input, alpha)


def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """elu in place."""
    return _ops.elu_(input, alpha)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """max(0, x) + min(0, alpha * (exp(x / alpha) - 1))."""
    return _place(input, _ops.celu(input, alpha), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """scale * elu(x, alpha) with the self-normalising constants of Klambauer et al. 2017."""
    return _ops.selu_(input) if inplace else _ops.selu(input)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """Clamps to [min_val, max_val]; no gradient flows at the bounds."""
    if min_val > max_val:
        raise ValueError("min_val cannot be greater than max_val")
    if inplace:
        return _ops.hardtanh_(input, min_val, max_val)
    return _ops.hardtanh(input, min_val, max_val)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """hardtanh in place."""
    return hardtanh(input, min_val, max_val, inplace=True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(0, x), 6)."""
    return hardtanh(input, 0.0, 6.0, inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(x + 3) / 6."""
    return _place(input, _ops.hardsigmoid(input), inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x * relu6(x + 3) / 6."""
    return _place(input, _ops.hardswish(input), inplace)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x where x > threshold, else value."""
    if inplace:
        return _ops.threshold_(input, threshold, value)
    return _ops.threshold(input, threshold, value)


def hardshrink(input: Tensor, lambd: float = 0.5, *, out: Tensor | None = None) -> Tensor:
    """x where |x| > lambd, else 0."""
    return written(input.masked_fill(input.abs() <= lambd, 0.0), out)


def softshrink(input: Tensor, lambd: float = 0.5, *, out: Tensor | None = None) -> Tensor:
    """x moved towards 0 by lambd, and 0 where it would cross."""
    if lambd < 0:
        raise RuntimeError(f"lambda must be greater or equal to 0, but found to be {lambd}.")
    return written(input - hardtanh(input, -lambd, lambd), out)


def tanhshrink(input: Tensor) -> Tensor:
    """x - tanh(x)."""
    return _ops.tanhshrink(input)


def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return _ops.softsign(input)


def logsigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """log(sigmoid(x)), without overflow."""
    return written(_ops.log_sigmoid(input), out)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return _ops.tanh(input)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _ops.sigmoid(input)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """x where positive, else weight * x; ``weight`` has 1 element or one per channel (dim 1)."""
    return _ops.prelu(input, weight)


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """leaky_relu whose slope is uniform in [lower, upper] while training, else their mean."""
    if lower > upper:
        raise RuntimeError(
            f"rrelu: Lower bound should be less than or equal to the upper bound, got {lower} and {upper}"
        )
    if not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    slope = _ops.empty_like(input).uniform_(lower, upper)
    return _place(input, _ops.where(input > 0, input, slope * input), inplace)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a * sigmoid(b) for the halves a, b of ``dim``."""
    return _ops.glu(input, dim)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """exp(x) / sum(exp(x)) along ``dim``, computed in ``dtype`` if given."""
    if dim is None:
        dim = _implied_dim("softmax", input.dim(), _stacklevel)
    return _ops.softmax(input, dim, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """log(softmax(x)) along ``dim``, computed in ``dtype`` if given."""
    if dim is None:
        dim = _implied_dim("log_softmax", input.dim(), _stacklevel)
    return _ops.log_softmax(input, dim, dtype)


def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """softmax(-x)."""
    if dim is None:
        dim = _implied_dim("softmin", input.dim(), _stacklevel)
    return _ops.softmax(-input, dim, dtype)


def gumbel_softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    """A sample of the Gumbel-softmax distribution; ``hard`` gives one-hot values with the soft
    gradient. ``eps`` has no effect (as in torch)."""
    # -log(Exponential(1)) is Gumbel(0, 1).
    uniform = _ops.rand_like(logits)
    tiny = 1e-20 if logits.dtype in (_C.float32, _C.float64) else 1e-7
    gumbels = -_ops.log(-_ops.log(uniform.clamp(min=tiny)) + tiny)
    soft = _ops.softmax((logits + gumbels) / tau, dim, None)
    if not hard:
        return soft
    index = soft.argmax(dim, keepdim=True)
    one_hot = _ops.zeros_like(logits).scatter_(dim, index, 1.0)
    return one_hot - soft.detach() + soft


def _place(input: Tensor, result: Tensor, inplace: bool) -> Tensor:
    """The in-place form of a function made of several ops."""
    return input.copy_(result) if inplace else result


def _implied_dim(name: str, ndim: int, stacklevel: int) -> int:
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. "
        "Change the call to include dim=X as an argument.",
        stacklevel=stacklevel,
    )
    return 0 if ndim in (0, 1, 3) else 1
