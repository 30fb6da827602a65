"""In-place initialisers, distributed as torch's. None of them is recorded for backward."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import vibetensor.torch as torch
from vibetensor._C import Tensor

_LINEAR = ("linear", "conv1d", "conv2d", "conv3d", "sigmoid")


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor that keeps the variance through a nonlinearity; ``param`` is leaky_relu's slope.

    Raises ValueError for an unknown name.
    """
    if nonlinearity in _LINEAR or nonlinearity.startswith("conv_transpose"):
        return 1.0
    if nonlinearity == "tanh":
        return 5.0 / 3
    if nonlinearity == "relu":
        return math.sqrt(2.0)
    if nonlinearity == "leaky_relu":
        if param is None:
            param = 0.01
        elif isinstance(param, bool) or not isinstance(param, (int, float)):
            raise ValueError(f"negative_slope {param} not a valid number")
        return math.sqrt(2.0 / (1 + param**2))
    if nonlinearity == "selu":
        # An empirical value, torch's.
        return 3.0 / 4
    raise ValueError(f"Unsupported nonlinearity {nonlinearity}")


def _unrecorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return function(*args, **kwargs)

    return wrapper


@_unrecorded
def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Any = None) -> Tensor:
    """Uniform in [a, b)."""
    return tensor.uniform_(a, b, generator=generator)


@_unrecorded
def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
    """Normal with the given mean and standard deviation."""
    return tensor.normal_(mean, std, generator=generator)


@_unrecorded
def constant_(tensor: Tensor, val: float) -> Tensor:
    """One value everywhere."""
    return tensor.fill_(val)


@_unrecorded
def ones_(tensor: Tensor) -> Tensor:
    """Ones."""
    return tensor.fill_(1.0)


@_unrecorded
def zeros_(tensor: Tensor) -> Tensor:
    """Zeros."""
    return tensor.zero_()


@_unrecorded
def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Any = None,
) -> Tensor:
    """Normal, restricted to [a, b]: the inverse of its distribution function at uniform values."""
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. "
            "The distribution of values may be incorrect.",
            stacklevel=2,
        )
    low = math.erf((a - mean) / std / math.sqrt(2.0))
    high = math.erf((b - mean) / std / math.sqrt(2.0))
    x = torch.empty(tuple(tensor.shape), dtype=torch.float64, device=tensor.device)
    x.uniform_(low, high, generator=generator)
    values = _erfinv(x).mul_(std * math.sqrt(2.0)).add_(mean).clamp_(min=a, max=b)
    return tensor.copy_(values)


def _erfinv(x: Tensor) -> Tensor:
    """The inverse of erf for float64 values in [-1, 1].

    Winitzki's closed form (relative error 2e-3) and two Halley steps on erf(y) = x, whose error
    is cubed by each.
    """
    c = 0.147
    # At ±1 the inverse is infinite; the largest value below 1 stands for it.
    x = x.clamp(-1 + 2.0**-53, 1 - 2.0**-53)
    log = torch.log1p(-x * x)
    half = log * 0.5 + 2 / (math.pi * c)
    y = torch.sign(x) * torch.sqrt(torch.sqrt(half * half - log / c) - half)
    for _ in range(2):
        step = (torch.erf(y) - x) * torch.exp(y * y) * (math.sqrt(math.pi) / 2)
        y = y - step / (1 + y * step)
    return y


@_unrecorded
def eye_(tensor: Tensor) -> Tensor:
    """The identity matrix, or as much of it as fits. Raises ValueError unless 2-d."""
    if tensor.dim() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    return tensor.copy_(torch.eye(*tensor.shape, dtype=tensor.dtype, device=tensor.device))


