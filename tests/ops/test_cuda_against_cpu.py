"""Every op of the table on CUDA against the CPU backend: values, dtypes, strides, gradients.

The CPU reference of a float32 or 16-bit case is computed in float64 from the same (rounded)
inputs, so that neither backend's rounding is taken for the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt

from .table import (
    FLOATS,
    TENSORS_ONLY,
    UNINITIALISED,
    Makers,
    dtypes_of,
    flatten,
    load_table,
    samples_of,
    to_numpy,
)

if not vt.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (4e-5, 2e-5),
    "float16": (2e-3, 4e-3),
    "bfloat16": (2e-2, 2e-2),
}
HOST_INDICES = {"tensor_split.tensor"}  # reads its indices on the host, as in torch


@pytest.fixture(scope="module", autouse=True)
def _full_precision() -> Iterator[None]:
    """Convolutions keep float32's bits, which the references have."""
    with vt.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _cases() -> list[Any]:
    cases = []
    for op in load_table():
        if op.python_name is None or op.python_name.startswith("_"):
            continue
        if op.random or op.row.get("capture") == "random" or op.python_name in UNINITIALISED:
            continue
        if "function" not in op.variants and "method" not in op.variants:
            continue
        for number, sample in enumerate(samples_of(op.row)):
            for dtype in dtypes_of(op):
                cases.append(pytest.param(op, sample, dtype, id=f"{op.name}-{dtype}-{number}"))
    return cases


class _Converter:
    def __init__(self, device: str, requires_grad: bool, widen: bool) -> None:
        self.library = vt
        self.device = device
        self.requires_grad = requires_grad
        self.widen = widen
        self.made: list[Any] = []

    def __call__(self, array: np.ndarray, dtype: str) -> Any:
        value = vt.tensor(array.tolist() if array.ndim == 0 else np.ascontiguousarray(array))
        value = value.to(getattr(vt, dtype))
        if self.widen and dtype in FLOATS:
            value = value.to(vt.float64)
        value = value.to(self.device)
        if self.requires_grad and dtype in FLOATS:
            value.requires_grad_()
            self.made.append(value)
        return value


def _call(op: Any, args: Any, kwargs: Any) -> Any:
    if "function" in op.variants:
        return getattr(vt._C._ops, op.python_name)(*args, **kwargs)
    name = op.row.get("torch", op.python_name).removeprefix("torch.").removeprefix("Tensor.")
    return getattr(vt.Tensor, name)(*args, **kwargs)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, vt.Tensor) else value


def _run(op: Any, sample: str, dtype: str, device: str, grad: bool, widen: bool = False) -> Any:
    converter = _Converter(device, grad, widen)
    args, kwargs = Makers(dtype, seed=7).arguments(sample, converter)
    made = any(isinstance(a, vt.Tensor) for a in flatten([*args, *kwargs.values()]))
    if not made and "device" in {a.name for a in op.schema.args}:
        kwargs = {**kwargs, "device": device}
    # Some samples make index tensors by themselves; they go where the others are.
    if op.name not in HOST_INDICES:
        args = tuple(_moved(a, device) for a in args)
    kwargs = {name: _moved(a, device) for name, a in kwargs.items()}
    if any(a.mutated for a in op.schema.args) and grad:
        args = (args[0] * 1, *args[1:])
    return _call(op, args, kwargs), converter.made


def _compare(ours: Any, reference: Any, op: Any, dtype: str, what: str) -> None:
    if not isinstance(reference, vt.Tensor):
        assert ours == reference or (ours != ours and reference != reference), what
        return
    assert ours.is_cuda, what
    assert ours.shape == reference.shape, what
    atol, rtol = TOLERANCE.get(dtype, (0.0, 0.0))
    extra = float(op.row.get("tolerance", 1))
    np.testing.assert_allclose(
        to_numpy(ours.cpu()).astype(np.float64),
        to_numpy(reference).astype(np.float64),
        atol=atol * extra,
        rtol=rtol * extra,
        err_msg=what,
        equal_nan=True,
    )


@pytest.mark.parametrize(("op", "sample", "dtype"), _cases())
def test_forward(op: Any, sample: str, dtype: str) -> None:
    what = f"{op.name}({sample}) [{dtype}]"
    try:
        same, _ = _run(op, sample, dtype, "cpu", False)
    except TypeError as error:
        # The named samples hold numbers; some ops take only tensors, and say so.
        assert TENSORS_ONLY in str(error)
        with pytest.raises(TypeError, match=TENSORS_ONLY):
            _run(op, sample, dtype, "cuda", False)
        return
    actual, _ = _run(op, sample, dtype, "cuda", False)
    # Ops whose result depends on the input's rounding (floor, sort order) are compared in kind.
    exact = op.row.get("capture") in ("movement", "view") or dtype not in FLOATS
    reference = same
    if not exact:
        try:
            reference, _ = _run(op, sample, dtype, "cpu", False, widen=True)
        except Exception:
            reference = same
    for a, b, c in zip(flatten(actual), flatten(same), flatten(reference), strict=True):
        if isinstance(b, vt.Tensor):
            assert a.dtype == b.dtype, what
            assert [s for s, n in zip(a.stride(), a.shape) if n > 1] == [
                s for s, n in zip(b.stride(), b.shape) if n > 1
            ], what
            if not b.dtype.is_floating_point:
                c = b
        _compare(a, c, op, dtype, what)


def _gradients(op: Any, sample: str, dtype: str, device: str, widen: bool) -> list[Any]:
    result, inputs = _run(op, sample, dtype, device, True, widen)
    outputs = [r for r in flatten(result) if isinstance(r, vt.Tensor) and r.requires_grad]
    if not outputs or not inputs:
        return []
    weights = np.random.default_rng(3)
    total = None
    for out in outputs:
        weight = vt.tensor(weights.uniform(0.5, 1.5, tuple(out.shape)).tolist()).to(out.dtype)
        term = (out * weight.reshape(tuple(out.shape)).to(device)).sum()
        total = term if total is None else total + term
    return list(vt.autograd.grad(total, inputs, allow_unused=True))


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
        expected = _gradients(op, sample, dtype, "cpu", widen=True)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        pytest.skip("no gradient for this case")
    actual = _gradients(op, sample, dtype, "cuda", widen=False)
    for a, b in zip(actual, expected, strict=True):
        if a is None or b is None:
            assert a is b, (op.name, sample)
            continue
        atol, rtol = TOLERANCE[dtype]
        extra = 4 * float(op.row.get("tolerance", 1))
        scale = max(1.0, float(np.abs(to_numpy(b)).max(initial=0.0)))
        np.testing.assert_allclose(
            to_numpy(a.cpu()).astype(np.float64),
            to_numpy(b).astype(np.float64),
            atol=atol * extra * scale,
            rtol=rtol * extra,
            err_msg=f"gradient of {op.name}({sample}) [{dtype}]",
            equal_nan=True,
        )
