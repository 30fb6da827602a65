"""Memory shared with other CUDA libraries: DLPack and __cuda_array_interface__."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt

DTYPES = ["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"]


def _values(dtype: str) -> Any:
    return vt.arange(24).remainder(2 if dtype == "bool" else 24).to(getattr(vt, dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_round_trip_with_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    ours = _values(dtype).cuda().reshape(4, 6)[:, 1:5]
    theirs = torch.from_dlpack(ours)
    assert theirs.is_cuda and theirs.data_ptr() == ours.data_ptr()
    assert tuple(theirs.stride()) == tuple(ours.stride())
    assert theirs.float().tolist() == ours.float().tolist()
    back = vt.from_dlpack(theirs)
    assert back.device == ours.device and back.data_ptr() == ours.data_ptr()
    assert str(back.dtype) == str(ours.dtype)
    assert vt.equal(back, ours)


def test_streams_are_ordered_with_torch() -> None:
    torch = pytest.importorskip("torch")
    side, other = vt.cuda.Stream(), torch.cuda.Stream()
    for value in range(10):
        with vt.cuda.stream(side):
            x = vt.zeros(1 << 24, device="cuda")
            for _ in range(5):
                x = x * 1.0
            x = x + value
            with torch.cuda.stream(other):
                y = torch.from_dlpack(x) * 2
                z = vt.from_dlpack(y)
            total = z.sum()
            assert total.item() == 2.0 * value * (1 << 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_with_cupy(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    ours = _values(dtype).cuda().reshape(4, 6).t()
    theirs = cupy.from_dlpack(ours)
    assert theirs.data.ptr == ours.data_ptr()
    np.testing.assert_array_equal(theirs.get(), ours.cpu().numpy())
    assert vt.equal(vt.from_dlpack(theirs), ours)
    through_interface = cupy.asarray(ours)
    assert through_interface.data.ptr == ours.data_ptr()
    np.testing.assert_array_equal(through_interface.get(), ours.cpu().numpy())


def test_round_trip_with_jax() -> None:
    jax = pytest.importorskip("jax")
    ours = vt.randn(5, 7).cuda()
    theirs = jax.dlpack.from_dlpack(ours)
    np.testing.assert_array_equal(np.asarray(theirs), ours.cpu().numpy())
    assert vt.equal(vt.from_dlpack(theirs), ours)


def test_memory_outlives_its_tensor() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.from_dlpack(vt.full((1 << 20,), 3.0, device="cuda"))
    for _ in range(5):
        vt.zeros(1 << 20, device="cuda")
    assert theirs.sum().item() == 3.0 * (1 << 20)
    ours = vt.from_dlpack(torch.full((1 << 20,), 4.0, device="cuda"))
    torch.zeros(1 << 20, device="cuda")
    assert ours.sum().item() == 4.0 * (1 << 20)
    ours.record_stream(vt.cuda.Stream())  # not our memory: nothing to do, and no harm


def test_stream_argument_is_checked() -> None:
    x = vt.ones(2, device="cuda")
    x.__dlpack__(stream=-1)
    x.__dlpack__(stream=None)
    x.__dlpack__(stream=vt.cuda.Stream().cuda_stream)
    with pytest.raises(ValueError, match="ambiguous"):
        x.__dlpack__(stream=0)
    assert x.__dlpack_device__() == (2, 0)


def test_interface_refuses_what_it_cannot_say() -> None:
    with pytest.raises(AttributeError, match="cpu"):
        _ = vt.ones(2).__cuda_array_interface__
    with pytest.raises(TypeError, match="bfloat16"):
        _ = vt.ones(2, device="cuda").bfloat16().__cuda_array_interface__
    with pytest.raises(RuntimeError, match="detach"):
        _ = vt.ones(2, device="cuda", requires_grad=True).__cuda_array_interface__


class _Foreign:
    """Device memory with nothing but the protocol."""

    def __init__(self, owner: Any, read_only: bool = False, **changes: Any) -> None:
        self.owner = owner
        interface = owner.__cuda_array_interface__
        interface["data"] = (interface["data"][0], read_only)
        self.__cuda_array_interface__ = {**interface, **changes}


@pytest.mark.parametrize("dtype", DTYPES)
def test_interface_of_any_object_is_taken(dtype: str) -> None:
    owner = _values(dtype).cuda().reshape(4, 6)
    for view in (owner, owner.t(), owner[1:, ::2], owner[2], owner[3, 3]):
        shared = vt.as_tensor(_Foreign(view))
        assert shared.data_ptr() == view.data_ptr() and shared.device == view.device
        assert shared.stride() == view.stride() and shared.dtype == view.dtype
        assert vt.equal(shared, view)
        copied = vt.tensor(_Foreign(view))
        assert copied.data_ptr() != view.data_ptr() and vt.equal(copied, view)
    shared = vt.as_tensor(_Foreign(owner))
    shared.zero_()
    assert not owner.any().item()
    on_host = vt.as_tensor(_Foreign(owner), device="cpu", dtype=vt.float64)
    assert on_host.device.type == "cpu" and on_host.dtype == vt.float64
    empty = vt.as_tensor(_Foreign(owner, shape=(0, 3), data=(0, False), strides=None))
    assert empty.shape == (0, 3) and empty.is_cuda


def test_interface_keeps_its_object() -> None:
    owner = vt.full((1 << 20,), 3.0, device="cuda")
    shared = vt.as_tensor(_Foreign(owner))
    del owner
    for _ in range(3):
        vt.zeros(1 << 20, device="cuda")
    assert (shared == 3).all().item()


def test_interface_that_is_read_only() -> None:
    owner = vt.ones(4, device="cuda")
    shared = vt.as_tensor(_Foreign(owner, read_only=True))
    assert (shared + 1).tolist() == [2.0] * 4
    with pytest.raises((RuntimeError, ValueError), match="read-only|read only|writ"):
        shared.add_(1)
    assert owner.tolist() == [1.0] * 4


def test_interface_orders_streams() -> None:
    side = vt.cuda.Stream()
    for value in range(10):
        with vt.cuda.stream(side):
            x = vt.zeros(1 << 24, device="cuda")
            for _ in range(5):
                x = x * 1.0
            x = x + value
            producer = _Foreign(x)
        assert producer.__cuda_array_interface__["stream"] == side.cuda_stream
        y = vt.as_tensor(producer) * 2  # on the default stream
        assert (y == 2 * value).all().item()
    for stream in (None, 1, 2):
        assert vt.as_tensor(_Foreign(x, stream=stream)).shape == x.shape
    older = _Foreign(x, version=2)
    del older.__cuda_array_interface__["stream"]
    assert vt.as_tensor(older).shape == x.shape


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"stream": 0}, ValueError, "ambiguous"),
        ({"stream": -3}, ValueError, "not a stream"),
        ({"mask": object()}, TypeError, "masked"),
        ({"typestr": "<c8"}, TypeError, "can't convert"),
        ({"typestr": ">f4"}, TypeError, "byte order"),
        ({"typestr": "f"}, TypeError, "byte order|can't convert"),
        ({"strides": (-4,)}, ValueError, "negative"),
        ({"strides": (2,)}, ValueError, "multiple"),
        ({"strides": (4, 4)}, ValueError, "2 strides for 1"),
        ({"data": (0, False)}, ValueError, "null"),
        ({"data": None}, TypeError, "incomplete"),
        ({"shape": (-1,)}, (ValueError, RuntimeError), "negative"),
    ],
)
def test_interface_that_is_wrong_is_refused(changes: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        vt.as_tensor(_Foreign(vt.ones(3, device="cuda"), **changes))


def test_interface_to_host_memory_is_refused() -> None:
    host = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="not device memory"):
        vt.as_tensor(_Foreign(vt.ones(3, device="cuda"), data=(host.ctypes.data, False)))


def test_arrays_of_cupy_and_numba() -> None:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True):
        theirs = cupy.arange(24, dtype=cupy.float32).reshape(4, 6).T
        ours = vt.as_tensor(theirs)
    assert ours.data_ptr() == theirs.data.ptr
    np.testing.assert_array_equal(ours.cpu().numpy(), theirs.get())
    np.testing.assert_array_equal(vt.tensor(theirs).cpu().numpy(), theirs.get())
    numba = pytest.importorskip("numba.cuda")
    device_array = numba.to_device(np.arange(6.0).reshape(2, 3))
    assert vt.as_tensor(device_array).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
