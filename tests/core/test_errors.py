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
        (lambda: "a" in vt.ones(2), RuntimeError, "only supports Tensor or scalar.*<class 'str'>"),
        (lambda: None in vt.ones(2), RuntimeError, "only supports Tensor or scalar"),
        (lambda: vt.ones(2) + 2**64, OverflowError, "without overflow"),
        (lambda: vt.ones(2).mul_(-(2**63) - 1), OverflowError, "without overflow"),
        (lambda: vt.full((2,), 10**30), OverflowError, "without overflow"),
        (lambda: vt.tensor(2**63), ValueError, "Overflow when unpacking long long"),
        (lambda: vt.tensor([1, -(2**63) - 1]), ValueError, "Overflow when unpacking long long"),
        (lambda: vt.set_num_threads(0), RuntimeError, "expects a positive integer"),
        (lambda: vt.ones(2).shape + [1], TypeError, "can only concatenate tuple"),
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


def test_numbers_in_data_keep_their_dtype() -> None:
    import numpy as np

    for data, dtype in (
        ([np.float64(1)], vt.float64),
        ([1.0, np.float64(1)], vt.float64),
        ((np.float64(1), 2), vt.float64),
        ([[np.float32(1)], [2.0]], vt.float32),
        ([np.float16(1)], vt.float16),
        ([1, np.float32(2)], vt.float32),
        ([np.int8(2), 3], vt.int64),
        ([np.int32(2)], vt.int32),
        ([np.bool_(True)], vt.bool),
        ((np.array([1, 2]), np.array([3, 4])), vt.int64),
        ([[np.array([1.0, 2.0])]], vt.float64),
        ([1.0, 2], vt.float32),
    ):
        made = vt.tensor(data)
        assert made.dtype is dtype, data
        assert made.tolist() == np.array(data).tolist()


def test_large_ints_become_floats() -> None:
    assert vt.tensor(2**64, dtype=vt.float32).item() == 2.0**64
    assert vt.tensor([10**30, 0.5]).tolist() == vt.tensor([1e30, 0.5]).tolist()
    assert vt.tensor([2**64, 0], dtype=vt.bool).tolist() == [True, False]


def test_membership() -> None:
    import numpy as np

    x = vt.tensor([1.0, 2.0])
    assert 2 in x and 3 not in x and np.float32(1) in x and vt.tensor(2.0) in x


def test_shapes_stay_shapes() -> None:
    shape = vt.ones(2, 3).shape
    for made, wanted in (
        (shape + (4,), (2, 3, 4)),
        ((4,) + shape, (4, 2, 3)),
        (shape * 2, (2, 3, 2, 3)),
        (2 * shape, (2, 3, 2, 3)),
        (shape[1:], (3,)),
        (shape[:0] + shape, (2, 3)),
    ):
        assert type(made) is vt.Size and made == wanted
    assert shape[-1] == 3 and type(shape[0]) is int
    with pytest.raises(IndexError):
        shape[2]
