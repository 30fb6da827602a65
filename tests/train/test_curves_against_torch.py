"""Whole trainings follow torch's loss curve from torch's own weights and data.

The models of `vibetensor.examples` are built twice from one source: as they stand, and with torch
in place of vibetensor.torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import vibetensor.examples
import vibetensor.torch as vt

torch = pytest.importorskip("torch")

STEPS = 200
EXACT_STEPS = 50  # over these the curves agree to EXACT, relative
EXACT = 1e-4


def example_for_torch(name: str) -> types.ModuleType:
    """An example module with every import of vibetensor turned into one of torch."""
    path = Path(vibetensor.examples.__file__).parent / f"{name}.py"
    source = path.read_text().replace("vibetensor.torch", "torch")
    source = source.replace("vibetensor.examples.", "examples_for_torch_")
    module = types.ModuleType(f"examples_for_torch_{name}")
    sys.modules[module.__name__] = module  # where dataclasses and the other examples find it
    exec(compile(source, str(path), "exec"), vars(module))
    return module


class Minigpt:
    """Learns to count: sequences that go up by a step of their own."""

    def model(self, module: types.ModuleType):
        return module.GPT(module.GPTConfig(vocab_size=32, block_size=16, layers=2, width=32))

    def batch(self, random: np.random.Generator):
        start = random.integers(0, 32, (8, 1))
        walk = (start + random.integers(1, 4, (8, 1)) * np.arange(17)) % 32
        return walk[:, :-1].copy(), walk[:, 1:].copy()

    def loss(self, api, model, x, y):
        return model(x, y)[1]


class Vit:
    """Learns which quarter of an image is bright."""

    def model(self, module: types.ModuleType):
        return module.ViT(
            module.ViTConfig(image_size=16, classes=4, patch=4, layers=2, heads=2, width=32)
        )

    def batch(self, random: np.random.Generator):
        y = random.integers(0, 4, 8)
        x = random.standard_normal((8, 3, 16, 16)).astype(np.float32)
        for image, quarter in zip(x, y):
            top, left = 8 * (quarter // 2), 8 * (quarter % 2)
            image[:, top : top + 8, left : left + 8] += 3.0
        return x, y

    def loss(self, api, model, x, y):
        return api.nn.functional.cross_entropy(model(x), y)


class Mlp:
    """Learns the length of a vector."""

    def model(self, api):
        nn = api.nn
        return nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def batch(self, random: np.random.Generator):
        x = random.standard_normal((32, 8)).astype(np.float32)
        return x, np.linalg.norm(x, axis=1, keepdims=True)

    def loss(self, api, model, x, y):
        return api.nn.functional.mse_loss(model(x), y)


def adamw(api, model):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    return api.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def sgd(api, model):
    return api.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


def train(api, task, model, make_optimizer, batches) -> np.ndarray:
    """The loss of each step, with gradients clipped and a falling rate."""
    optimizer = make_optimizer(api, model)
    schedule = api.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-4)
    losses = []
    for x, y in batches:
        loss = task.loss(api, model, api.as_tensor(x), api.as_tensor(y))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        api.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


CASES = {
    "minigpt-adamw": (Minigpt, "minigpt", adamw, 0.7),
    "vit-adamw": (Vit, "vit", adamw, 0.7),
    "mlp-adamw": (Mlp, None, adamw, 0.5),
    "mlp-sgd": (Mlp, None, sgd, 0.1),
}


@pytest.fixture
def one_thread():
    """So small, work is done before a second thread is awake."""
    before = vt.get_num_threads(), torch.get_num_threads()
    vt.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    vt.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.parametrize("case", CASES)
def test_loss_curve_is_torchs(case, one_thread) -> None:
    make_task, name, make_optimizer, falls_to = CASES[case]
    task = make_task()
    if name is None:
        sources = (vt, torch)
    else:
        if name == "vit":
            example_for_torch("minigpt")  # the transformer's blocks come from there
        ours_module = importlib.import_module(f"vibetensor.examples.{name}")
        sources = (ours_module, example_for_torch(name))
    torch.manual_seed(0)
    ours, theirs = task.model(sources[0]), task.model(sources[1])
    for parameter in theirs.parameters():
        if not parameter.any():  # zeros would hide a bias that is read or copied wrongly
            torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict({k: vt.as_tensor(v.numpy()) for k, v in theirs.state_dict().items()})
    random = np.random.default_rng(0)
    batches = [task.batch(random) for _ in range(STEPS)]

    expected = train(torch, task, theirs, make_optimizer, batches)
    losses = train(vt, task, ours, make_optimizer, batches)

    np.testing.assert_allclose(losses[:EXACT_STEPS], expected[:EXACT_STEPS], rtol=EXACT)
    # Later the roundings grow; how far, the last steps say.
    np.testing.assert_allclose(losses[-20:].mean(), expected[-20:].mean(), rtol=1e-3)
    assert losses[-20:].mean() < falls_to * losses[:5].mean(), "the task was not learned"
