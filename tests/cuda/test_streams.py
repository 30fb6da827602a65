"""Devices, streams, events and copies."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch


def test_device_is_described() -> None:
    properties = torch.cuda.get_device_properties()
    assert properties.name and properties.total_memory > 2**30
    assert torch.cuda.get_device_capability() == (properties.major, properties.minor)
    assert torch.cuda.current_device() == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total


def test_tensor_knows_its_device() -> None:
    x = torch.ones(2, device="cuda")
    assert x.device == torch.device("cuda", 0)
    assert x.is_cuda and x.get_device() == 0
    assert torch.zeros_like(x).device == x.device
    assert "device='cuda:0'" in repr(x)


def test_current_stream_and_context() -> None:
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() == side
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_stream_protocol_both_ways() -> None:
    side = torch.cuda.Stream(priority=-1)
    assert side.priority == -1
    version, handle = side.__cuda_stream__()
    assert (version, handle) == (0, side.cuda_stream)

    class Foreign:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, side.cuda_stream

    with torch.cuda.stream(Foreign()):
        assert torch.cuda.current_stream() == side
    assert torch.cuda.ExternalStream(handle) == side


def test_work_on_another_stream_is_ordered_by_events() -> None:
    side = torch.cuda.Stream()
    x = torch.full((1 << 20,), 2.0, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 3
    torch.cuda.current_stream().wait_stream(side)
    assert (y + 1).cpu().numpy().tolist() == [7.0] * (1 << 20)


def test_event_times_work() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    x = torch.ones(1 << 24, device="cuda")
    start.record()
    for _ in range(10):
        x = x * 1.5
    end.record()
    end.synchronize()
    assert start.query() and end.query()
    assert 0 < start.elapsed_time(end) < 1000
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(torch.cuda.Event(enable_timing=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool", "uint8"])
@pytest.mark.parametrize("pinned", [False, True])
def test_round_trip(dtype: str, pinned: bool) -> None:
    host = torch.arange(1000).remainder(2).to(getattr(torch, dtype)).reshape(10, 100)
    if pinned:
        host = host.pin_memory()
        assert host.is_pinned()
    there = host.to("cuda", non_blocking=True)
    for view in (lambda t: t, lambda t: t.t(), lambda t: t[::2, 3:70:5], lambda t: t[3]):
        back = view(there).cpu()
        assert back.dtype == host.dtype
        assert torch.equal(back, view(host))


def test_copies_convert_and_broadcast() -> None:
    target = torch.zeros(4, 3, dtype=torch.float64, device="cuda")
    target.copy_(torch.arange(3, dtype=torch.int32))
    assert target.tolist() == [[0.0, 1.0, 2.0]] * 4
    host = torch.zeros(3, 4, dtype=torch.int16).t()
    host.copy_(target)
    assert host.tolist() == [[0, 1, 2]] * 4


def test_mixed_devices_are_refused_by_name() -> None:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    for call in (lambda: there + here, lambda: there @ here, lambda: here @ there):
        with pytest.raises(RuntimeError, match="same device"):
            call()
    assert (there + torch.tensor(2.0)).tolist() == [[3.0, 3.0]] * 2
    assert (there * 2).tolist() == [[2.0, 2.0]] * 2


def test_missing_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device=f"cuda:{torch.cuda.device_count()}")


def test_numpy_asks_for_a_copy_first() -> None:
    with pytest.raises(TypeError, match="Tensor.cpu"):
        torch.ones(2, device="cuda").numpy()
    assert np.array_equal(torch.ones(2, device="cuda").numpy(force=True), np.ones(2))
