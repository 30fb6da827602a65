"""Views in place: the tensor itself gets another geometry, with its history and its storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import vibetensor.torch as vt
from vibetensor import _C

FORMS: list[tuple[str, Callable[[vt.Tensor], vt.Tensor], Callable[[vt.Tensor], vt.Tensor]]] = [
    ("transpose_", lambda t: t.transpose_(0, 1), lambda t: t.transpose(0, 1)),
    ("t_", lambda t: t.t_(), lambda t: t.t()),
    ("unsqueeze_", lambda t: t.unsqueeze_(1), lambda t: t.unsqueeze(1)),
    ("squeeze_", lambda t: t.unsqueeze_(0).squeeze_(), lambda t: t),
    (
        "as_strided_",
        lambda t: t.as_strided_((2, 2), (1, 3), 1),
        lambda t: t.as_strided((2, 2), (1, 3), 1),
    ),
]


@pytest.mark.parametrize(("name", "in_place", "view"), FORMS, ids=[f[0] for f in FORMS])
def test_geometry_storage_and_gradient_are_those_of_the_view(
    name: str,
    in_place: Callable[[vt.Tensor], vt.Tensor],
    view: Callable[[vt.Tensor], vt.Tensor],
) -> None:
    leaf = vt.arange(6.0).reshape(2, 3).requires_grad_()
    changed, base = leaf * 2, leaf * 2
    address = changed.data_ptr()
    assert in_place(changed) is changed
    expected = view(base)
    assert changed.shape == expected.shape and changed.stride() == expected.stride()
    assert changed.data_ptr() == address + expected.storage_offset() * 4
    weight = vt.arange(float(changed.numel())).reshape(changed.shape)
    (mine,) = vt.autograd.grad((changed * weight).sum(), leaf)
    (wanted,) = vt.autograd.grad((expected * weight).sum(), leaf)
    assert mine.tolist() == wanted.tolist() and mine.abs().sum() > 0


def test_other_views_keep_their_geometry_and_see_writes() -> None:
    base = vt.zeros(2, 3)
    row = base[0]
    base.t_()
    base[1, 0] = 5.0
    assert base.shape == (3, 2) and row.shape == (3,) and row.tolist() == [0.0, 5.0, 0.0]


@pytest.mark.parametrize(("name", "in_place", "view"), FORMS, ids=[f[0] for f in FORMS])
def test_a_leaf_that_requires_grad_is_refused_unharmed(
    name: str, in_place: Callable[[vt.Tensor], vt.Tensor], view: object
) -> None:
    leaf = vt.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        in_place(leaf)
    assert leaf.shape == (2, 3) and leaf.is_leaf
    with vt.no_grad():
        in_place(leaf)
    assert leaf.is_leaf


@pytest.mark.parametrize(("name", "in_place", "view"), FORMS, ids=[f[0] for f in FORMS])
def test_refused_while_ops_are_recorded(
    name: str, in_place: Callable[[vt.Tensor], vt.Tensor], view: object
) -> None:
    x = vt.ones(2, 3)
    with _C.Recorder(), pytest.raises(RuntimeError, match="use the out-of-place form"):
        in_place(x)
    assert x.shape == (2, 3)
