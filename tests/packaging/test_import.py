"""What `import vibetensor` costs and drags in."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import vibetensor


def python(code: str) -> str:
    """What a fresh interpreter that sees the same package prints."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(vibetensor.__file__).parents[1])!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_at_most_150_ms() -> None:
    code = "import time; t = time.perf_counter(); import vibetensor; print(time.perf_counter() - t)"
    python(code)  # fills the caches of byte code and of the disk
    assert statistics.median(float(python(code)) for _ in range(5)) <= 0.15


def test_import_loads_no_heavy_module() -> None:
    heavy = "numpy multiprocessing inspect tempfile asyncio dataclasses torch scipy_openblas32"
    code = f"import vibetensor; print(*sorted(set({heavy.split()!r}) & set(sys.modules)))"
    assert python(code) == ""


def test_both_names_are_one_api() -> None:
    code = (
        "import vibetensor as vt; import vibetensor.torch as torch\n"
        "print(vt.Tensor is torch.Tensor, vt.nn is torch.nn, 'torch' in sys.modules)"
    )
    assert python(code) == "True True False"


@pytest.mark.parametrize("first", ["vibetensor", "torch"])
def test_works_beside_torch(first: str) -> None:
    """Two runtimes in one process, loaded in either order, both still multiply matrices."""
    pytest.importorskip("torch")
    second = {"vibetensor": "torch", "torch": "vibetensor"}[first]
    code = (
        f"import {first}; import {second}; import numpy\n"
        "for t in (torch, vibetensor, torch):\n"
        "    a, b = t.ones(8, 6), t.ones(6, 8)\n"
        "    assert a.matmul(b).sum().item() == 6 * 64\n"
        "print(torch.Tensor is vibetensor.Tensor)"
    )
    assert python(code) == "False"


@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_kernel_library_loads(isa: str) -> None:
    """VT_CPU_ISA caps the level; a processor below it takes the best one it has."""
    code = (
        f"import os; os.environ['VT_CPU_ISA'] = {isa!r}\n"
        "import vibetensor as vt\n"
        "x = vt.arange(80, dtype=vt.float32)\n"
        "print((x.exp().log() - x).abs().max().item() < 1e-4)"
    )
    assert python(code) == "True"
