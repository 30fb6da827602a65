"""AdamW with stochastic rounding on CUDA: the CPU's draws, so nearly the CPU's bits; many tensors,
chunks that end early, pointers that are not aligned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.graphs import capture

SIZES = [(64, 300), (8191,), (3,), (1,), (0,), (2, 8193), (40_000,), *[(17,)] * 300]


def _run(device: str, odd: bool, steps: int = 3, **options: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    torch.manual_seed(7)
    params = []
    for size in SIZES:
        values = torch.tensor(rng.standard_normal(size)).to(torch.bfloat16).to(device)
        if odd:  # two bytes beyond an aligned place
            place = torch.zeros(values.numel() + 1, dtype=torch.bfloat16, device=device)
            values = place[1:].view(size).copy_(values)
        params.append(values.requires_grad_())
    optimizer = torch.optim.AdamW(params, lr=0.01, stochastic_rounding=True, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.tensor(rng.standard_normal(tuple(p.shape))).to(torch.bfloat16).to(device)
        optimizer.step()
    state = [optimizer.state[p][k] for p in params for k in ("exp_avg", "exp_avg_sq")]
    return [t.detach().float().cpu().numpy() for t in [*params, *state]]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}])
def test_draws_are_the_cpus(odd: bool, options: dict[str, Any]) -> None:
    ours, other = _run("cuda", odd, **options), _run("cpu", odd, **options)
    apart = sum(int((a != b).sum()) for a, b in zip(ours, other, strict=True))
    # Float32 arithmetic differs in the last bit, which tips a draw now and then.
    assert apart < 0.001 * sum(a.size for a in ours)
    for a, b in zip(ours, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-6)


def test_the_mean_is_that_of_float32() -> None:
    n = 1_000_000
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.full_like(p, 0.5)
    torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=True).step()
    chance = 1e-4 / 2**-8  # of the neighbour below
    moved = float((p < 1).double().mean())
    assert abs(moved - chance) < 5 * (chance * (1 - chance) / n) ** 0.5


def test_captured_steps_draw_on() -> None:
    results = []
    for wrap in (lambda f: f, capture):
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.ones(50_000, dtype=torch.bfloat16, device="cuda"))
        optimizer = torch.optim.AdamW([p], lr=1e-3, stochastic_rounding=True)

        def step(x: Any, p: Any = p, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            (p * x).sum().backward()
            optimizer.step()

        step = wrap(step)
        for i in range(6):
            step(torch.tensor(1.0 + i, dtype=torch.bfloat16, device="cuda"))
        results.append(p.detach().float().cpu().numpy())
    assert (results[0] == results[1]).all()
