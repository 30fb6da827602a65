"""Threads open cuBLASLt and load kernels from a device's first use on; VT_CUDA_PRELOAD=0 has none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PRELOAD = {k: v for k, v in os.environ.items() if k != "VT_CUDA_PRELOAD"}
OPENED = """
import pathlib, sys, time
import vibetensor.torch as torch
def opened():
    return "libcublasLt" in pathlib.Path("/proc/self/maps").read_text()
x = torch.ones(512, 512, dtype=torch.float64, device="cuda")
end = time.monotonic() + float(sys.argv[1])
while not opened() and time.monotonic() < end:
    time.sleep(0.01)
print(opened(), (x @ x).sum().item(), opened())
"""


def test_cublaslt_is_opened_without_a_product(run_python: Callable[..., Any]) -> None:
    done = run_python(OPENED, 60, env=PRELOAD)
    assert done.stdout.split() == ["True", "134217728.0", "True"], done.stderr
    assert done.returncode == 0


def test_without_it_the_first_product_opens_cublaslt(run_python: Callable[..., Any]) -> None:
    done = run_python(OPENED, 2, env={**os.environ, "VT_CUDA_PRELOAD": "0"})
    assert done.stdout.split() == ["False", "134217728.0", "True"], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    "more", ["", "torch.cuda.synchronize()", "import sys; sys.exit()"], ids=["", "module", "exit"]
)
def test_a_process_may_end_at_once(more: str, run_python: Callable[..., Any]) -> None:
    source = f"import vibetensor.torch as torch\ntorch.ones(1, device='cuda')\n{more}\n"
    for _ in range(3):
        done = run_python(source, env=PRELOAD)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_waits_for_them(run_python: Callable[..., Any]) -> None:
    """A child that found the loader's lock held could open no library."""
    done = run_python(
        "import ctypes, os, pathlib, sys, warnings\n"
        "import vibetensor.torch as torch\n"
        "warnings.simplefilter('ignore')  # newer Pythons warn of threads at every fork\n"
        "torch.ones(1, device='cuda')\n"
        "child = os.fork()\n"
        "opened = 'libcublasLt' in pathlib.Path('/proc/self/maps').read_text()\n"
        "if child == 0:\n"
        "    ctypes.CDLL('libresolv.so.2')\n"
        "    sys.exit(3 if opened else 4)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n",
        env=PRELOAD,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
