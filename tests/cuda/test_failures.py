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
        ("x[i([7])]", "index: index 7 is out of bounds for a dimension of size 3"),
        ("x[:, i([-5])]", "index: index -5 is out of bounds for a dimension of size 4"),
        ("F.embedding(i([9]), x)", "embedding: index 9 is out of bounds for a dimension of size 3"),
        (
            "F.cross_entropy(x, i([1, 5, 0]))",
            "cross_entropy: Target 5 is out of bounds (4 classes)",
        ),
        ("x.index_select(1, i([4]))", "index_select: index 4 is out of bounds"),
        ("x.gather(0, i([[3]]))", "gather: index 3 is out of bounds for a dimension of size 3"),
        ("x.scatter_(1, i([[-1]]), 1.0)", "scatter_: index -1 is out of bounds"),
        ("x.index_add_(0, i([8]), x[:1])", "index_add_: index 8 is out of bounds"),
        (
            "x[:0].scatter_add_(0, i([[0]]), x)",
            "scatter_add_: index 0 is out of bounds for a dimension of size 0",
        ),
        (
            "torch.searchsorted(x[0], x[0], sorter=i([0, 1, 9, 2]))",
            "searchsorted: sorter index 9 is out of bounds for a row of size 4",
        ),
        ("torch.bernoulli(i([0.5, 1.5]))", "but got 1.5 at element 1"),
        ("torch.multinomial(i([0.5, -1.0]), 1)", "multinomial: probability tensor contains either"),
        (
            "torch.multinomial(i([[0.5, 1.0], [0.0, 0.0]]), 3, replacement=True)",
            "multinomial: invalid multinomial distribution (sum of probabilities <= 0) in row 1",
        ),
        (
            "torch.multinomial(i([1.0, 0.0, 0.0]), 2)",
            "not enough non-negative category to sample) in row 0",
        ),
    ],
)
def test_bad_data_stops_the_kernel_with_its_name(
    run_python: Callable[..., Any], code: str, says: str
) -> None:
    done = run_python(
        "import vibetensor.torch as torch\n"
        "F = torch.nn.functional\n"
        "i = lambda values: torch.tensor(values).cuda()\n"
        "x = torch.randn(3, 4).cuda()\n"
        "def attempt(name, call):\n"
        "    try:\n"
        "        call()\n"
        "        torch.cuda.synchronize()\n"
        "    except RuntimeError as error:\n"
        "        print(name, error)\n"
        f"attempt('caught', lambda: {code})\n"
        # The context is lost: whatever comes later says so, and which op it was.
        "attempt('later', lambda: x + 1)\n"
        "attempt('later', lambda: x.cpu())\n"
        "attempt('later', lambda: torch.ones(1 << 28, device='cuda'))\n"
        "attempt('later', lambda: x.sum().item())\n"
        "print('the host goes on:', (torch.ones(2) + 1).tolist())\n"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    caught = [line for line in lines if line.startswith("caught")]
    later = [line for line in lines if line.startswith("later")]
    assert len(caught) == 1 and len(later) == 4, done.stdout
    for line in (*caught, *later):
        assert "CUDA error" in line
        assert "the device cannot be used again in this process" in line
        assert says in line
    assert "the host goes on: [2.0, 2.0]" in done.stdout


def test_devices_that_are_wrong_are_named() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for call in (lambda: there + here, lambda: here.add_(there), lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="same device") as caught:
            call()
        assert "cuda:0" in str(caught.value) and "cpu" in str(caught.value)
    missing = f"cuda:{torch.cuda.device_count()}"
    for refused in (
        lambda: torch.ones(3, device=missing),
        lambda: here.to(missing),
        lambda: torch.nn.Linear(2, 2).to(missing),
        lambda: torch.cuda.synchronize(missing),
        lambda: torch.cuda.set_device(missing),
        lambda: torch.cuda.Stream(missing),
        lambda: torch.cuda.memory_stats(missing),
    ):
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            refused()
    assert torch.cuda.current_device() == 0
    assert (there + 1).sum().item() == 6


def test_running_out_over_and_over_leaves_the_pools_usable() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    _, total = torch.cuda.mem_get_info()
    part = total // 8
    for _ in range(3):
        held = []
        with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate"):
            for _ in range(16):
                held.append(torch.empty(part, dtype=torch.uint8, device="cuda"))
        assert len(held) >= 1
        held[-1].fill_(3)
        with pytest.raises(torch.cuda.OutOfMemoryError):  # in the middle of an op
            held[-1].reshape(-1)[: part // 8 * 8].double()
        assert held[-1][-1].item() == 3
        del held
        x = torch.ones(1 << 20, device="cuda", requires_grad=True)
        (x * x).sum().backward()
        assert x.grad is not None and (x.grad == 2).all().item()
        del x
        _consistent()
    assert torch.cuda.memory_allocated() == before
    torch.cuda.empty_cache()


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
        # Refused before anything is under way.
        for host in (torch.zeros(3), torch.zeros(3).pin_memory()):
            with pytest.raises(RuntimeError, match="copying from the host"):
                x.copy_(host)
        with pytest.raises(RuntimeError, match="copying from pageable memory"):
            x.copy_(torch.zeros(3), non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.tolist() == [1, 1, 1]
    with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            assert x.sum().item() == 3
        finally:
            torch.cuda.set_sync_debug_mode("default")
