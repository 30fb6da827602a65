"""Text from a trained run."""

from __future__ import annotations

from typing import Any

from vibetensor.io import safetensors
from vibetensor.train.checkpoint import find_checkpoint, read_state
from vibetensor.train.config import TrainConfig
from vibetensor.train.tasks import build_gpt
from vibetensor.train.text_data import Vocabulary


def load_gpt(run: str) -> tuple[Any, Vocabulary]:
    """The model and vocabulary of a minigpt run folder or of one of its step_N folders."""
    checkpoint = find_checkpoint(run)
    saved = dict(read_state(checkpoint)["config"])
    assets = saved.pop("assets")
    config = TrainConfig(**saved)
    if config.task != "minigpt":
        raise ValueError(f"'{run}' is a {config.task} run; only minigpt runs can be sampled")
    model = build_gpt(config, assets)
    safetensors.load_model(model, f"{checkpoint}/model.safetensors")
    return model.eval(), Vocabulary(**assets["vocabulary"])
