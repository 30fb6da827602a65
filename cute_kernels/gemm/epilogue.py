"""What a matrix product does to its sums before it writes them."""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl import Float32, const_expr, cute, cutlass

SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654
INV_SQRT_2_PI = 0.3989422804014327
GELU_CUBIC = 0.044715  # of the tanh form

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass(frozen=True)
class Epilogue:
    """In this order.

    bias: (N,) is added. save: what is there so far goes to z, laid out like d. activation: one of
    ACTIVATIONS. slope_at_z: the sums are multiplied by the slope of that activation at z, which is
    read. add: c, laid out like d, is added. column_sums: of each column over the 16 rows of a warp,
    to a row of `sums` (one for each 16 rows of d, float32): adding those up gives a bias gradient.
    """

    bias: bool = False
    save: bool = False
    activation: str = ""
    slope_at_z: str = ""
    add: bool = False
    column_sums: bool = False

    @property
    def name(self) -> str:
        parts = (
            "bias" * self.bias,
            self.activation,
            f"slope_{self.slope_at_z}" if self.slope_at_z else "",
            "add" * self.add,
        )
        return "_".join(p for p in parts if p) or "plain"


@cute.jit
def activated(x: Float32, name: cutlass.Constexpr) -> Float32:
    """The activation at x."""
    if const_expr(name == "gelu"):
        return x * 0.5 * (1.0 + cute.math.erf(x * SQRT_HALF))
    if const_expr(name == "gelu_tanh"):
        inner = SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x)
        return x * 0.5 * (1.0 + cute.math.tanh(inner, fastmath=True))
    if const_expr(name == "silu"):
        return x / (1.0 + cute.math.exp(-x, fastmath=True))
    # A NaN stays one, as in relu of the library kernels.
    return Float32(0.0) if x < 0.0 else x


@cute.jit
def slope(x: Float32, name: cutlass.Constexpr) -> Float32:
    """The activation's derivative at x."""
    if const_expr(name == "gelu"):
        density = INV_SQRT_2_PI * cute.math.exp(-0.5 * x * x, fastmath=True)
        return 0.5 * (1.0 + cute.math.erf(x * SQRT_HALF)) + x * density
    if const_expr(name == "gelu_tanh"):
        inner = SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x)
        t = cute.math.tanh(inner, fastmath=True)
        rate = SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * rate
    if const_expr(name == "silu"):
        s = 1.0 / (1.0 + cute.math.exp(-x, fastmath=True))
        return s * (1.0 + x * (1.0 - s))
    return Float32(1.0) if x > 0.0 else Float32(0.0)


def reference_activation(x, name: str):
    """The activation in float64."""
    import numpy as np

    if name == "gelu":
        return x * 0.5 * (1 + _erf(x * SQRT_HALF))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + np.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x**3)))
    if name == "silu":
        return x / (1 + np.exp(-x))
    return np.maximum(x, 0)


def reference_slope(x, name: str):
    """The activation's derivative in float64."""
    import numpy as np

    if name == "gelu":
        return 0.5 * (1 + _erf(x * SQRT_HALF)) + x * INV_SQRT_2_PI * np.exp(-x * x / 2)
    if name == "gelu_tanh":
        t = np.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x**3))
        rate = SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x * x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * rate
    if name == "silu":
        s = 1 / (1 + np.exp(-x))
        return s * (1 + x * (1 - s))
    return np.where(x > 0, 1.0, 0.0)


def _erf(x):
    import math

    import numpy as np

    return np.vectorize(math.erf)(x)
