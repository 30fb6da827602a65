"""Switches that kernels look at (TF32, cuDNN's, attention's): a capture belongs to them, and each
recorded op runs under those it was called under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import capture
from vibetensor.graphs.passes import epilogues
from vibetensor.graphs.tape import Op

cuda, cudnn = vt.backends.cuda, vt.backends.cudnn


def _tf32(on: bool) -> None:
    cuda.matmul.allow_tf32 = on


def _precision(on: bool) -> None:
    vt.set_float32_matmul_precision("medium" if on else "highest")


SETTERS: dict[str, Callable[[bool], Any]] = {
    "matmul.allow_tf32": _tf32,
    "set_float32_matmul_precision": _precision,
    "cudnn.enabled": lambda on: setattr(cudnn, "enabled", not on),
    "cudnn.benchmark": lambda on: setattr(cudnn, "benchmark", on),
    "cudnn.deterministic": lambda on: setattr(cudnn, "deterministic", on),
    "cudnn.allow_tf32": lambda on: setattr(cudnn, "allow_tf32", not on),
    "enable_cudnn_sdp": lambda on: cuda.enable_cudnn_sdp(not on),
    "use_deterministic_algorithms": lambda on: vt.use_deterministic_algorithms(on),
}


@pytest.mark.parametrize("name", SETTERS)
def test_a_capture_belongs_to_the_switches(name: str) -> None:
    function, change = capture(lambda x: x * 2), SETTERS[name]
    x = vt.ones(2)
    try:
        for on, captures in ((False, 1), (True, 2), (False, 2), (True, 2)):
            change(on)
            for _ in range(3):
                assert function(x).tolist() == [2, 2]
            assert len(function.variants) == captures
        assert "captured again: " in function.report() and "for kernels was" in function.report()
    finally:
        change(False)


def test_sdpa_kernel_around_the_call() -> None:
    function = capture(lambda q: vt.nn.functional.scaled_dot_product_attention(q, q, q))
    q = vt.ones(1, 1, 2, 4)
    for backend in (vt.nn.attention.SDPBackend.MATH, vt.nn.attention.SDPBackend.CUDNN_ATTENTION):
        for _ in range(3):
            function(q)
            with vt.nn.attention.sdpa_kernel(backend):
                function(q)
    assert len(function.variants) == 3


def _products(step: Any) -> list[Op]:
    return [op for op in step.tape().ops if op.name in ("linear", "mm", "_linear_activation")]


def _bit(name: str) -> int:
    before = _C._kernel_switch(name)
    _C._set_kernel_switch(name, False)
    without = _C._kernel_switches()
    _C._set_kernel_switch(name, True)
    bit = _C._kernel_switches() ^ without
    _C._set_kernel_switch(name, before)
    return bit


def test_ops_keep_the_switches_they_were_called_under() -> None:
    w = vt.ones(3, 3)

    def step(x: Any) -> Any:
        exact = x @ w
        cuda.matmul.allow_tf32 = True
        rounded = exact @ w
        cuda.matmul.allow_tf32 = False
        return rounded @ w

    function, bit = capture(step), _bit("matmul_tf32")
    for _ in range(3):
        function(vt.ones(2, 3))
    assert [bool(op.call.switches & bit) for op in _products(function)] == [False, True, False]
    assert len(function.variants) == 1 and not cuda.matmul.allow_tf32


def test_products_under_other_switches_are_not_repeated() -> None:
    w = vt.ones(3, 3)

    def step(x: Any) -> Any:
        exact = x @ w
        cuda.matmul.allow_tf32 = True
        rounded = x @ w
        cuda.matmul.allow_tf32 = False
        return exact.exp() + rounded.exp() + (x @ w).exp()

    function = capture(step)
    for _ in range(3):
        function(vt.ones(2, 3))
    assert len(_products(function)) == 2
    assert "other switches of kernels" in function.report()


def test_passes_keep_the_switches_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(epilogues, "FORWARD", ("gelu",))
    monkeypatch.setattr(epilogues, "BACKWARD", ("gelu",))
    model = vt.nn.Sequential(vt.nn.Linear(8, 16), vt.nn.GELU(), vt.nn.Linear(16, 8))
    names = []
    bit = _bit("matmul_tf32")

    def step(x: Any) -> Any:
        model.zero_grad(set_to_none=False)
        cuda.matmul.allow_tf32 = True
        hidden = model[0](x)
        cuda.matmul.allow_tf32 = False
        loss = model[2](model[1](hidden)).sum()
        cuda.matmul.allow_tf32 = True
        loss.backward()
        cuda.matmul.allow_tf32 = False
        return loss

    for p in model.parameters():
        p.grad = vt.zeros_like(p)
    function = capture(step)
    for _ in range(4):
        function(vt.randn(4, 8))
    for op in function.tape().ops:
        if op.name in ("linear", "mm", "addmm", "_mm_row_sums") or "activation" in op.name:
            names.append(op.name)
            # Of the three phases only the second layer's forward is exact.
            assert bool(op.call.switches & bit) == (op.name != "linear"), str(op)
    assert {"linear", "_linear_activation", "_mm_activation_backward", "addmm"} <= set(names)


def test_a_switch_that_stays_changed_is_another_course() -> None:
    def step(x: Any) -> Any:
        cudnn.benchmark = True
        return x + 1

    function = capture(step)
    try:
        for _ in range(5):
            assert function(vt.ones(1)).item() == 2
        assert len(function.variants) == 2
    finally:
        cudnn.benchmark = False


def test_switches_have_names() -> None:
    assert _C._kernel_switch("cudnn_enabled")
    with pytest.raises(ValueError, match="no switch 'tf64'"):
        _C._kernel_switch("tf64")
    with pytest.raises(ValueError, match="no switch 'tf64'"):
        _C._set_kernel_switch("tf64", True)
