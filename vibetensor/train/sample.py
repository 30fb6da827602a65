"""Text from a trained run."""

from __future__ import annotations

from typing import Any

from vibetensor.io import safetensors
from vibetensor.train.checkpoint import brief, find_checkpoint, read_state
from vibetensor.train.config import TrainConfig
from vibetensor.train.tasks import build_gpt
from vibetensor.train.text_data import Vocabulary


def load_gpt(run: str) -> tuple[Any, Vocabulary]:
    """The model and vocabulary of a minigpt run folder or of one of its step_N folders."""
    checkpoint = find_checkpoint(run)
    saved = read_state(checkpoint)["config"]
    config = TrainConfig.from_checkpoint(saved, checkpoint)
    if config.task != "minigpt":
        raise ValueError(f"'{run}' is a {config.task} run; only minigpt runs can be sampled")
    try:
        vocabulary = Vocabulary(**saved["assets"]["vocabulary"])
    except (LookupError, TypeError) as error:
        raise ValueError(f"'{checkpoint}' is damaged: it has no vocabulary") from error
    model = build_gpt(config, saved["assets"])
    path = f"{checkpoint}/model.safetensors"
    try:
        safetensors.load_model(model, path)
    except RuntimeError as error:
        raise ValueError(
            f"'{path}' does not hold the model of its state.json: {brief(error)}"
        ) from error
    return model.eval(), vocabulary
