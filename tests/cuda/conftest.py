"""Tests that need a GPU; without one they are skipped by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import vibetensor.torch as torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder's tests where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents and "cpu_only" not in item.keywords:
            item.add_marker(skip)
