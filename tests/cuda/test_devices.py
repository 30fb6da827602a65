"""Several GPUs: what is made, computed, copied and counted on each, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.torch import nn

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
BOTH_WAYS = [(FIRST, SECOND), (SECOND, FIRST)]


def test_ops_run_where_their_tensors_are() -> None:
    x = torch.arange(12, dtype=torch.float32, device=SECOND).reshape(3, 4)
    assert torch.cuda.current_device() == 0
    for result in (x + 1, x.t() @ x, x.sum(0), x[torch.tensor([2, 0]).to(SECOND)], x.sort(1)[0]):
        assert result.device == SECOND
    assert (x + 1).sum().item() == 78
    assert (x.t() @ x).tolist() == (x.cpu().t() @ x.cpu()).tolist()
    assert x.sort(1, descending=True)[0].tolist() == x.cpu().flip(1).tolist()
    assert x[torch.tensor([2, 0]).to(SECOND)].tolist() == x.cpu()[[2, 0]].tolist()
    assert x.softmax(1).sum(1).cpu().allclose(torch.ones(3))
    big = torch.ones(300, 200, device=SECOND) @ torch.ones(200, 250, device=SECOND)
    assert (big == 200).all().item()
    assert torch.cuda.current_device() == 0


def test_attention_and_large_products_run_on_each_device() -> None:
    for device in (FIRST, SECOND):
        q = torch.randn(2, 4, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        out.float().sum().backward()
        assert out.device == device and q.grad is not None and q.grad.device == device
        assert q.grad.isfinite().all().item()
        expected = nn.functional.scaled_dot_product_attention(
            *[q.detach().cpu().double()] * 3, is_causal=True
        )
        assert (out.detach().cpu().double() - expected).abs().max().item() < 0.03


def test_current_device_is_a_scope_and_of_the_thread() -> None:
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        assert torch.ones(2, device="cuda").device == SECOND
        assert torch.cuda.current_stream().device == SECOND
        with torch.cuda.device(FIRST):
            assert torch.ones(2).cuda().device == FIRST
        assert torch.cuda.current_device() == 1
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert seen == [0]
    assert torch.cuda.current_device() == 0
    x = torch.ones(2, device=SECOND)
    with torch.cuda.device_of(x):
        assert torch.cuda.current_device() == 1
    torch.cuda.set_device(1)
    try:
        assert torch.empty(1, device="cuda").device == SECOND
    finally:
        torch.cuda.set_device(0)


def test_threads_work_on_a_device_each() -> None:
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            device = torch.device("cuda", index % 2)
            torch.cuda.set_device(device)
            for step in range(50):
                x = torch.full((100, 100), float(index), device="cuda")
                assert x.device == device
                assert (x @ x).sum().item() == 1e6 * index * index
                y = x.to(torch.device("cuda", 1 - index % 2))
                assert (y + step).sum().item() == 1e4 * (index + step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "threads are stuck"
    assert not failures, failures[0]


@pytest.mark.parametrize(("source", "target"), BOTH_WAYS)
def test_copies_between_devices(source: torch.device, target: torch.device) -> None:
    host = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    there = host.to(source)
    assert torch.equal(there.to(target).cpu(), host)
    for view in (lambda t: t.t(), lambda t: t[1::2, ::3], lambda t: t[:, 4], lambda t: t[2, 2]):
        moved = view(there).to(target)
        assert moved.device == target
        assert torch.equal(moved.cpu(), view(host))
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        moved = there.to(target, dtype)
        assert moved.device == target and moved.dtype == dtype
        assert torch.equal(moved.cpu(), host.to(dtype))
    into = torch.zeros(10, 6, dtype=torch.float64, device=target)
    into.t().copy_(there)
    assert torch.equal(into.cpu(), host.t().double())
    into[::2].copy_(there[0, :6])  # broadcast as well
    assert torch.equal(into[::2].cpu(), host[0, :6].double().expand(5, 6))
    empty = torch.empty(0, 3, device=source).to(target)
    assert empty.shape == (0, 3) and empty.device == target


@pytest.mark.parametrize(("source", "target"), BOTH_WAYS)
def test_copies_wait_for_what_they_read_and_overwrite(
    source: torch.device, target: torch.device
) -> None:
    size = 1 << 24
    for value in range(5):
        x = torch.zeros(size, device=source)
        for _ in range(8):
            x = x * 0.5 + value / 2
        into = torch.zeros(size, device=target)
        for _ in range(8):
            into = into + 1
        into.copy_(x, non_blocking=True)
        doubled = into * 2
        expected = x.cpu()
        del x
        torch.full((size,), -1.0, device=source)  # would overwrite x if it were free too early
        assert torch.equal(doubled.cpu(), expected * 2)


def test_peer_access_is_told() -> None:
    for a, b in BOTH_WAYS:
        assert isinstance(torch.cuda.can_device_access_peer(a, b), bool)
    assert torch.cuda.can_device_access_peer(FIRST, FIRST) is False


def test_copies_without_peer_access(run_python: Callable[..., Any]) -> None:
    """Memory of the driver's own pool is not open to peers; the driver then copies on its own."""
    done = run_python(
        "import vibetensor.torch as torch\n"
        "x = torch.arange(1 << 20, device='cuda:0')\n"
        "y = x.to('cuda:1')\n"
        "assert torch.equal(y.cpu(), x.cpu())\n"
        "assert torch.equal(y[::3].to('cuda:0', torch.float64).cpu(), x.cpu()[::3].double())\n"
        "print('copied')\n",
        env={"VT_CUDA_ALLOC": "backend:async"},
    )
    assert "copied" in done.stdout, done.stderr


