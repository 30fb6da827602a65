"""Validation loss of GPTs on real text, beside torch: the same model, text and batches, seed by seed.

python bench/convergence.py --workload minigpt,gpt2 --seeds 3 --steps 2000 --device cuda --save
python bench/convergence.py --scale small --steps 200 --seeds 2

vibetensor runs the captured step, torch the eager one, both under autocast on a GPU and with the same
schedule (warm-up, then a cosine). A seed draws the initial weights and the order of the text, which both
libraries share; what differs is rounding, and the spread over seeds is the measure for it. The text is
the sources of Python's library; miniGPT reads characters, GPT-2 the 50,000 most frequent words and
spaces, other words in bytes. A run passes where the mean over seeds of the last validation losses
differs from torch's by no more than torch's losses do among themselves.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from side_by_side import RESULTS, describe_run
from train import listed
from train_process import make_step
from workloads import SCALES, WORKLOADS, load_initial_weights

LIBRARIES = ("vibetensor", "torch")
GPTS = ("minigpt", "gpt2")
WARM_UP = 100  # steps of a rising learning rate
MOST_TEXT = 64_000_000  # bytes of the default text
PIECES = re.compile(rb"[A-Za-z]+| +|\n[ ]*|.", re.DOTALL)


def tokens(train: bytes, held_out: bytes, vocab: int) -> tuple[np.ndarray, ...]:
    """Both texts as numbers below `vocab`: bytes first, then the most frequent pieces of the training
    text. A small vocabulary has bytes alone, and one number for those that it has no room for."""
    if vocab < 1024:
        known = collections.Counter(train).most_common(vocab - 1)
        numbers = np.full(256, vocab - 1, dtype=np.int64)
        for number, (byte, _) in enumerate(known):
            numbers[byte] = number
        return tuple(numbers[np.frombuffer(text, dtype=np.uint8)] for text in (train, held_out))
    pieces = PIECES.findall(train)
    counted = collections.Counter(p for p in pieces if len(p) > 1).most_common(vocab - 256)
    known = {piece: 256 + i for i, (piece, _) in enumerate(counted)}
    found = []
    for text in (pieces, PIECES.findall(held_out)):
        ids: list[int] = []
        for piece in text:
            number = known.get(piece)
            ids.extend(piece if number is None else (number,))
        found.append(np.array(ids, dtype=np.int64))
    return tuple(found)


def batch(text: np.ndarray, config: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of text from random places, and the same ones a token on."""
    starts = rng.integers(0, len(text) - config.context - 1, config.batch)
    rows = text[starts[:, None] + np.arange(config.context + 1)]
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: a rise, then a cosine to a tenth."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


def run(options: dict[str, Any]) -> dict[str, Any]:
    """One library, one seed: [step, validation loss] at each evaluation."""
    ours = options["library"] == "vibetensor"
    t = importlib.import_module("vibetensor.torch" if ours else "torch")
    t.set_num_threads(options["threads"])
    device, workload = options["device"], WORKLOADS[options["workload"]]
    config = replace(workload.config(options["scale"]), batch=options["batch"])
    train, held_out = (np.load(f"{options['text']}/{name}.npy") for name in ("train", "held_out"))
    seed, steps = options["seed"], options["steps"]
    model = workload.make(t, config).to(device)
    load_initial_weights(t, model, seed)
    # On a GPU torch's and our fused updates read the rate from where param_groups has it.
    optimizer = workload.make_optimizer(t, model.parameters(), fused=True, weight_decay=0.1)
    step = make_step(t, model, model, optimizer, device, options["dtype"])
    if ours:
        step = importlib.import_module("vibetensor.graphs").capture(step)
    rng = np.random.default_rng([seed, 1])
    check = np.random.default_rng(2)
    checks = [batch(held_out, config, check) for _ in range(options["checks"])]

    def on_device(arrays: tuple[np.ndarray, np.ndarray]) -> list[Any]:
        return [t.from_numpy(a).to(device) for a in arrays]

    def validation() -> float:
        losses = []
        with (
            t.no_grad(),
            t.autocast(device, dtype=t.bfloat16, enabled=options["dtype"] == "bfloat16"),
        ):
            for arrays in checks:
                losses.append(model(*on_device(arrays)).float().item())
        return statistics.fmean(losses)

    seen = []
    for index in range(steps):
        if index % options["every"] == 0:
            seen.append((index, validation()))
        optimizer.param_groups[0]["lr"] = rate(index, steps, options["lr"])
        step(*on_device(batch(train, config, rng)))
    seen.append((steps, validation()))
    replays = sum(v.replays for v in step.variants) if ours else 0
    return {"validation": seen, "replays": replays}


