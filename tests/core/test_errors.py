"""Bad calls name the op, the shapes and dtypes, and leave the process usable."""

from __future__ import annotations

import numpy as np
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


# What is not a tensor, a dtype or a device: TypeError, with the function and what it takes.
WRONG_TYPES = {
    "to a dict": (lambda x: x.to({}), r"to\(\): the first argument must be .*, not dict"),
    "to a list": (lambda x: x.to([1]), r"to\(\): the first argument must be .*, not list"),
    "to NumPy's dtype": (lambda x: x.to(np.float64), r"to\(\): .* not the class float64"),
    "to a text beside": (lambda x: x.to("cpu", "a"), r"to\(\): argument 'dtype' .* not str"),
    "to a dtype that is text": (lambda x: x.to(dtype="a"), r"to\(\): argument 'dtype' .* not str"),
    "to a device that is a dict": (lambda x: x.to(device={}), r"argument 'device' .* not dict"),
    "to another number": (lambda x: x.to(other=3), r"to\(\): argument 'other' must be Tensor"),
    "to two devices": (lambda x: x.to("cpu", device="cpu"), r"both by position and by name"),
    "to two dtypes": (lambda x: x.to(vt.int32, dtype=vt.int8), r"both by position and by name"),
    "to too much": (lambda x: x.to("cpu", vt.int8, True, True, 1), r"at most 4 .*, got 5"),
    "type of a list": (lambda x: x.type([1]), r"type\(\): argument 'dtype' .* not list"),
    "type of NumPy's": (lambda x: x.type(np.int8), r"type\(\): .* not the class int8"),
    "cuda": (lambda x: x.cuda({}), r"cuda\(\): argument 'device' .* not dict"),
    "type_as": (lambda x: x.type_as(3), r"type_as\(\): argument 'other' must be Tensor, not int"),
    "is_same_size": (lambda x: x.is_same_size(1), r"is_same_size\(\): argument 'other' .* not int"),
    "numel": (lambda x: vt.numel([1]), r"numel\(\): argument 'input' must be Tensor, not list"),
    "is_floating_point": (lambda x: vt.is_floating_point(2), r"is_floating_point\(\): .* not int"),
    "is_complex": (lambda x: vt.is_complex(2), r"is_complex\(\): argument 'input' .* not int"),
    "is_nonzero": (lambda x: vt.is_nonzero(2), r"is_nonzero\(\): argument 'input' .* not int"),
    "atleast_1d": (
        lambda x: vt.atleast_1d([1, 2]),
        r"atleast_1d\(\) takes tensors, number 0 is int",
    ),
    "atleast_2d": (lambda x: vt.atleast_2d(3), r"atleast_2d\(\) takes tensors, number 0 is int"),
    "atleast_3d": (lambda x: vt.atleast_3d(x, 3), r"atleast_3d\(\) takes tensors, number 1 is int"),
    "block_diag": (lambda x: vt.block_diag(x, "a"), r"block_diag\(\) takes .*, number 1 is str"),
    "cartesian_prod": (lambda x: vt.cartesian_prod(1), r"cartesian_prod\(\) takes .* 0 is int"),
    "meshgrid": (lambda x: vt.meshgrid(x, 1), r"meshgrid\(\) takes tensors, number 1 is int"),
    "unique": (lambda x: vt.unique(1), r"unique\(\): argument 'input' must be Tensor, not int"),
    "unique_consecutive": (
        lambda x: vt.unique_consecutive([1]),
        r"unique_consecutive\(\): argument",
    ),
    "nonzero": (
        lambda x: vt.nonzero(1, as_tuple=True),
        r"nonzero\(\): argument 'input' .* not int",
    ),
    "where": (lambda x: vt.where({}), r"where\(\): argument 'condition' must be Tensor, not dict"),
    "repeat_interleave": (lambda x: vt.repeat_interleave([1]), r"argument 'repeats' .* not list"),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types(case) -> None:
    call, message = WRONG_TYPES[case]
    with pytest.raises(TypeError, match=message):
        call(vt.ones(2))


def test_dtypes_by_name_and_as_python_types() -> None:
    x = vt.ones(2)
    for made, dtype in (
        (x.to(float), vt.float64),
        (x.to(dtype=int), vt.int64),
        (x.to(None, vt.int8), vt.int8),
        (x.to(x.device, bool), vt.bool),
        (x.to(x.device, None, True), vt.float32),
        (x.type("torch.LongTensor"), vt.int64),
        (vt.nn.Linear(1, 1).to(float).weight, vt.float64),
    ):
        assert made.dtype is dtype


def test_cuda_takes_no_other_device() -> None:
    with pytest.raises(RuntimeError, match="must be a CUDA device, got cpu"):
        vt.ones(2).cuda("cpu")


def test_block_diag_of_blocks() -> None:
    assert vt.block_diag().shape == (1, 0)
    with pytest.raises(RuntimeError, match="block_diag: .* number 1 has 3"):
        vt.block_diag(vt.ones(1), vt.ones(1, 1, 1))


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
