"""The manifest: what was built, as typed records in a JSON file beside the objects."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

VERSION = 1


@dataclass(frozen=True)
class Built:
    """One compiled variant: PREFIX.o and PREFIX.h."""

    kernel: str
    family: str
    variant: str
    prefix: str
    key: str  # of sources, options and DSL version: what the cache goes by
    options: dict[str, Any]
    registers: int
    spilled_bytes: int
    object_bytes: int
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """`dsl` is the DSL's version, empty where nothing was compiled; `problem` says why then."""

    dsl: str
    architecture: str
    variants: tuple[Built, ...]
    problem: str = ""

    def write(self, path: Path) -> None:
        record = {"version": VERSION, **asdict(self)}
        path.write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        record = json.loads(path.read_text())
        if record.get("version") != VERSION:
            raise ValueError(
                f"{path}: a manifest of version {record.get('version')}, not {VERSION}; build again"
            )
        return cls(
            dsl=record["dsl"],
            architecture=record["architecture"],
            variants=tuple(read_built(b, path) for b in record["variants"]),
            problem=record["problem"],
        )


def read_built(record: dict[str, Any], path: Path) -> Built:
    """A record from JSON; a ValueError names what is missing or unknown."""
    wanted = {f.name for f in fields(Built)}
    if set(record) != wanted:
        raise ValueError(f"{path}: fields {sorted(set(record) ^ wanted)} are missing or unknown")
    return Built(**record)
