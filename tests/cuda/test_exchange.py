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
