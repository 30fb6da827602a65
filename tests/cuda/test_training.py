"""Whole trainings on the device: the CPU's loss curve, no waits, no driver allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.examples import minigpt, reverse, vit

F = torch.nn.functional


def _minigpt() -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    model = minigpt.GPT(minigpt.GPTConfig(vocab_size=32, block_size=16, layers=2, width=32))

    def batch(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        start = random.integers(0, 32, (8, 1))
        walk = (start + random.integers(1, 4, (8, 1)) * np.arange(17)) % 32
        return walk[:, :-1].copy(), walk[:, 1:].copy()

    return model, batch, lambda m, x, y: m(x, y)[1]


def _vit() -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    model = vit.ViT(vit.ViTConfig(image_size=16, classes=4, patch=4, layers=2, heads=2, width=32))

    def batch(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        y = random.integers(0, 4, 8)
        x = random.standard_normal((8, 3, 16, 16)).astype(np.float32)
        x += y[:, None, None, None].astype(np.float32)
        return x, y

    return model, batch, lambda m, x, y: F.cross_entropy(m(x), y)


def _reverse() -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    model = reverse.build_model(length=6, symbols=4, layers=2, heads=2, width=32)

    def batch(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        draws = torch.Generator().manual_seed(int(random.integers(2**31)))
        tokens, targets = reverse.make_batch(16, 6, 4, draws)
        return tokens.numpy(), targets.numpy()

    return model, batch, lambda m, x, y: m(x, y)[1]


def _mlp() -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    nn = torch.nn
    model = nn.Sequential(
        nn.Linear(8, 33), nn.BatchNorm1d(33), nn.GELU(), nn.RMSNorm(33), nn.Linear(33, 1)
    )

    def batch(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        x = random.standard_normal((32, 8)).astype(np.float32)
        return x, np.square(x).sum(1, keepdims=True)

    return model, batch, lambda m, x, y: F.smooth_l1_loss(m(x), y)


def _losses(make: Callable[..., Any], device: str, optimizer: str, steps: int) -> list[float]:
    torch.manual_seed(0)
    model, batch, loss_of = make()
    model = model.to(device)
    if optimizer == "sgd":
        step = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    else:
        step = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=optimizer == "fused")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step, steps)
    random = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        x, y = (torch.from_numpy(part).to(device) for part in batch(random))
        loss = loss_of(model, x, y)
        step.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["fused", "foreach", "sgd"])
@pytest.mark.parametrize("make", [_minigpt, _vit, _reverse, _mlp])
def test_follows_the_cpu(make: Callable[..., Any], optimizer: str) -> None:
    here, there = (_losses(make, device, optimizer, 100) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there[:40], here[:40], rtol=2e-4)
    assert there[-1] < there[0]
    assert abs(np.mean(there[-10:]) - np.mean(here[-10:])) < 0.05 * here[0]


def test_a_run_repeats_bit_for_bit() -> None:
    assert _losses(_minigpt, "cuda", "fused", 20) == _losses(_minigpt, "cuda", "fused", 20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_learns(dtype: str) -> None:
    torch.manual_seed(0)
    model, batch, loss_of = _minigpt()
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    random = np.random.default_rng(0)
    losses = []
    for _ in range(150):
        x, y = (torch.from_numpy(part).cuda() for part in batch(random))
        with torch.autocast("cuda", dtype=getattr(torch, dtype)):
            loss = loss_of(model, x, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_steady_state_neither_allocates_nor_waits() -> None:
    from vibetensor import _cuda  # pyright: ignore

    torch.manual_seed(0)
    model, batch, loss_of = _minigpt()
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    random = np.random.default_rng(0)
    host = [[torch.from_numpy(part).pin_memory() for part in batch(random)] for _ in range(8)]

    def step(number: int) -> None:
        x, y = (part.to("cuda", non_blocking=True) for part in host[number])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(model, x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for number in range(2):
        step(number)
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["num_device_alloc"]
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    waits = _cuda.implicit_syncs()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 8):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == allocations
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned
    assert _cuda.implicit_syncs() == waits
