"""What all tests share: which package is tested, and which tests need PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def start_python(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """start_python(source, *arguments, **options of Popen): a child with its output piped.

    It imports the vibetensor that is tested here, from a checkout or installed, and runs in
    `tmp_path`: `python -c` puts its working directory first on its path, and the package of a
    checkout may have no libraries.
    """
    import vibetensor

    package = str(Path(vibetensor.__file__).parents[1])

    def start(source: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "text": True,
            "cwd": tmp_path,
            **options,
        }
        # What the surrounding path adds (packages installed elsewhere) comes after the package.
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        settings["env"] = {**os.environ, "PYTHONPATH": path, **options.get("env", {})}
        return subprocess.Popen([sys.executable, "-c", source, *map(str, arguments)], **settings)

    return start


@pytest.fixture
def run_python(
    start_python: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(source, *arguments, timeout=120, **options of Popen): waits for such a child."""

    def run(
        source: str, *arguments: Any, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        with start_python(source, *arguments, **{"stderr": subprocess.PIPE, **options}) as child:
            try:
                out, err = child.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    return run
