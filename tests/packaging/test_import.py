"""What `import vibetensor` costs and drags in."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def python(run_python) -> Callable[[str], str]:
    """python(code): what a fresh interpreter that sees the same package prints."""

    def run(code: str) -> str:
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_import_takes_at_most_150_ms(python) -> None:
    # Of the processor, by this process: on a busy machine the clock tells of others too. Caches
    # and the two threads of a core are shared all the same, so some tries are allowed.
    code = "import time; t = time.process_time(); import vibetensor; print(time.process_time() - t)"
    python(code)  # fills the caches of byte code and of the disk
    times = []
    while len(times) < 25 and min(times, default=1.0) > 0.15:
        times.append(float(python(code)))
    assert min(times) <= 0.15


def test_import_loads_no_heavy_module(python) -> None:
    heavy = "numpy multiprocessing inspect tempfile asyncio dataclasses torch scipy_openblas32"
    code = f"import sys, vibetensor; print(*sorted(set({heavy.split()!r}) & set(sys.modules)))"
    assert python(code) == ""


def test_both_names_are_one_api(python) -> None:
    code = (
        "import sys, vibetensor as vt, vibetensor.torch as torch\n"
        "print(vt.Tensor is torch.Tensor, vt.nn is torch.nn, 'torch' in sys.modules)"
    )
    assert python(code) == "True True False"


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("inner", ["autograd.gradient_check", "cuda.graphs", "serialization",
                                   "utils.data", "nn.modules.linear", "random"])  # fmt: skip
def test_a_module_has_two_names_and_one_copy(python, inner: str, twin: bool) -> None:
    """Whichever name is imported first; some modules are not loaded with the package."""
    names = [f"vibetensor.torch.{inner}", f"vibetensor.{inner}"]
    first, second = names if twin else names[::-1]
    code = (
        "import sys, importlib, vibetensor\n"
        f"a = importlib.import_module({first!r}); b = importlib.import_module({second!r})\n"
        f"print(a is b, a.__name__, eval({first!r}) is eval({second!r}))"
    )
    assert python(code) == f"True vibetensor.torch.{inner} True"


def test_no_module_is_made_up(python) -> None:
    code = (
        "import importlib, vibetensor, vibetensor.graphs.capture, vibetensor.io.safetensors\n"
        "for name in ('vibetensor.nothing', 'vibetensor.nn.nothing', 'vibetensor.graphs.nothing'):\n"
        "    try: importlib.import_module(name); print(name)\n"
        "    except ModuleNotFoundError as error: assert error.name == name, error"
    )
    assert python(code) == ""


@pytest.mark.parametrize("first", ["vibetensor", "torch"])
def test_works_beside_torch(python, first: str) -> None:
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
def test_every_kernel_library_loads(python, isa: str) -> None:
    """VT_CPU_ISA caps the level; a processor below it takes the best one it has."""
    code = (
        f"import os; os.environ['VT_CPU_ISA'] = {isa!r}\n"
        "import vibetensor as vt\n"
        "x = vt.arange(80, dtype=vt.float32)\n"
        "print((x.exp().log() - x).abs().max().item() < 1e-4)"
    )
    assert python(code) == "True"


def test_an_empty_level_of_instructions_is_none(python) -> None:
    code = (
        "import os; os.environ['VT_CPU_ISA'] = ''\n"
        "import vibetensor as vt; print(vt.ones(2).sum().item())"
    )
    assert python(code) == "2.0"


def test_a_variable_that_says_what_it_cannot_is_told_each_time(python) -> None:
    code = (
        "import os; os.environ['VT_SYNC_DEBUG'] = 'loud'\n"
        "from vibetensor.torch.cuda import _backend\n"
        "for _ in range(2):\n"
        "    try: print(_backend.native())\n"
        "    except ValueError as error: assert 'VT_SYNC_DEBUG' in str(error), error"
    )
    assert python(code) in ("", "None\nNone")  # the latter without a CUDA backend
