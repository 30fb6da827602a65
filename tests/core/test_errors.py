"""Bad calls name the op, the shapes and dtypes, and leave the process usable."""

from __future__ import annotations

import pytest

import vibetensor.torch as vt


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: vt.ones(3) + vt.ones(2),
            RuntimeError,
            r"size of tensor a \(3\) must match the size of tensor b \(2\)",
        ),
        (lambda: vt.ones(2, 3) @ vt.ones(2, 3), RuntimeError, "2x3 and 2x3"),
        (
            lambda: vt.ones(2, 3).view(4),
            RuntimeError,
            r"shape '\[4\]' is invalid for input of size 6",
        ),
        (lambda: vt.ones(2).sum(3), IndexError, "Dimension out of range"),
        (lambda: vt.ones(2)[5], IndexError, "index 5 is out of bounds for dimension 0 with size 2"),
        (lambda: vt.zeros(-1), RuntimeError, "negative dimension -1"),
        (lambda: vt.zeros(2**40, 2**40), RuntimeError, "overflow"),
        (lambda: vt.empty(2**45), vt.OutOfMemoryError, "tried to allocate"),
        (lambda: vt.ones(2).cuda(), RuntimeError, "no CUDA device can be used: .*"),
        (lambda: vt.tensor([1, [2]]), (ValueError, TypeError), "sequence"),
        (lambda: vt.tensor("text"), TypeError, "invalid data type 'str'"),
        (lambda: vt.ones(2, 2, requires_grad=True).numpy(), RuntimeError, "detach"),
        (lambda: vt.ones(3).expand(2), RuntimeError, "must match the existing size"),
        (lambda: bool(vt.ones(2)), RuntimeError, "more than one value is ambiguous"),
        (lambda: vt.ones(2, 2).item(), RuntimeError, "4 elements cannot be converted to Scalar"),
        (lambda: vt.ones(1).expand(3).add_(1), RuntimeError, "single memory location"),
        (lambda: vt.tensor([1]) // vt.tensor([0]), RuntimeError, "ZeroDivisionError"),
        (lambda: vt.add(vt.ones(1), other="x"), TypeError, "argument 'other' must be"),
        (lambda: vt.ones(2).sum(axes=1), TypeError, "invalid combination"),
    ],
)
def test_message(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
    assert (vt.ones(2) + 1).tolist() == [2.0, 2.0]


def test_in_place_errors_of_autograd() -> None:
    leaf = vt.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        leaf.add_(1)
    y = leaf.exp()
    z = y * y
    y.add_(1)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation.*MulBackward0.*expected version 0"
    ):
        z.sum().backward()
    loss = (leaf * leaf).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
