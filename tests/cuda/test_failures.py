"""What goes wrong on a device is named, and what can go on goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as torch


def _consistent() -> None:
    from vibetensor import _cuda  # pyright: ignore

    torch.cuda.synchronize()
    assert _cuda.check_memory(0) == ""


def test_out_of_memory_names_who_holds_what_and_is_survived() -> None:
    kept = torch.ones(1 << 20, device="cuda")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate .*TiB") as caught:
            torch.empty(1 << 42, device="cuda")
        assert "default" in str(caught.value) and "GiB" in str(caught.value)
    assert torch.cuda.memory_allocated() == before
    assert (kept + 1).sum().item() == 2 * (1 << 20)
    assert torch.cuda.memory_stats()["num_ooms"] >= 3
    _consistent()


def test_cached_memory_is_given_back_before_an_error() -> None:
    free, _ = torch.cuda.mem_get_info()
    half = int(free * 0.6) // 4
    first = torch.empty(half, device="cuda")
    del first
    second = torch.empty(half // 2, device="cuda")
    third = torch.empty(half // 2, dtype=torch.int32, device="cuda")
    third.zero_()
    assert third[-1].item() == 0
    del second, third
    torch.cuda.empty_cache()
    _consistent()


def test_limit_is_kept() -> None:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((held + (64 << 20)) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    _consistent()


def test_memory_used_on_another_stream_waits_for_it() -> None:
    side = torch.cuda.Stream()
    size = 64 << 20
    for value in range(5):
        x = torch.full((size,), float(value), device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x.clone()
            for _ in range(3):
                y = y + x - x
        x.record_stream(side)
        del x
        torch.full((size,), -1.0, device="cuda")  # would overwrite x if its memory were free
        torch.cuda.current_stream().wait_stream(side)
        assert (y == value).all().item()
    _consistent()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x[torch.tensor([7]).cuda()]", "index"),
        ("torch.nn.functional.embedding(torch.tensor([9]).cuda(), x)", "embedding"),
        ("torch.nn.functional.cross_entropy(x, torch.tensor([1, 5, 0]).cuda())", "cross_entropy"),
    ],
)
def test_bad_index_stops_the_kernel_with_its_name(
    run_python: Callable[..., Any], code: str, says: str
) -> None:
    done = run_python(
        "import vibetensor.torch as torch\n"
        "x = torch.randn(3, 4).cuda()\n"
        "try:\n"
        f"    {code}\n"
        "    torch.cuda.synchronize()\n"
        "except RuntimeError as error:\n"
        "    print('caught', error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "caught CUDA error" in done.stdout
    assert says in done.stdout


def test_launch_errors_surface_at_their_op_when_blocking(run_python: Callable[..., Any]) -> None:
    done = run_python(
        "import vibetensor.torch as torch\n"
        "x = torch.randn(3, 4).cuda()\n"
        "index = torch.tensor([7]).cuda()\n"
        "try:\n"
        "    torch.nn.functional.embedding(index, x)\n"
        "except RuntimeError as error:\n"
        "    print('at the op:', error)\n",
        env={"VT_CUDA_LAUNCH_BLOCKING": "1"},
    )
    assert "at the op: CUDA error" in done.stdout, done.stderr


def test_waits_are_refused_when_asked() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            assert x.sum().item() == 3
        finally:
            torch.cuda.set_sync_debug_mode("default")
