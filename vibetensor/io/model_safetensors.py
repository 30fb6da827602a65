"""Modules whose parameters share storage (tied weights): written once, tied again on loading."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vibetensor.io import safetensors

if TYPE_CHECKING:
    from vibetensor.torch import Tensor
    from vibetensor.torch.nn import Module


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → the alphabetically first name of the same tensor, for all names but that one."""
    first: dict[Any, str] = {}
    aliases = {}
    for name in sorted(state):
        tensor = state[name]
        if tensor.numel() == 0:
            continue
        key = (*safetensors.extent(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def save_model(
    model: Module, filename: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Saves `model.state_dict()`; of names that share a tensor only the first is written, and
    `metadata` records the others as `name → kept name`, as the `safetensors` package does."""
    state = model.state_dict()
    aliases = _aliases(state)
    tensors = {name: tensor for name, tensor in state.items() if name not in aliases}
    combined = {**aliases, **(metadata or {})}
    safetensors.save_file(tensors, filename, combined or None)


def load_model(
    model: Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: Any = "cpu",
) -> tuple[list[str], list[str]]:
    """Copies the tensors of `filename` into `model` and returns (missing, unexpected) names.

    A name the file lacks is not missing if the model ties it to one that the file has. With
    `strict`, missing or unexpected names raise RuntimeError.
    """
    loaded = safetensors.load_file(filename, device)
    state = model.state_dict()
    aliases = _aliases(state)
    provided = {aliases.get(name, name) for name in loaded}
    missing = [n for n in state if n not in loaded and aliases.get(n, n) not in provided]
    unexpected = [n for n in loaded if n not in state]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"load_model: {os.fspath(filename)} does not fit {type(model).__name__}; "
            f"missing: {missing}, unexpected: {unexpected}"
        )
    model.load_state_dict(loaded, strict=False)
    return missing, unexpected
