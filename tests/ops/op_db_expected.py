"""Where vibetensor and torch differ on torch's own operator samples, and why."""

from __future__ import annotations

ALL = "all"

# How much wider than usual values may differ, by operator of op_db.
TOLERANCE_SCALE: dict[str, float] = {
    # Sums over many products of 16-bit floats with cancellation: each library is as far from the
    # float64 result as from the other.
    "addbmm": 12,
    "nn.functional.conv_transpose1d": 6,
    "nn.functional.conv_transpose2d": 6,
}

_OVERLAP = "out= may overlap an input here: the result is computed before it is written"
_OUT_DTYPE = "out= may have any dtype that the result can be cast to"
_ONCE = "the loss in chunks has no second derivative: it says so, and what to do"
_NUCLEAR = "the nuclear norm needs singular values, which are not here"

# (operator of op_db, what is checked) -> (numbers of the samples that differ, reason)
EXPECTED: dict[tuple[str, str], tuple[tuple[int, ...] | str, str]] = {
    ("arange", "errors"): ((6,), "the dtype comes from the arguments, not from out="),
    ("aminmax", "errors"): ((3,), _OUT_DTYPE),
    ("gather", "errors"): ((1, 6), f"{_OUT_DTYPE}; {_OVERLAP}"),
    ("kthvalue", "errors"): ((0,), _OVERLAP),
    ("masked_select", "errors"): ((1, 2), _OVERLAP),
    ("index_select", "errors"): ((0,), _OVERLAP),
    ("take", "errors"): ((1,), _OVERLAP),
    ("cat", "errors"): ((6, 7), _OVERLAP),
    ("normal", "out"): ((3,), "torch does not resize out= when the deviation is a number"),
    ("addbmm", "inplace"): ((3, 5), "addbmm_ does not change the shape of its tensor"),
    ("addbmm", "inplace gradients"): ((1, 3, 4, 5), "addbmm_ does not change its tensor's shape"),
    ("nn.functional.linear_cross_entropy.chunked", "gradients"): ((0,), _ONCE),
    ("nn.functional.linear_cross_entropy.chunked_none", "gradients"): ((0, 18), _ONCE),
    ("as_strided_scatter", "gradients"): (
        (0, 1, 2, 4, 6),
        "torch gives self a gradient where src replaced it, and none elsewhere",
    ),
    ("div.trunc_rounding", "bfloat16"): (
        (4, 5, 6, 7),
        "the exact quotient is truncated; torch first rounds it to bfloat16",
    ),
    ("native_layer_norm", "float16"): (ALL, "mean and deviation of 16-bit rows stay float32"),
    ("native_layer_norm", "bfloat16"): (ALL, "mean and deviation of 16-bit rows stay float32"),
    ("square", "bool"): (ALL, "the square of a bool tensor is bool"),
    ("square", "inplace"): (ALL, "the square of a bool tensor is bool, so square_ fits"),
    ("norm.nuc", "float32"): (ALL, _NUCLEAR),
    ("norm.nuc", "float64"): (ALL, _NUCLEAR),
    ("norm.nuc", "gradients"): (ALL, _NUCLEAR),
    ("norm.nuc", "method"): (ALL, _NUCLEAR),
    ("norm.nuc", "out"): (ALL, _NUCLEAR),
}

# Samples that are made of uninitialised memory: what happens with them is chance.
CHANCE: dict[tuple[str, str], tuple[int, ...]] = {("multinomial", "errors"): (2,)}
