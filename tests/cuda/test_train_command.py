"""`vibetensor train ... --device cuda`: the losses of `--device cpu`, resumed runs, bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.train.cli import main
from vibetensor.train.metrics import read_metrics

SMALL = ["--layers", "2", "--heads", "2", "--width", "32", "--batch", "8", "--warmup", "5",
         "--eval-batches", "2", "--lr", "3e-3"]  # fmt: skip
TASKS = {
    "minigpt": ["--block", "32"],
    "reverse": ["--length", "5", "--symbols", "4"],
}


def _train(task: str, run: Path, *options: str) -> list[float]:
    arguments = ["train", task, *SMALL, *TASKS[task], "--steps", "60", "--out", str(run), *options]
    assert main(arguments) == 0
    return _losses(run)


def _losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(str(run / "metrics.jsonl")) if "loss" in r]


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_the_cpus(task: str, tmp_path: Path) -> None:
    here = _train(task, tmp_path / "cpu", "--device", "cpu")
    there = _train(task, tmp_path / "cuda", "--device", "cuda")
    assert len(here) == len(there) == 60
    np.testing.assert_allclose(there[:30], here[:30], rtol=2e-4)
    assert abs(np.mean(there[-10:]) - np.mean(here[-10:])) < 0.02 * here[0]


@pytest.mark.parametrize("task", TASKS)
def test_bf16_follows_float32(task: str, tmp_path: Path) -> None:
    full = _train(task, tmp_path / "full", "--device", "cuda")
    half = _train(task, tmp_path / "half", "--device", "cuda", "--dtype", "bf16")
    np.testing.assert_allclose(half[:10], full[:10], rtol=2e-2)
    assert np.mean(half[-10:]) < 0.9 * half[0]
    assert abs(np.mean(half[-10:]) - np.mean(full[-10:])) < 0.05 * full[0]


def test_a_resumed_run_repeats_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, whose numbers the device's generator draws."""
    options = ["--device", "cuda", "--dropout", "0.2", "--save-interval", "40"]
    whole = _train("minigpt", tmp_path / "whole", *options)
    torch.manual_seed(1)
    checkpoint = str(tmp_path / "whole" / "step_40")
    assert main(["train", "minigpt", "--resume", checkpoint]) == 0
    assert _losses(tmp_path / "whole") == whole


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(tmp_path: Path) -> None:
    _train("reverse", tmp_path / "run", "--device", "cuda", "--save-interval", "30")
    there = _losses(tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "step_30")
    assert main(["train", "reverse", "--resume", checkpoint, "--device", "cpu"]) == 0
    np.testing.assert_allclose(_losses(tmp_path / "run"), there, rtol=1e-3)
