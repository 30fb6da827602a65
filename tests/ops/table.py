"""The op table as test cases: rows, their samples, and makers of inputs shared with torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).parents[2]
GENERATOR = REPO / "csrc" / "ops" / "gen"
FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")

# The end of the error of an op that takes a tensor where a sample has a number.
TENSORS_ONLY = "must be Tensor, not int"

# Their values are whatever was in memory.
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_permuted",
    "resize_",
    "resize_as_",
}

NAMED_SAMPLES = {
    "unary": ["T(3, 4)", "T(5)", "T()", "T(0, 3)", "TT(3, 4)"],
    "unary_positive": ["P(3, 4)", "P(5)", "P()", "P(0, 3)"],
    "unary_unit": [
        "T(3, 4, low=-0.9, high=0.9)",
        "T(low=-0.9, high=0.9)",
        "T(0, low=-0.9, high=0.9)",
    ],
    "binary": [
        "T(3, 4), T(3, 4)",
        "T(3, 4), T(4)",
        "T(3, 1), T(1, 4)",
        "T(), T(2)",
        "T(0, 3), T(3)",
        "TT(3, 4), T(3, 4)",
        "T(3, 4), 2",
    ],
    "binary_nonzero": [
        "T(3, 4), P(3, 4)",
        "T(3, 4), P(4)",
        "T(), P(2)",
        "TT(3, 4), P(3, 4)",
        "T(3, 4), 2",
    ],
    "compare": [
        "T(3, 4), T(3, 4)",
        "T(3, 4), T(4)",
        "T(3, 1), T(1, 4)",
        "T(), T(2)",
        "T(3, 4), 1",
        "T(0, 3), T(3)",
    ],
    "reduce": ["T(3, 4)", "T(5)", "T()", "TT(3, 4)", "T(2, 3, 4)"],
}


def load_table() -> list[Any]:
    """Every row of csrc/ops/table, through the generator's own loader."""
    sys.path.insert(0, str(GENERATOR))
    try:
        import table  # type: ignore[import-not-found]

        return table.load(REPO / "csrc" / "ops" / "table")
    finally:
        sys.path.remove(str(GENERATOR))


def samples_of(row: dict[str, Any]) -> list[str]:
    """The argument strings of a row."""
    samples = row.get("samples") or []
    return NAMED_SAMPLES[samples] if isinstance(samples, str) else samples


def dtypes_of(op: Any) -> list[str]:
    """The dtypes a row's samples are run with."""
    asked = op.row.get("test_dtypes")
    if asked is None:
        asked = (
            "float"
            if op.differentiable
            else {
                "integral": "int",
                "bits": "bool+int",
                "numeric": "numeric",
                "float": "float",
                "float_or_int": "numeric",
            }.get(op.row.get("dtypes", ""), "float")
        )
    if isinstance(asked, list):
        return list(asked)
    groups = {
        "float": FLOATS,
        "numeric": (*FLOATS, *INTEGERS),
        "all": (*FLOATS, *INTEGERS, "bool"),
        "int": INTEGERS,
        "bool+int": (*INTEGERS, "bool"),
        "float32": ("float32",),
        "float+bool": (*FLOATS, "bool"),
        "bool": ("bool",),
        "float64": ("float64",),
    }
    return list(groups[asked])


class Makers:
    """Makes the same inputs for both libraries: `build(make)` evaluates a sample with NumPy data."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.dtype = dtype
        self.seed = seed

    def arguments(self, sample: str, convert: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Evaluates `sample`; `convert(array, dtype)` makes each tensor."""
        rng = np.random.default_rng(self.seed)

        def draw(shape: tuple[Any, ...], low: float, high: float, dtype: str) -> np.ndarray:
            if dtype == "bool":
                return rng.integers(0, 2, shape).astype(bool)
            if dtype in INTEGERS:
                low = max(low, 0) if dtype == "uint8" else low
                return rng.integers(int(low), max(int(high), int(low) + 1) + 1, shape).astype(dtype)
            return rng.uniform(low, high, shape)

        def flat(shape: tuple[Any, ...]) -> tuple[int, ...]:
            return (
                tuple(shape[0])
                if len(shape) == 1 and isinstance(shape[0], (tuple, list))
                else shape
            )

        def tensor(*shape: Any, low: float = -2, high: float = 2) -> Any:
            return convert(draw(flat(shape), low, high, self.dtype), self.dtype)

        def transposed(*shape: Any, low: float = -2, high: float = 2) -> Any:
            shape = flat(shape)
            made = convert(draw(shape[::-1], low, high, self.dtype), self.dtype)
            return made.permute(*reversed(range(len(shape)))) if len(shape) > 1 else made

        floating = self.dtype if self.dtype in FLOATS else "float32"
        names = {
            "T": tensor,
            "TT": transposed,
            "F": lambda *s, low=-2, high=2: convert(draw(flat(s), low, high, floating), floating),
            "P": lambda *s, low=0.5, high=3: convert(
                draw(flat(s), max(low, 1) if self.dtype in INTEGERS else low, high, self.dtype),
                self.dtype,
            ),
            "I": lambda *s, low=0, high=10: convert(
                rng.integers(low, high, flat(s)).astype("int64"), "int64"
            ),
            "B": lambda *s: convert(rng.integers(0, 2, flat(s)).astype(bool), "bool"),
            "inf": float("inf"),
            "nan": float("nan"),
        }
        names["torch"] = convert.library
        names["_args"] = lambda *args, **kwargs: (args, kwargs)
        return eval(
            f"_args({sample})",
            {"__builtins__": {"range": range, "float": float, "int": int, "bool": bool}},
            names,
        )


class Converter:
    """NumPy arrays to one library's tensors, with requires_grad where asked."""

    def __init__(self, library: Any, requires_grad: bool = False) -> None:
        self.library = library
        self.requires_grad = requires_grad
        self.made: list[Any] = []

    def __call__(self, array: np.ndarray, dtype: str) -> Any:
        value = self.library.tensor(
            array.tolist() if array.ndim == 0 else np.ascontiguousarray(array)
        )
        value = value.to(getattr(self.library, dtype))
        if self.requires_grad and dtype in FLOATS:
            value.requires_grad_()
            self.made.append(value)
        return value


def to_numpy(value: Any) -> np.ndarray:
    """A tensor of either library as a NumPy array (bfloat16 widened)."""
    value = value.detach()
    if "bfloat16" in str(value.dtype):
        value = value.float()
    # torch's gradient of sgn is a tensor without storage.
    return (value + 0 if getattr(value, "_is_zerotensor", bool)() else value).numpy()


def flatten(result: Any) -> list[Any]:
    """The tensors (or numbers) of a result, in order."""
    if isinstance(result, (tuple, list)):
        return [leaf for item in result for leaf in flatten(item)]
    return [result]
