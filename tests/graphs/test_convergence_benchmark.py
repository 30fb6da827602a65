"""bench/convergence.py and its chart, at the smallest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import convergence
import numpy as np
import pytest
from curves import curves

import vibetensor.torch as vt

ROOT = Path(__file__).parents[2]
TEXT = b"the cat and the dog and the bird: one, two.\n" * 40


def path() -> str:
    """PYTHONPATH of a process that imports this package, wherever it lies."""
    return os.pathsep.join([str(Path(vt.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])


def test_frequent_words_are_tokens_and_others_bytes() -> None:
    train, held_out = convergence.tokens(TEXT, b"the eel", 2000)
    assert train[0] >= 256 and len(set(train[train >= 256])) >= 7
    word, space = train[:2]  # a single space is a byte
    assert list(held_out) == [word, space, *b"eel"] and space == ord(" ")


def test_a_small_vocabulary_has_one_number_for_what_is_rare() -> None:
    train, held_out = convergence.tokens(TEXT, b"the\xff\xfe", 8)
    assert train.max() == 7 and len(set(train)) == 8
    assert list(held_out[-2:]) == [7, 7]


def test_the_rate_rises_and_falls() -> None:
    rates = [convergence.rate(step, 1000, 2.0) for step in range(1001)]
    assert max(rates) == rates[convergence.WARM_UP] == 2.0
    assert rates[0] == pytest.approx(0.02) and rates[-1] == pytest.approx(0.2)


def test_batches_are_stretches_of_the_text() -> None:
    config = convergence.WORKLOADS["minigpt"].tiny
    x, y = convergence.batch(np.arange(1000), config, np.random.default_rng(0))
    assert x.shape == y.shape == (config.batch, config.context)
    assert (y == x + 1).all() and (np.diff(x) == 1).all()


def asked(folder: Path, **changes: Any) -> dict[str, Any]:
    vocab = convergence.WORKLOADS["minigpt"].tiny.vocab
    for name, ids in zip(("train", "held_out"), convergence.tokens(TEXT, TEXT, vocab)):
        np.save(folder / f"{name}.npy", ids)
    return {
        "library": "vibetensor", "seed": 0, "workload": "minigpt", "text": str(folder), "device": "cpu",
        "dtype": "float32", "batch": 4, "scale": "tiny", "steps": 30, "lr": 0.02, "every": 10,
        "checks": 2, "threads": vt.get_num_threads(), **changes,
    }  # fmt: skip


def test_a_run_learns_by_replays_and_repeats_itself(tmp_path: Path) -> None:
    first, again = (convergence.run(asked(tmp_path)) for _ in range(2))
    assert first == again and first["replays"] >= 25
    assert [step for step, _ in first["validation"]] == [0, 10, 20, 30]
    assert first["validation"][-1][1] < first["validation"][0][1] - 0.2
    assert convergence.run(asked(tmp_path, seed=1))["validation"] != first["validation"]


@pytest.mark.torch
def test_the_command_compares_with_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "text").write_bytes(TEXT)
    command = f"--scale tiny --workload minigpt --seeds 2 --steps 20 --every 10 --checks 2 --data {tmp_path / 'text'}"
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "convergence.py", *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path()},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    apart = run.stdout.split("seed by seed:")[1].split(";")[0]
    assert max(abs(float(each)) for each in apart.split(",")) < 1e-3


def test_what_fails_names_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", path())
    with pytest.raises(RuntimeError, match=r"vibetensor nothing:[\s\S]*KeyError"):
        convergence.run_apart(
            {"library": "vibetensor", "workload": "nothing", "threads": 1, "device": "cpu"}
        )


def test_the_chart_is_xml_with_a_line_for_each_run() -> None:
    drawn = [("a & b", [(0.0, 3.0), (5.0, 1.0)], True), ("c", [(0.0, 2.0), (5.0, 2.0)], False)]
    root = xml.etree.ElementTree.fromstring(curves("losses", drawn))
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert len(lines) == 2 and "a & b" in [e.text for e in root]
    assert json.dumps([e.get("stroke") for e in lines]).count("#") == 2
