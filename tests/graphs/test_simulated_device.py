"""Captures on a CUDA device, without one: the suite runs once more on the simulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.built import library
from tests.device import DEVICE

ROOT = Path(__file__).parents[2]
SUITES = ["test_device_steps.py", "test_capture.py", "test_device_chains.py"]


@pytest.mark.skipif(DEVICE != "cpu", reason="these run on a device already")
@pytest.mark.skipif(
    library("vt_simulated_cuda") is None, reason="needs a build of this tree with its stand-ins"
)
def test_captures_on_the_simulated_device() -> None:
    files = [str(Path(__file__).with_name(name)) for name in SUITES]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--device", "simulated", "-p", "no:cacheprovider",
         *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
