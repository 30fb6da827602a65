"""What all tests share: which package is tested, and which tests need PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# `python -m pytest` puts the checkout on the path. Without a development build its package has no
# libraries, and the installed one is meant.
if not (ROOT / "vibetensor" / "_C.abi3.so").exists():
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of every module that imported PyTorch, so that `-m torch` selects them."""
    real_torch = sys.modules.get("torch")
    if real_torch is None:
        return
    needs: dict[object, bool] = {}
    for item in items:
        module = getattr(item, "module", None)
        if module not in needs:
            needs[module] = any(value is real_torch for value in vars(module).values())
        if needs[module]:
            item.add_marker(pytest.mark.torch)
