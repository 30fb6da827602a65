"""Dtypes, promotion and limits against PyTorch."""

from __future__ import annotations

import itertools

import pytest

import vibetensor.torch as vt

torch = pytest.importorskip("torch")

FLOATS = ["float16", "bfloat16", "float32", "float64"]
INTEGERS = ["uint8", "int8", "int16", "int32", "int64"]
NAMES = ["bool", *INTEGERS, *FLOATS]


def same(ours, theirs) -> None:
    assert str(ours).rsplit(".")[-1] == str(theirs).rsplit(".")[-1]


@pytest.mark.parametrize(("a", "b"), list(itertools.product(NAMES, NAMES)))
def test_promotion(a, b) -> None:
    (ours_a, ours_b), (a, b) = [(getattr(m, a), getattr(m, b)) for m in (vt, torch)]
    same(vt.promote_types(ours_a, ours_b), torch.promote_types(a, b))
    assert vt.can_cast(ours_a, ours_b) == torch.can_cast(a, b)
    for shape in [(), (2,)]:
        ours = vt.ones(2, dtype=ours_a) * vt.ones(shape, dtype=ours_b)
        same(ours.dtype, (torch.ones(2, dtype=a) * torch.ones(shape, dtype=b)).dtype)


@pytest.mark.parametrize("scalar", [True, 2, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_promotion_with_python_scalars(name, scalar) -> None:
    ours, theirs = (m.ones(2, dtype=getattr(m, name)) for m in (vt, torch))
    same((ours * scalar).dtype, (theirs * scalar).dtype)
    same(vt.result_type(ours, scalar), torch.result_type(theirs, scalar))


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name) -> None:
    ours, theirs = getattr(vt, name), getattr(torch, name)
    for attribute in ["itemsize", "is_floating_point", "is_complex", "is_signed"]:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute


@pytest.mark.parametrize("name", FLOATS + INTEGERS)
def test_limits(name) -> None:
    kind = "finfo" if name in FLOATS else "iinfo"
    ours, theirs = (getattr(m, kind)(getattr(m, name)) for m in (vt, torch))
    fields = ["bits", "max", "min"] + (["eps", "tiny"] if name in FLOATS else [])
    for field in fields:
        assert getattr(ours, field) == getattr(theirs, field), field
