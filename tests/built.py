"""Libraries that only tests load: stand-ins for hardware, which no wheel holds."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def library(name: str) -> Path | None:
    """The newest lib{name}.so of this tree's builds, or that of the folder VT_TEST_LIBRARIES."""
    if folder := os.environ.get("VT_TEST_LIBRARIES"):
        return Path(folder, f"lib{name}.so")
    found = ROOT.glob(f"build/*/tests/lib{name}.so")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
