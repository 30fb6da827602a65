"""Child processes that import the same vibetensor as the tests."""

import os
import subprocess
import sys

import pytest

# A stand-in for the core that pytest loaded with -p must be loaded by children too.
STAND_IN = "import io_shim\n" if "io_shim" in sys.modules else ""


@pytest.fixture
def start_python(tmp_path):
    """start_python(source, *arguments) → Popen with its output piped."""

    def start(source, *arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(
            [sys.executable, "-c", STAND_IN + source, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )

    return start
