"""Reads the measured choices of tuning/*.json. A file that is wrong stops the build by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .registry import ROOT, Kernel


@dataclass(frozen=True)
class Row:
    """On `gpu`, with every extent of the call in its closed range, `variant` is launched."""

    gpu: str
    kernel: str
    variant: str
    extents: dict[str, tuple[int, int]]


def read(kernels: dict[str, Kernel], folder: Path = ROOT / "tuning") -> tuple[Row, ...]:
    """The rows of all files, in order."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if not isinstance(record.get("gpu"), str) or not isinstance(record.get("rows"), list):
            raise ValueError(f"{path}: needs 'gpu', a string, and 'rows', a list")
        for at, row in enumerate(record["rows"]):
            where = f"{path}, row {at}"
            kernel = kernels.get(row["kernel"])
            if kernel is None:
                raise ValueError(f"{where}: no kernel is called '{row['kernel']}'")
            variant = next((v for v in kernel.variants if v.name == row["variant"]), None)
            if variant is None:
                raise ValueError(f"{where}: {kernel.name} has no variant '{row['variant']}'")
            known = {e.name for e in kernel.contract(variant).extents}
            extents = {name: (int(low), int(high)) for name, (low, high) in row["extents"].items()}
            if unknown := set(extents) - known:
                raise ValueError(f"{where}: {kernel.name} has no extent {sorted(unknown)}")
            if any(low > high for low, high in extents.values()):
                raise ValueError(f"{where}: a range ends before it begins")
            rows.append(Row(record["gpu"], kernel.name, row["variant"], extents))
    return tuple(rows)
