"""Overrides and modes: user code that takes an op's call."""

from __future__ import annotations

import pytest

import vibetensor.torch as vt


def test_an_override_replaces_an_op_and_can_run_the_original() -> None:
    seen = []

    def double(original, name, args):
        seen.append((name, len(args)))
        return original() * 2

    x = vt.tensor([1.0, -2.0], requires_grad=True)
    with vt.library.override("neg", double):
        y = -x
    assert y.tolist() == [-2.0, 4.0]
    assert seen == [("neg", 1)]
    y.sum().backward()
    assert x.grad.tolist() == [-2.0, -2.0]
    assert (-x).tolist() == [-1.0, 2.0]


def test_a_mode_sees_every_op_on_its_thread() -> None:
    names = []

    def trace(original, name, args):
        names.append(name)
        return original()

    with vt.library.Mode(trace):
        (vt.ones(3) + 1).sum()
    assert "add" in names and "sum" in names
    names.clear()
    vt.ones(3) + 1
    assert names == []


def test_unknown_ops_are_named() -> None:
    with pytest.raises(ValueError, match="no op is named 'nothing'"):
        vt.library.override("nothing", lambda original, name, args: original())


def test_an_error_in_an_override_reaches_the_caller() -> None:
    def fail(original, name, args):
        raise KeyError("mine")

    with vt.library.override("exp", fail), pytest.raises(KeyError, match="mine"):
        vt.ones(2).exp()