def test_streams_and_events_across_devices() -> None:
    on_first, on_second = torch.cuda.Stream(FIRST), torch.cuda.Stream(SECOND)
    assert on_second.device == SECOND
    assert torch.cuda.current_stream(SECOND) == torch.cuda.default_stream(SECOND)
    size = 1 << 24
    x = torch.zeros(size, device=FIRST)
    y = torch.zeros(size, device=SECOND)
    torch.cuda.synchronize(FIRST)
    torch.cuda.synchronize(SECOND)
    event = torch.cuda.Event()
    with torch.cuda.stream(on_first):
        for _ in range(10):
            x += 1
        event.record()
    with torch.cuda.stream(on_second):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream(FIRST) == torch.cuda.default_stream(FIRST)
        on_second.wait_event(event)
        with torch.cuda.stream(on_first):  # its copy follows x on on_first, and y on on_second
            y.copy_(x)
        y *= 2
    on_second.synchronize()
    assert (y == 20).all().item()
    assert event.query()
    with pytest.raises(RuntimeError, match="does not match recording stream's device"):
        event.record(on_second)
    assert torch.cuda.current_device() == 0


def test_a_model_over_both_devices_learns_as_on_one() -> None:
    def train(second: torch.device) -> list[float]:
        torch.manual_seed(0)
        front = nn.Sequential(nn.Linear(8, 32), nn.GELU())
        back = nn.Linear(32, 4)
        front.to(FIRST)
        back.to(second)
        optimizer = torch.optim.AdamW([*front.parameters(), *back.parameters()], lr=0.01)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(FIRST)
        target = torch.arange(64).remainder(4).to(second)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(back(front(x).to(second)), target)
            loss.backward()
            norm = nn.utils.clip_grad_norm_([*front.parameters(), *back.parameters()], 1.0)
            assert norm.isfinite().item()
            optimizer.step()
            losses.append(loss.item())
        for module, device in ((front, FIRST), (back, second)):
            for parameter in module.parameters():
                assert parameter.device == device
                assert parameter.grad is not None and parameter.grad.device == device
        return losses

    split, whole = train(SECOND), train(FIRST)
    assert whole[-1] < whole[0]
    assert split == pytest.approx(whole, rel=1e-4)


