"""Anomaly mode: backward's errors name the forward line, and nan gradients are errors."""

from __future__ import annotations

import sys

import pytest

import vibetensor.torch as vt


def bad_gradient():
    class Bad(vt.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise LookupError("no gradient today")

    return Bad.apply


def test_error_names_the_forward_line() -> None:
    x = vt.ones(2, requires_grad=True)
    with vt.autograd.detect_anomaly():
        y = x * 2
        square = y * y  # the line to be named
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            square.sum().backward()
    text = str(caught.value)
    assert "MulBackward" in text and "test_anomaly.py" in text
    assert "# the line to be named" in text
    assert "y.add_(1)" not in text


def test_python_error_of_a_function_names_the_forward_line() -> None:
    x = vt.ones(2, requires_grad=True)
    with vt.autograd.detect_anomaly():
        y = bad_gradient()(x)  # the line to be named
        with pytest.raises(LookupError, match="no gradient today") as caught:
            y.sum().backward()
    if sys.version_info >= (3, 11):  # where exceptions carry notes
        (note,) = caught.value.__notes__
        assert "# the line to be named" in note and "BadBackward" in note


def test_nan_gradient_is_an_error_that_names_its_op() -> None:
    x = vt.tensor([0.0, 4.0], requires_grad=True)
    with vt.autograd.detect_anomaly():
        root = x.sqrt()  # the line to be named
        out = (root * 0).sum()
        with pytest.raises(RuntimeError, match="SqrtBackward.*returned nan values") as caught:
            out.backward()
    assert "# the line to be named" in str(caught.value)
    out = (x.sqrt() * 0).sum()
    out.backward()
    assert x.grad.isnan().tolist() == [True, False]


def test_nan_check_can_be_off() -> None:
    x = vt.tensor([0.0], requires_grad=True)
    with vt.autograd.detect_anomaly(check_nan=False):
        (x.sqrt() * 0).sum().backward()
    assert x.grad.isnan().all()


def test_mode_is_restored(api=vt) -> None:
    x = vt.tensor([0.0], requires_grad=True)
    with pytest.raises(ValueError, match="inside"), vt.autograd.set_detect_anomaly(True):
        raise ValueError("inside")
    (x.sqrt() * 0).sum().backward()
    vt.autograd.set_detect_anomaly(True)
    try:
        with pytest.raises(RuntimeError, match="nan"):
            (x.sqrt() * 0).sum().backward()
    finally:
        vt.autograd.set_detect_anomaly(False)
    (x.sqrt() * 0).sum().backward()
