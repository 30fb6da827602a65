"""Checkpoints of several Safetensors files with an index (`model.safetensors.index.json`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vibetensor.io import safetensors
from vibetensor.io.atomic import sync_folder, write_json

if TYPE_CHECKING:
    from vibetensor.torch import Tensor

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _byte_count(size: int | str) -> int:
    if isinstance(size, int):
        count = size
    elif not isinstance(size, str):
        count = 0
    else:
        text = size.strip().upper()
        unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if text.endswith(u)), None)
        try:
            count = int(float(text[: -len(unit)]) * _UNITS[unit]) if unit else int(text)
        except (ValueError, OverflowError):
            count = 0
    if count <= 0:
        raise ValueError(f"max_shard_size must be a number of bytes or like '5GB', got {size!r}")
    return count


def save_sharded(
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes `tensors` in their order to files of at most `max_shard_size` bytes (a larger tensor
    has a file to itself) and returns the file names.

    One file needs no index and is STEM.safetensors; else STEM-0000i-of-0000n.safetensors, and last
    of all STEM.safetensors.index.json. Over an earlier save the new shards have names of their own,
    STEM-0000i-of-0000n-vK.safetensors, and the renamed index puts them in the place of the old ones,
    which are removed then, with shards that a killed save left: at every moment the folder holds one
    whole save.
    """
    limit = _byte_count(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if not hasattr(tensor, "element_size"):
            raise TypeError(f"save_sharded: {name!r} is a {type(tensor).__name__}, not a tensor")
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    root = os.fspath(folder)
    os.makedirs(root, exist_ok=True)
    index_path = os.path.join(root, f"{stem}.safetensors.index.json")
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
        safetensors.save_file(shards[0], os.path.join(root, names[0]), metadata)
        if os.path.exists(index_path):  # of an earlier save; until now it hid this one
            os.unlink(index_path)
            sync_folder(root)
        _remove_shards(root, stem, names)
        return names
    names = _unused_names(root, stem, len(shards))
    for name, shard in zip(names, shards):
        safetensors.save_file(shard, os.path.join(root, name), metadata)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    write_json(index_path, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _remove_shards(root, stem, names)
    return names


def _unused_names(root: str, stem: str, count: int) -> list[str]:
    """Names of `count` shards, none of which is a file yet."""
    version = 1
    while True:
        suffix = "" if version == 1 else f"-v{version}"
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}.safetensors" for i in range(count)]
        if not any(os.path.lexists(os.path.join(root, name)) for name in names):
            return names
        version += 1


def _remove_shards(root: str, stem: str, kept: list[str]) -> None:
    """Removes the files of earlier saves of `stem`, which nothing refers to any more, and what
    killed ones left of a file."""
    shard = re.compile(
        rf"({re.escape(stem)}(-\d{{5}}-of-\d{{5}}(-v\d+)?)?\.safetensors"
        rf"|\.{re.escape(stem)}\.safetensors\.index\.json\.\d+\.tmp)"
    )
    for name in os.listdir(root):
        if shard.fullmatch(name) and name not in kept:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(root, name))


def _read_index(path: str) -> dict[str, str]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise safetensors.DuplicateKey(f"{path} has a key twice")
        return entries

    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise safetensors.InvalidIndex(f"{path} is not JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise safetensors.InvalidIndex(f"{path} has no weight_map object")
    for tensor, shard in weight_map.items():
        # A shard is a file beside its index; anything else could reach all over the disk.
        if (
            not isinstance(shard, str)
            or os.path.basename(shard) != shard
            or shard in ("", ".", "..")
        ):
            raise safetensors.InvalidIndex(
                f"{path}: tensor {tensor!r} must name a file beside the index, got {shard!r}"
            )
    return weight_map


def load_sharded(
    path: str | os.PathLike[str], device: Any = "cpu", stem: str = "model"
) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint: `path` is the index, or its folder, where a single
    STEM.safetensors is read too. Raises `InvalidIndex` where index and shards disagree."""
    index_path = os.fspath(path)
    if os.path.isdir(index_path):
        single = os.path.join(index_path, f"{stem}.safetensors")
        index_path = single + ".index.json"
        if not os.path.exists(index_path):
            return safetensors.load_file(single, device)
    weight_map = _read_index(index_path)
    folder = os.path.dirname(index_path)
    found: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        with safetensors.safe_open(os.path.join(folder, shard), device=device) as file:
            wanted = {name for name, place in weight_map.items() if place == shard}
            if wanted != set(file.keys()):
                odd = sorted(wanted.symmetric_difference(file.keys()))[:5]
                raise safetensors.InvalidIndex(
                    f"{index_path} and {shard} disagree on the tensors {', '.join(map(repr, odd))}"
                )
            found.update((name, file.get_tensor(name)) for name in file.offset_keys())
    return {name: found[name] for name in weight_map}