def test_gradients_cross_both_ways() -> None:
    x = torch.randn(5, 3, device=FIRST, requires_grad=True)
    w = torch.randn(3, 3, device=SECOND, requires_grad=True)
    y = (x.to(SECOND) @ w).to(FIRST, torch.float64)
    (y * x).sum().backward()
    assert x.grad is not None and x.grad.device == FIRST
    assert w.grad is not None and w.grad.device == SECOND
    cx = x.detach().cpu().requires_grad_()
    cw = w.detach().cpu().requires_grad_()
    ((cx @ cw).double() * cx).sum().backward()
    assert x.grad.cpu().allclose(cx.grad, atol=1e-5)
    assert w.grad.cpu().allclose(cw.grad, atol=1e-5)


def test_random_numbers_of_each_device() -> None:
    torch.cuda.manual_seed_all(7)
    first, second = torch.randn(1000, device=FIRST), torch.randn(1000, device=SECOND)
    assert torch.equal(first.cpu(), second.cpu())  # one seed, one stream of numbers
    more = torch.randn(1000, device=SECOND)
    state = torch.cuda.get_rng_state(SECOND)
    next_second = torch.randn(10, device=SECOND)
    assert torch.equal(torch.randn(1000, device=FIRST).cpu(), more.cpu())
    torch.cuda.set_rng_state(state, SECOND)
    assert torch.equal(torch.randn(10, device=SECOND), next_second)
    with torch.cuda.device(1):
        torch.cuda.manual_seed(11)
        assert torch.cuda.initial_seed() == 11
    assert torch.cuda.initial_seed() == 7
    generator = torch.Generator(SECOND).manual_seed(3)
    assert torch.rand(5, device=SECOND, generator=generator).device == SECOND
    with pytest.raises(RuntimeError, match="Expected a 'cuda:1' device type for generator"):
        torch.rand(5, device=SECOND, generator=torch.Generator())


def test_memory_is_counted_by_device() -> None:
    torch.cuda.synchronize(SECOND)
    first, second = torch.cuda.memory_allocated(FIRST), torch.cuda.memory_allocated(SECOND)
    torch.cuda.reset_peak_memory_stats(SECOND)
    x = torch.empty(10 << 20, dtype=torch.uint8, device=SECOND)
    assert torch.cuda.memory_allocated(SECOND) == second + (10 << 20)
    assert torch.cuda.memory_allocated(FIRST) == first
    del x
    assert torch.cuda.memory_allocated(SECOND) == second
    assert torch.cuda.max_memory_allocated(SECOND) >= second + (10 << 20)
    torch.cuda.empty_cache()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="GPU 1|cuda:1|device 1"):
        torch.empty(1 << 42, device=SECOND)
    torch.ones(10, device=SECOND)
    assert torch.cuda.mem_get_info(SECOND)[1] > 0
    from vibetensor import _cuda  # pyright: ignore

    torch.cuda.synchronize(SECOND)
    assert _cuda.check_memory(0) == "" and _cuda.check_memory(1) == ""


def test_mixed_devices_are_refused_by_name() -> None:
    a, b = torch.ones(2, 2, device=FIRST), torch.ones(2, 2, device=SECOND)
    for call in (
        lambda: a + b,
        lambda: a @ b,
        lambda: torch.cat([a, b]),
        lambda: torch.where(a > 0, a, b),
        lambda: nn.functional.linear(a, b),
        lambda: a.index_select(0, torch.tensor([0], device=SECOND)),
        lambda: a.add_(b),
    ):
        with pytest.raises(RuntimeError, match="same device") as caught:
            call()
        assert "cuda:0" in str(caught.value) and "cuda:1" in str(caught.value)
    assert (a + torch.tensor(2.0)).tolist() == [[3.0, 3.0]] * 2
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:63")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(63)
    assert torch.cuda.current_device() == 0
