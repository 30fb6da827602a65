"""A whole training step of a GPT in both libraries, known to do the same work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from train_process import make_step
from workloads import gpt, load_initial_weights

import vibetensor.torch as vt

CHECKED = 5  # steps whose losses are compared


def step_pair(
    config: gpt.GPTConfig, device: str, dtype: str, tolerance: float
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """vibetensor's step and torch's, on one batch from the same weights. AssertionError where their
    first losses differ by more than `tolerance` of torch's."""
    arrays = gpt.next_token_batch(config, np.random.default_rng(0))
    steps = []
    for t in (vt, torch):
        model = gpt.make(t, config)
        load_initial_weights(t, model)
        model = model.to(device)
        optimizer = t.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        step = make_step(t, model, model, optimizer, device, dtype)
        steps.append(functools.partial(step, *(t.from_numpy(a).to(device) for a in arrays)))
    ours, theirs = steps
    losses = [(ours()[0].item(), theirs()[0].item()) for _ in range(CHECKED)]
    for mine, other in losses:
        assert abs(mine - other) <= tolerance * abs(other), losses
    return ours, theirs
