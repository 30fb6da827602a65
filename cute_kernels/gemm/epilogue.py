"""What a matrix product does to its sums before it writes them."""

from __future__ import annotations

from dataclasses import dataclass

from ..dsl import Float32, const_expr, cute, cutlass

SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654
INV_SQRT_2_PI = 0.3989422804014327
GELU_CUBIC = 0.044715  # of the tanh form
LOG2_E = 1.4426950408889634
LOG2_INV_SQRT_2_PI = -1.3257480647361593
# Of lower_tail, highest power first, for results of each dtype: within 4.3e-4, a quarter of bfloat16's
# rounding, and 3e-6 of its value up to 3. Beyond, where the tail is less than 0.14%, the errors grow as
# those of float32's 1 + erf do, to 17% and 1% of 1e-9 at 6.
LOWER_TAIL = {
    "bfloat16": (0.00276247831, -0.0379938558, -0.478061199, -1.14256382, -1.00061917),
    "float16": (3.48634712e-05, -0.000778056448, 0.00807814766, -0.0533389375, -0.458895117,
                -1.15113437, -1.00000203),
}  # fmt: skip


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclass(frozen=True)
class Epilogue:
    """In this order.

    bias: (N,) is added. save: what is there so far goes to z, laid out like d. activation: one of
    ACTIVATIONS. slope_at_z: the sums are multiplied by the slope of that activation at z, which is
    read. again: the activation at z itself goes to y, laid out like d, as in the forward pass. add: c,
    laid out like d, is added. column_sums: of each column over the 16 rows of a warp,
    to a row of `sums` (one for each 16 rows of d, float32): adding those up gives a bias gradient.
    """

    bias: bool = False
    save: bool = False
    activation: str = ""
    slope_at_z: str = ""
    again: bool = False
    add: bool = False
    column_sums: bool = False

    @property
    def name(self) -> str:
        parts = (
            "bias" * self.bias,
            self.activation,
            f"slope_{self.slope_at_z}" if self.slope_at_z else "",
            "again" * self.again,
            "add" * self.add,
        )
        return "_".join(p for p in parts if p) or "plain"


@cute.jit
def lower_tail(a: Float32, power: cutlass.Constexpr) -> Float32:
    """The normal distribution function at -a, for a from 0 to 6: two to the power of a polynomial,
    one of LOWER_TAIL."""
    q = Float32(power[0])
    for c in power[1:]:
        q = q * a + c
    return cute.math.exp2(q, fastmath=True)


@cute.jit
def distance(x: Float32) -> Float32:
    """|x|, at most 6; beyond, gelu is relu to 1e-8. A NaN stays one."""
    return cute.arch.fmin(cute.arch.fmax(x, -x, nan=True), Float32(6.0), nan=True)


@cute.jit
def sigmoid(x: Float32) -> Float32:
    return cute.arch.rcp_approx(1.0 + cute.math.exp2(x * -LOG2_E, fastmath=True))


@cute.jit
def activated(x: Float32, name: cutlass.Constexpr, power: cutlass.Constexpr) -> Float32:
    """The activation at x. power: of lower_tail, by what the result is rounded to."""
    if const_expr(name == "gelu"):
        a = distance(x)
        return cute.arch.fmax(x, Float32(0.0), nan=True) - a * lower_tail(a, power)
    if const_expr(name == "gelu_tanh"):
        return x * sigmoid(2.0 * SQRT_2_OVER_PI * x * (1.0 + GELU_CUBIC * x * x))
    if const_expr(name == "silu"):
        return x * sigmoid(x)
    # A NaN stays one, as in relu of the library kernels.
    return Float32(0.0) if x < 0.0 else x


@cute.jit
def slope(x: Float32, name: cutlass.Constexpr, power: cutlass.Constexpr) -> Float32:
    """The activation's derivative at x."""
    return slope_and_activated(x, name, power)[0]


@cute.jit
def slope_and_activated(x: Float32, name: cutlass.Constexpr, power: cutlass.Constexpr):
    """The activation's derivative at x, and the activation, which share most of their work."""
    if const_expr(name == "gelu"):
        a = distance(x)
        density = cute.math.exp2(a * a * (-0.5 * LOG2_E) + LOG2_INV_SQRT_2_PI, fastmath=True)
        tail = lower_tail(a, power)
        below = tail - a * density
        return (
            below if x < 0.0 else 1.0 - below,
            cute.arch.fmax(x, Float32(0.0), nan=True) - a * tail,
        )
    if const_expr(name == "gelu_tanh"):
        # Flat from there on; the power below stays finite.
        y = cute.arch.fmin(x, Float32(9.0), nan=True)
        y = cute.arch.fmax(y, Float32(-9.0), nan=True)
        u = 2.0 * SQRT_2_OVER_PI * y * (1.0 + GELU_CUBIC * y * y)
        e = cute.math.exp2(u * -LOG2_E, fastmath=True)
        s = cute.arch.rcp_approx(1.0 + e)
        rate = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * y * y)
        return s + y * rate * (e * s) * s, x * s
    if const_expr(name == "silu"):
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s)), x * s
    return Float32(1.0) if x > 0.0 else Float32(0.0), Float32(0.0) if x < 0.0 else x


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
