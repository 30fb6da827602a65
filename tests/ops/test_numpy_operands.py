"""NumPy's arrays beside tensors: in operators, in comparisons, in NumPy's own functions."""

from __future__ import annotations

import operator

import numpy as np
import pytest

import vibetensor.torch as vt

ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
              operator.mod, operator.pow]  # fmt: skip
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
BITS = [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]
A, B = np.array([[3.0, 2.0], [1.5, 4.0]], dtype=np.float32), np.array([1.0, 2.0], dtype=np.float32)


@pytest.mark.parametrize("op", ARITHMETIC + COMPARISONS)
def test_operators_give_tensors_on_both_sides(op) -> None:
    for ours, wanted in (
        (op(vt.as_tensor(A), B), op(A, B)),
        (op(A, vt.as_tensor(B)), op(A, B)),
        (op(vt.as_tensor(A), B[::-1]), op(A, B[::-1])),
    ):
        assert isinstance(ours, vt.Tensor)
        np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-6, strict=True)


@pytest.mark.parametrize("op", BITS)
def test_operators_on_integers(op) -> None:
    a, b = np.array([5, 6, 12]), np.array([1, 3, 2])
    for ours in (op(vt.as_tensor(a), b), op(a, vt.as_tensor(b))):
        assert isinstance(ours, vt.Tensor) and ours.tolist() == op(a, b).tolist()


def test_products_of_matrices() -> None:
    for ours in (vt.as_tensor(A) @ A, A @ vt.as_tensor(A)):
        assert isinstance(ours, vt.Tensor)
        np.testing.assert_allclose(ours.numpy(), A @ A)


@pytest.mark.parametrize("left", [True, False])
def test_gradients_pass(left: bool) -> None:
    x = vt.ones(2, 2, requires_grad=True)
    (A * x if left else x * A).sum().backward()
    assert x.grad.tolist() == A.tolist()


def test_what_is_saved_for_the_gradient_is_a_copy() -> None:
    x, weights = vt.ones(2, requires_grad=True), np.array([2.0, 3.0], dtype=np.float32)
    y = x * weights
    weights[:] = 0
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 3.0]


def test_dtypes_promote_as_those_of_tensors() -> None:
    x = vt.ones(2)
    assert (x + np.ones(2)).dtype is vt.float64
    assert (x + np.ones(2, dtype=np.int64)).dtype is vt.float32
    assert (x + np.array(2.0)).dtype is vt.float32  # no dimensions: a number
    assert (vt.ones(2, dtype=vt.int32) + np.ones(2, dtype=np.uint16)).dtype is vt.int64


def test_in_place() -> None:
    x = vt.ones(2)
    same = x
    x += np.array([1.0, 2.0])
    x *= np.array(2)
    assert x is same and x.dtype is vt.float32 and x.tolist() == [4.0, 6.0]


def test_other_classes_keep_their_say() -> None:
    class Other:
        __array_priority__ = 2000

        def __radd__(self, other: object) -> str:
            return "theirs"

    assert vt.ones(2) + Other() == "theirs"
    assert (vt.ones(2) == [1.0, 1.0]) is False and (vt.ones(2) != None) is True  # noqa: E711
    for wrong in ([1.0, 1.0], "a", None):
        with pytest.raises(TypeError):
            vt.ones(2) + wrong
    with pytest.raises(TypeError, match="can't convert np.ndarray"):
        vt.ones(2) + np.array(["a", "b"])


def test_functions_of_numpys_give_tensors() -> None:
    x = vt.tensor([1.0, 4.0])
    for ours, wanted in (
        (np.sqrt(x), [1.0, 2.0]),
        (np.add(x, np.ones(2)), [2.0, 5.0]),
        (np.maximum(np.array([2.0, 3.0]), x), [2.0, 4.0]),
        (np.isfinite(x), [True, True]),
    ):
        assert isinstance(ours, vt.Tensor) and ours.tolist() == wanted


@pytest.mark.parametrize("read", [np.asarray, np.array, np.sqrt, vt.Tensor.numpy])
def test_a_tensor_that_requires_grad_is_no_array(read) -> None:
    for x in (vt.ones(2, requires_grad=True), vt.ones(2, requires_grad=True) * 2):
        with pytest.raises(
            RuntimeError, match=r"Can't call numpy\(\) on Tensor that requires grad"
        ):
            read(x)
        with vt.no_grad():
            assert read(x).shape == (2,)


def test_in_a_captured_step() -> None:
    weights = np.array([2.0, 3.0], dtype=np.float32)

    def step(x: vt.Tensor) -> vt.Tensor:
        return (x * weights + x[np.array([1, 0])]).sum()

    captured = vt.cuda.capture(step)
    for value in (1.0, 2.0, 3.0):
        x = vt.tensor([value, -value / 2])
        assert captured(x).item() == step(x).item()
