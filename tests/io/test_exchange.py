"""Exchange with NumPy through arrays and DLPack: shared memory, lifetimes, refusals."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor import _C

DTYPES = [np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64,
          np.float16, np.float32, np.float64]  # fmt: skip
SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3, 4)]


@pytest.mark.parametrize("take", [vt.from_numpy, vt.from_dlpack])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_shared_both_ways(take, shape, dtype) -> None:
    array = np.ones(shape, dtype)
    tensor = take(array)
    array[...] = 0
    np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
    back = np.from_dlpack(tensor)
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    tensor.fill_(1)
    assert back.all() and array.all()


def test_strides_are_kept() -> None:
    array = np.arange(24).reshape(4, 6)[::2, 1::3].T
    for tensor in (vt.from_numpy(array), vt.from_dlpack(array)):
        assert tensor.tolist() == array.tolist()
        assert tensor.stride() == tuple(s // array.itemsize for s in array.strides)
        assert np.from_dlpack(tensor).tolist() == array.tolist()


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        vt.from_numpy(np.arange(3)[::-1])
    with pytest.raises((RuntimeError, BufferError), match="negative strides"):
        vt.from_dlpack(np.arange(3)[::-1])
    with pytest.raises(TypeError, match="byte order"):
        vt.from_numpy(np.arange(3, dtype=">i4"))
    with pytest.raises(BufferError, match="detach"):
        vt.ones(2, requires_grad=True).__dlpack__()
    with pytest.raises(BufferError, match="device"):
        vt.ones(2).__dlpack__(dl_device=(2, 0))


def test_capsule_versions() -> None:
    tensor = vt.ones(2)
    assert '"dltensor"' in repr(tensor.__dlpack__())
    assert '"dltensor_versioned"' in repr(tensor.__dlpack__(max_version=(1, 0)))
    capsule = tensor.__dlpack__()
    assert vt.from_dlpack(capsule).tolist() == [1, 1]
    with pytest.raises(ValueError, match="consumed"):
        vt.from_dlpack(capsule)


def test_memory_outlives_its_first_owner() -> None:
    tensor = vt.from_dlpack(np.arange(1000))
    array = np.from_dlpack(vt.arange(1000))
    gc.collect()
    assert tensor.sum().item() == array.sum() == 499500


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_unused_capsules_free_their_tensor(version) -> None:
    gc.collect()
    before = _C._live_counts()["storages"]
    for _ in range(5):
        vt.ones(7).__dlpack__(max_version=version)
    gc.collect()
    assert _C._live_counts()["storages"] == before


def test_array_protocol() -> None:
    tensor = vt.arange(3)
    assert np.shares_memory(np.asarray(tensor), tensor.numpy())
    copied = np.array(tensor)
    copied[0] = 9
    assert tensor.tolist() == [0, 1, 2]
    assert np.asarray(tensor, dtype=np.float64).dtype == np.float64
