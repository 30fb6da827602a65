"""Training checkpoints: a folder `step_N/` that is complete or absent, and resumes exactly.

    step_N/model.safetensors      the module's state, tied weights once
    step_N/optimizer.safetensors  state.I.NAME for parameter I; the rest is in its metadata
    step_N/state.json             config, step, data cursor, schedule, scaler, random number states

It is written as `step_N.tmp`, synced and renamed; older folders go only afterwards. So a killed
process or a full disk leaves the last good checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import vibetensor.torch as torch
from vibetensor.io import safetensors
from vibetensor.io.atomic import new_folder, sync_folder, write_json

_FORMAT = 1


def save_checkpoint(
    run: str | os.PathLike[str],
    step: int,
    model: Any,
    optimizer: Any,
    *,
    config: dict[str, Any],
    cursor: dict[str, Any] | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    keep: int | None = None,
) -> str:
    """Writes `run`/step_N and returns its path.

    Args:
        config, cursor: JSON values: what the run was started with, and where in the data it is.
        scheduler, scaler: optional, saved through their `state_dict()`, which must be JSON values.
        keep: how many checkpoints remain (the newest); None keeps all.

    Raises OSError (disk full, no permission), leaving earlier checkpoints untouched.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    state = {
        "format": _FORMAT,
        "step": step,
        "config": config,
        "cursor": cursor,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "rng": rng_state(),
    }
    final = os.path.join(os.fspath(run), f"step_{step}")
    with new_folder(final) as folder:
        safetensors.save_model(model, os.path.join(folder, "model.safetensors"))
        _save_optimizer(optimizer, os.path.join(folder, "optimizer.safetensors"))
        write_json(os.path.join(folder, "state.json"), state)
    if keep is not None:
        _prune(os.fspath(run), keep, final)
    return final


def _prune(run: str, keep: int, final: str) -> None:
    """Removes all but the `keep` newest checkpoints, and what killed processes left half done."""
    for _, path in list_checkpoints(run)[:-keep]:
        if path != final:
            # Renamed first: one that is removed in part must not be taken for a checkpoint.
            with contextlib.suppress(OSError):
                os.rename(path, f"{path}.tmp")
    for name in os.listdir(run):
        if re.fullmatch(r"step_\d+(\.old)?\.tmp", name):
            shutil.rmtree(os.path.join(run, name), ignore_errors=True)


def set_aside_later(run: str | os.PathLike[str], step: int) -> list[str]:
    """Takes the checkpoints of `run` beyond `step` out of the run, which goes on from there along
    another path: step_N becomes step_N.aside (or step_N.aside2, …), which `find_checkpoint` still
    takes by its name, but neither as the newest nor for one to remove. Returns the new paths."""
    moved = []
    for number, path in list_checkpoints(run):
        if number <= step:
            continue
        count = 1
        target = aside = os.path.join(os.fspath(run), f"step_{number}.aside")
        while os.path.lexists(target):
            count += 1
            target = f"{aside}{count}"
        os.rename(path, target)
        moved.append(target)
    if moved:
        sync_folder(os.fspath(run))
    return moved


def load_checkpoint(
    path: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    restore_rng: bool = True,
) -> dict[str, Any]:
    """Restores a `step_N` folder into the given objects and returns its state.json. Raises OSError,
    SafetensorError, or ValueError naming the file, where something is missing or damaged, and
    RuntimeError where the tensors do not fit the model."""
    folder = os.fspath(path)
    state = read_state(folder)
    safetensors.load_model(model, os.path.join(folder, "model.safetensors"))
    if optimizer is not None:
        _load_optimizer(optimizer, os.path.join(folder, "optimizer.safetensors"))
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    if restore_rng:
        with _naming(os.path.join(folder, "state.json"), "its generator states"):
            set_rng_state(state["rng"])
    return state


@contextlib.contextmanager
def _naming(path: str, what: str) -> Iterator[None]:
    """Errors about the form of what was read become a ValueError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"'{path}' is damaged: {what} are not understood ({type(error).__name__}: {error})"
        ) from error


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state.json of a `step_N` folder. Raises ValueError where it is damaged."""
    name = os.path.join(os.fspath(path), "state.json")
    with open(name, encoding="utf-8") as file:
        try:
            state = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{name}' is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"'{name}' is damaged: it does not hold a JSON object")
    if state.get("format") != _FORMAT:
        raise ValueError(
            f"{os.fspath(path)} is a checkpoint of format {state.get('format')}; this version "
            f"reads format {_FORMAT}"
        )
    for key, kind in (("step", int), ("config", dict), ("rng", dict)):
        if not isinstance(state.get(key), kind):
            raise ValueError(f"'{name}' is damaged: it has no \"{key}\" that is a {kind.__name__}")
    return {"cursor": None, "scheduler": None, "scaler": None, **state}


def brief(error: RuntimeError) -> str:
    """An error of `load_model` in a line: of the parameters that do not fit, the first."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def list_checkpoints(run: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """(step, path) of every complete checkpoint in a run folder, oldest step first."""
    root = os.fspath(run)
    found = {}
    for name in sorted(os.listdir(root)):
        match = re.fullmatch(r"step_(\d+)(\.old)?", name)
        if not match or not os.path.exists(os.path.join(root, name, "state.json")):
            continue
        # A process killed while it replaced step_N by a new one leaves the good one as step_N.old.
        if not match[2] or f"step_{match[1]}" not in os.listdir(root):
            found[int(match[1])] = os.path.join(root, name)
    return sorted(found.items())


def find_checkpoint(path: str | os.PathLike[str]) -> str:
    """`path` itself if it is a checkpoint, else the newest one in that run folder."""
    folder = os.fspath(path)
    if os.path.exists(os.path.join(folder, "state.json")):
        return folder
    checkpoints = list_checkpoints(folder) if os.path.isdir(folder) else []
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoint (step_N folder) in '{folder}'")
    return checkpoints[-1][1]


def _save_optimizer(optimizer: Any, path: str) -> None:
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            place = tensors if isinstance(value, torch.Tensor) else scalars
            place[f"state.{index}.{name}"] = value
    rest = json.dumps({"param_groups": state["param_groups"], "scalars": scalars})
    safetensors.save_file(tensors, path, {"optimizer": rest})


def _load_optimizer(optimizer: Any, path: str) -> None:
    with safetensors.safe_open(path) as file:
        try:
            rest = json.loads((file.metadata() or {})["optimizer"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"'{path}' is not the optimizer file of a checkpoint") from error
        with _naming(path, "the optimizer's numbers"):
            values = {name: file.get_tensor(name) for name in file} | rest["scalars"]
            groups = rest["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    with _naming(path, "the names of the optimizer's tensors"):
        for key in values:
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = values[key]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> dict[str, Any]:
    """The states of Python's, vibetensor's and (where it is in use) NumPy's generators as JSON."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "vibetensor": bytes(torch.get_rng_state().tolist()).hex(),
        "devices": torch.random._states()[1:],
    }
    if numpy := sys.modules.get("numpy"):
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    content = list(bytes.fromhex(state["vibetensor"]))
    torch.set_rng_state(torch.tensor(content, dtype=torch.uint8, device="cpu"))
    if devices := state.get("devices"):  # older checkpoints have the CPU's state only
        torch.random._set_states([*torch.random._states()[:1], *devices])
    if "numpy" in state:
        try:
            import numpy
        except ImportError:  # saved where NumPy was in use, resumed where it is not installed
            return
        numpy.random.set_state(tuple(state["numpy"]))
