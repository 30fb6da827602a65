"""Every row of the op table against torch: values, dtypes, strides, first and second gradients."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vibetensor.torch as vt  # noqa: E402

from .table import (  # noqa: E402
    FLOATS,
    TENSORS_ONLY,
    UNINITIALISED,
    Converter,
    Makers,
    dtypes_of,
    flatten,
    load_table,
    samples_of,
    to_numpy,
)

# Absolute and relative tolerance by dtype: about two roundings of the result's type.
TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (2e-5, 1e-5),
    "float16": (2e-3, 4e-3),
    "bfloat16": (2e-2, 2e-2),
}


def _cases() -> list[Any]:
    out = []
    for op in load_table():
        row = op.row
        if (
            op.python_name is None
            or op.python_name.startswith("_")
            or op.random
            or row.get("capture") == "random"
        ):
            continue
        if (
            op.python_name in UNINITIALISED
            or "function" not in op.variants
            and "method" not in op.variants
        ):
            continue
        for number, sample in enumerate(samples_of(row)):
            for dtype in dtypes_of(op):
                out.append(pytest.param(op, sample, dtype, id=f"{op.name}-{dtype}-{number}"))
    return out


def _resolve(library: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), library)


def _callable(library: Any, op: Any, ours: bool) -> Any:
    """The function or method of the row in one library."""
    if "function" in op.variants:
        if ours:
            return getattr(vt._C._ops, op.python_name)
        path = op.row.get("torch", op.python_name)
        return _resolve(library, path.removeprefix("torch."))
    return getattr(
        library.Tensor,
        op.row.get("torch", op.python_name).removeprefix("torch.").removeprefix("Tensor."),
    )


def _tolerance(op: Any, dtype: str) -> tuple[float, float]:
    extra = float(op.row.get("tolerance", 1))
    atol, rtol = TOLERANCE.get(dtype, (0.0, 0.0))
    return atol * extra, rtol * extra


def _compare(ours: Any, theirs: Any, tolerance: tuple[float, float], what: str) -> None:
    if not isinstance(theirs, torch.Tensor):
        assert ours == theirs or (ours != ours and theirs != theirs), what
        return
    assert str(ours.dtype) == str(theirs.dtype), what
    assert tuple(ours.shape) == tuple(theirs.shape), what
    np.testing.assert_allclose(
        to_numpy(ours).astype(np.float64),
        to_numpy(theirs).astype(np.float64),
        atol=tolerance[0],
        rtol=tolerance[1],
        err_msg=what,
        equal_nan=True,
    )


def _run(
    op: Any, sample: str, dtype: str, library: Any, ours: bool, grad: bool
) -> tuple[Any, list[Any]]:
    converter = Converter(library, grad)
    args, kwargs = Makers(dtype, seed=7).arguments(sample, converter)
    if any(a.mutated for a in op.schema.args) and grad:
        # In-place ops need a non-leaf to write to.
        args = (args[0] * 1, *args[1:])
    return _callable(library, op, ours)(*args, **kwargs), converter.made


@pytest.mark.parametrize(("op", "sample", "dtype"), _cases())
def test_forward(op: Any, sample: str, dtype: str) -> None:
    try:
        expected, _ = _run(op, sample, dtype, torch, False, False)
    except TypeError as error:
        # The named samples hold numbers; some ops take only tensors, and say so.
        assert TENSORS_ONLY in str(error)
        with pytest.raises(TypeError, match=TENSORS_ONLY):
            _run(op, sample, dtype, vt, True, False)
        return
    actual, _ = _run(op, sample, dtype, vt, True, False)
    ours, theirs = flatten(actual), flatten(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        _compare(a, b, _tolerance(op, dtype), f"{op.name}({sample}) [{dtype}]")
        if op.kind in ("view", "pointwise") and isinstance(b, torch.Tensor) and b.numel() > 0:
            assert [s for s, n in zip(a.stride(), a.shape) if n > 1] == [
                s for s, n in zip(b.stride(), b.shape) if n > 1
            ]


def _gradients(
    op: Any, sample: str, dtype: str, library: Any, ours: bool
) -> tuple[list[Any], list[Any]]:
    """First gradients of a fixed weighting of the outputs, and gradients of their squares."""
    result, inputs = _run(op, sample, dtype, library, ours, True)
    outputs = [r for r in flatten(result) if isinstance(r, library.Tensor) and r.requires_grad]
    if not outputs or not inputs:
        return [], []
    weights = np.random.default_rng(3)
    total = None
    for out in outputs:
        weight = library.tensor(weights.uniform(0.5, 1.5, tuple(out.shape)).tolist()).to(out.dtype)
        term = (out * weight.reshape(tuple(out.shape))).sum()
        total = term if total is None else total + term
    first = library.autograd.grad(total, inputs, create_graph=dtype == "float64", allow_unused=True)
    second: list[Any] = []
    if dtype == "float64":
        live = [g for g in first if g is not None and g.requires_grad]
        if live:
            score = sum(((g * g).sum() for g in live[1:]), (live[0] * live[0]).sum())
            if score.requires_grad:
                second = list(library.autograd.grad(score, inputs, allow_unused=True))
    return list(first), second


@pytest.mark.parametrize(
    ("op", "sample", "dtype"),
    [
        c
        for c in _cases()
        if c.values[2] in FLOATS
        and c.values[0].row.get("differentiable", True)
        and not c.values[0].row.get("skip_grad")
    ],
)
def test_gradients(op: Any, sample: str, dtype: str) -> None:
    try:
        expected = _gradients(op, sample, dtype, torch, False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        pytest.skip("torch has no gradient for this case")
    actual = _gradients(op, sample, dtype, vt, True)
    for order, (ours, theirs) in enumerate(zip(actual, expected), 1):
        if order == 2 and (len(ours) != len(theirs)):
            # One side knows that the second derivative vanishes and returns nothing.
            ours = ours or [None] * len(theirs)
            theirs = theirs or [None] * len(ours)
        for a, b in zip(ours, theirs):
            if a is None or b is None:
                assert (a is None or not to_numpy(a).any()) and (
                    b is None or not to_numpy(b).any()
                ), (order, op.name, sample)
                continue
            atol, rtol = _tolerance(op, dtype)
            _compare(
                a, b, (atol * 4, rtol * 4), f"gradient {order} of {op.name}({sample}) [{dtype}]"
            )