@_unrecorded
def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """A convolution weight (3-d to 5-d) that passes each group's channels through unchanged."""
    ndim = tensor.dim()
    if ndim not in (3, 4, 5):
        raise ValueError("Only tensors with 3, 4, or 5 dimensions are supported")
    if tensor.shape[0] % groups:
        raise ValueError("dim 0 must be divisible by groups")
    per_group = tensor.shape[0] // groups
    center = tuple(extent // 2 for extent in tensor.shape[2:])
    tensor.zero_()
    for group in range(groups):
        for channel in range(min(per_group, tensor.shape[1])):
            tensor[(group * per_group + channel, channel, *center)] = 1
    return tensor


def _calculate_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Inputs per output and outputs per input of a weight (out, in, *kernel)."""
    if tensor.dim() < 2:
        raise ValueError(
            "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions"
        )
    kernel = math.prod(tensor.shape[2:])
    return tensor.shape[1] * kernel, tensor.shape[0] * kernel


def _calculate_correct_fan(tensor: Tensor, mode: str) -> int:
    mode = mode.lower()
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"Mode {mode} not supported, please use one of ['fan_in', 'fan_out']")
    fan_in, fan_out = _calculate_fan_in_and_fan_out(tensor)
    return fan_in if mode == "fan_in" else fan_out


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
    """Uniform in ±gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    bound = gain * math.sqrt(6.0 / sum(_calculate_fan_in_and_fan_out(tensor)))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Any = None) -> Tensor:
    """Normal with std gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    std = gain * math.sqrt(2.0 / sum(_calculate_fan_in_and_fan_out(tensor)))
    return normal_(tensor, 0.0, std, generator)


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    return calculate_gain(nonlinearity, a) / math.sqrt(_calculate_correct_fan(tensor, mode))


def _nothing_to_do(tensor: Tensor) -> bool:
    if 0 not in tensor.shape:
        return False
    warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=3)
    return True


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Any = None,
) -> Tensor:
    """Uniform in ±gain * sqrt(3 / fan) (He et al. 2015)."""
    if _nothing_to_do(tensor):
        return tensor
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Any = None,
) -> Tensor:
    """Normal with std gain / sqrt(fan) (He et al. 2015)."""
    if _nothing_to_do(tensor):
        return tensor
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


@_unrecorded
def orthogonal_(tensor: Tensor, gain: float = 1, generator: Any = None) -> Tensor:
    """A random matrix (rows by all the rest) with orthonormal rows or columns, times gain.

    The Q of a normal matrix, signs fixed so that it is uniform (Saxe et al. 2013). NumPy does the
    factorisation, in float64.
    """
    import numpy as np

    if tensor.dim() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    if tensor.numel() == 0:
        return tensor
    rows, cols = tensor.shape[0], tensor.numel() // tensor.shape[0]
    normal = torch.empty((rows, cols), dtype=torch.float64, device=tensor.device)
    matrix = normal.normal_(0.0, 1.0, generator=generator).cpu().numpy()
    q, r = np.linalg.qr(matrix.T if rows < cols else matrix)
    q = q * np.sign(np.diag(r))
    q = np.ascontiguousarray(q.T if rows < cols else q) * gain
    return tensor.copy_(torch.from_numpy(q).reshape(tuple(tensor.shape)))


@_unrecorded
def sparse_(tensor: Tensor, sparsity: float, std: float = 0.01, generator: Any = None) -> Tensor:
    """Normal, with a fraction ``sparsity`` of each column set to 0. Raises ValueError unless 2-d."""
    if tensor.dim() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    rows, cols = tensor.shape
    zeros = math.ceil(sparsity * rows)
    tensor.normal_(0.0, std, generator=generator)
    for column in range(cols):
        order = torch.randperm(rows, generator=generator, device=tensor.device)
        tensor[order[:zeros], column] = 0
    return tensor


def _old_name(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def deprecated(*args: Any, **kwargs: Any) -> Tensor:
        warnings.warn(
            f"`nn.init.{name}` is now deprecated in favor of `nn.init.{function.__name__}`.",
            FutureWarning,
            stacklevel=2,
        )
        return function(*args, **kwargs)

    deprecated.__name__ = name
    deprecated.__doc__ = f"The former name of {function.__name__}."
    return deprecated


uniform = _old_name("uniform", uniform_)
normal = _old_name("normal", normal_)
constant = _old_name("constant", constant_)
eye = _old_name("eye", eye_)
dirac = _old_name("dirac", dirac_)
xavier_uniform = _old_name("xavier_uniform", xavier_uniform_)
xavier_normal = _old_name("xavier_normal", xavier_normal_)
kaiming_uniform = _old_name("kaiming_uniform", kaiming_uniform_)
kaiming_normal = _old_name("kaiming_normal", kaiming_normal_)
orthogonal = _old_name("orthogonal", orthogonal_)
sparse = _old_name("sparse", sparse_)