def run_apart(options: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{options['library']} {options['workload']}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, options: argparse.Namespace, runs: dict[str, list[Any]]) -> dict[str, Any]:
    """Prints and returns what the seeds of both libraries came to."""
    last = {library: [r["validation"][-1][1] for r in found] for library, found in runs.items()}
    mean = {library: statistics.fmean(values) for library, values in last.items()}
    spread = {library: max(values) - min(values) for library, values in last.items()}
    apart = [a - b for a, b in zip(last["vibetensor"], last["torch"])]
    within = abs(mean["vibetensor"] - mean["torch"]) <= spread["torch"]
    for library in LIBRARIES:
        each = ", ".join(f"{value:.4f}" for value in last[library])
        print(f"  {library:>10}  {mean[library]:.4f}  ({each}; spread {spread[library]:.4f})")
    print(
        f"  apart, seed by seed: {', '.join(f'{d:+.4f}' for d in apart)}; within the spread: {within}"
    )
    return {
        "workload": name, "steps": options.steps, "batch": options.batch_of[name], "last": last,
        "within_spread": within, "curves": {lib: [r["validation"] for r in v] for lib, v in runs.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", type=listed(GPTS), default=list(GPTS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="sequences a step; default: the workload's")
    parser.add_argument("--lr", type=float, default=6e-4, help="the highest learning rate")
    parser.add_argument("--every", type=int, default=200, help="steps between validations")
    parser.add_argument("--checks", type=int, default=20, help="batches of a validation")
    parser.add_argument("--data", help="a folder or file of text; default: Python's library")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, on one device")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/convergence.json and .svg"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(run(json.loads(options.one))))
        return 0
    from vibetensor.train.text_data import read_text

    train, held_out, source = read_text(options.data, limit=MOST_TEXT)
    print(f"{source}: {len(train):,} bytes, {len(held_out):,} for validation")
    options.batch_of = {}
    records = []
    for name in options.workload:
        config = WORKLOADS[name].config(options.scale)
        options.batch_of[name] = options.batch or config.batch
        with tempfile.TemporaryDirectory() as folder:
            for part, ids in zip(("train", "held_out"), tokens(train, held_out, config.vocab)):
                np.save(f"{folder}/{part}.npy", ids)
            asked = [
                {
                    "library": library, "seed": seed, "workload": name, "text": folder,
                    "device": options.device, "dtype": "bfloat16" if options.device == "cuda" else "float32",
                    "batch": options.batch_of[name],
                    **{key: getattr(options, key) for key in ("scale", "steps", "lr", "every", "checks", "threads")},
                }
                for seed in range(options.seeds) for library in LIBRARIES
            ]  # fmt: skip
            print(f"{name}: {config}, batch {options.batch_of[name]}, {options.steps} steps")
            with ThreadPoolExecutor(options.jobs) as pool:
                results = list(pool.map(run_apart, asked))
        runs: dict[str, list[Any]] = {library: [] for library in LIBRARIES}
        for each, result in zip(asked, results):
            runs[each["library"]].append(result)
        records.append(compare(name, options, runs))
    if options.save:
        record = {**describe_run(options.threads), "source": source, "convergence": records}
        (RESULTS / "convergence.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(not all(record["within_spread"] for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
