"""The training workloads: each model once, in plain torch style, taking the library as an argument.

A workload has three sizes: "full" is what results are published for, "small" runs on a CPU in
seconds, "tiny" is for tests.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from workloads import gpt, llama, vit
from workloads.gpt import GPTConfig
from workloads.llama import LlamaConfig
from workloads.vit import ViTConfig

SCALES = ("full", "small", "tiny")


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained.

    make(t, config): the model in library t. batch(config, rng): inputs and targets of one step as
    arrays. dtype: what a GPU computes in: "bfloat16" is under autocast, with float32 weights.
    """

    name: str
    make: Callable[[Any, Any], Any]
    batch: Callable[[Any, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    full: Any
    small: Any
    tiny: Any
    dtype: str = "bfloat16"
    optimizer: str = "AdamW"
    lr: float = 3e-4

    def config(self, scale: str) -> Any:
        """The sizes at "full", "small" or "tiny" scale."""
        return getattr(self, scale)

    def make_optimizer(self, t: Any, parameters: Any, **options: Any) -> Any:
        """The workload's optimizer on parameters of library t."""
        return getattr(t.optim, self.optimizer)(parameters, lr=self.lr, **options)


def load_initial_weights(t: Any, model: Any, seed: int = 0) -> None:
    """Gives a model of either library the same weights: matrices N(0, 0.02), as GPT-2's; norms'
    weights 1; biases 0."""

    def values(named: tuple[str, Any]) -> np.ndarray:
        name, shape = named[0], tuple(named[1].shape)
        if len(shape) <= 1:
            return np.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=np.float32)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    parameters = list(model.named_parameters())
    # NumPy draws without the interpreter's lock: a billion numbers by one thread take 15 s.
    with ThreadPoolExecutor() as pool, t.no_grad():
        for (_, parameter), made in zip(parameters, pool.map(values, parameters)):
            parameter.copy_(t.from_numpy(made))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "minigpt",
            gpt.make,
            gpt.next_token_batch,
            full=GPTConfig(6, 384, 6, 256, 64, 65, bias=False),
            small=GPTConfig(4, 128, 4, 64, 12, 65, bias=False),
            tiny=GPTConfig(2, 16, 2, 8, 2, 11, bias=False),
        ),
        Workload(
            "vit",
            vit.make,
            vit.batch,
            full=ViTConfig(6, 384, 6, 512),
            small=ViTConfig(2, 96, 3, 8),
            tiny=ViTConfig(2, 16, 2, 2, patch=4, side=8),
        ),
        Workload(
            "gpt2",
            gpt.make,
            gpt.next_token_batch,
            full=GPTConfig(12, 768, 12, 1024, 32, 50304, tied=True),
            small=GPTConfig(2, 128, 4, 64, 4, 1024, tied=True),
            tiny=GPTConfig(2, 16, 2, 8, 2, 11, tied=True),
        ),
        Workload(
            "llama1b",
            llama.make,
            llama.batch,
            full=LlamaConfig(16, 2048, 32, 8, 8192, 2048, 8, 32000),
            small=LlamaConfig(2, 128, 8, 2, 512, 64, 4, 1024),
            tiny=LlamaConfig(2, 16, 4, 2, 32, 8, 2, 11),
        ),
        Workload(
            "reverse",
            gpt.make,
            gpt.reversed_batch,
            full=GPTConfig(2, 128, 4, 64, 64, 36, causal=False),
            small=GPTConfig(2, 128, 4, 64, 8, 36, causal=False),
            tiny=GPTConfig(2, 16, 2, 8, 2, 11, causal=False),
            dtype="float32",
            optimizer="SGD",
            lr=0.1,
        ),
        Workload(
            "vibe-vit",
            vit.make,
            vit.batch,
            full=ViTConfig(6, 256, 8, 256, extra=16),
            small=ViTConfig(2, 64, 4, 8, extra=16),
            tiny=ViTConfig(2, 16, 2, 2, patch=4, side=8, extra=4),
            dtype="float32",
        ),
        Workload(
            "vibe-shakespeare",
            gpt.make,
            gpt.next_token_batch,
            full=GPTConfig(6, 256, 8, 128, 64, 4096),
            small=GPTConfig(2, 64, 4, 64, 8, 512),
            tiny=GPTConfig(2, 16, 2, 8, 2, 11),
            dtype="float32",
        ),
    )
}
