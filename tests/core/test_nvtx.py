"""Ranges and marks for profilers, as a stand-in for NVIDIA's library is told them (tests/stub_nvtx)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vibetensor.torch as vt
from tests.built import library

STUB = library("vt_stub_nvtx")
with_stub = pytest.mark.skipif(STUB is None, reason="needs a build of this tree with its stand-ins")

# In a process of its own: the library that is opened first stays.
PROGRAM = """
import ctypes, json, sys
import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.torch.cuda import nvtx
stub = ctypes.CDLL(sys.argv[1])
stub.vt_stub_nvtx_taken.restype = ctypes.c_char_p
def taken():
    return stub.vt_stub_nvtx_taken().decode().splitlines()
assert _C.nvtx.open(sys.argv[1]) and nvtx.is_available()
assert _C.nvtx.open("nothing.so")  # the first one stays
"""


def run(body: str, *, library: str = "", **environment: str) -> list[object]:
    """What the program prints, a JSON value a line."""
    text = (PROGRAM if library else "import json\nimport vibetensor.torch as vt\n") + body
    found = subprocess.run(
        [sys.executable, "-c", text, library],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(vt.__file__).parents[2],  # where the package under test is
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@with_stub
def test_ranges_and_marks() -> None:
    (depths, lines) = run(
        """
depths = [nvtx.range_push("outer"), nvtx.range_push("inner"), nvtx.range_pop(), nvtx.range_pop()]
with nvtx.range("step {}", 3):
    nvtx.mark("here")
try:
    with vt.cuda.nvtx.range("fails"):
        raise ValueError
except ValueError:
    pass
@nvtx.range("decorated")
def function():
    nvtx.mark("inside")
function()
nvtx.range_end(nvtx.range_start("anywhere"))
print(json.dumps(depths)); print(json.dumps(taken()))
""",
        library=str(STUB),
    )
    assert depths == [0, 1, 1, 0]
    assert lines == [
        "push outer", "push inner", "pop", "pop", "push step 3", "mark here", "pop", "push fails", "pop",
        "push decorated", "mark inside", "pop", "start anywhere", "end 1",
    ]  # fmt: skip


@with_stub
def test_ops_are_ranges_in_eager_in_backward_and_in_replays() -> None:
    off, eager, failed, replay, after = run(
        """
from vibetensor.graphs import capture
x, w = vt.ones(2, 2), vt.ones(2, 2, requires_grad=True)
def step(x):
    (x @ w).tanh().sum().backward()
step(x)
print(json.dumps(taken()))
with nvtx.op_ranges():
    step(x)
    print(json.dumps(taken()))
    try:
        vt.ones(2) @ vt.ones(3)
    except RuntimeError:
        print(json.dumps(taken()))
    captured = capture(lambda x: (x @ x).tanh())
    captured(x), captured(x)
    taken()
    captured(x)
    print(json.dumps(taken()))
step(x)
print(json.dumps(taken()))
""",
        library=str(STUB),
    )
    assert off == [] and after == []
    assert isinstance(eager, list) and isinstance(failed, list) and isinstance(replay, list)
    assert {"push matmul", "push tanh", "push sum"} <= set(eager)
    assert eager.count("pop") == len(eager) - eager.count("pop")
    assert any("backward" in line or line == "push mul" for line in eager)  # of the derivative
    assert failed.count("pop") * 2 == len(failed)
    ops = [line for line in replay if line != "pop"]
    assert ops[-1] == "push tanh" and len(replay) == 2 * len(ops)


@with_stub
def test_the_environment_marks_ops_from_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    (folder / "libnvtx3interop.so.1").symlink_to(str(STUB))
    (lines,) = run(
        f"""
import ctypes
vt.cuda
stub = ctypes.CDLL({str(STUB)!r})
stub.vt_stub_nvtx_taken.restype = ctypes.c_char_p
vt.ones(2).exp()
print(json.dumps(stub.vt_stub_nvtx_taken().decode().splitlines()))
""",
        VT_NVTX="1",
        PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])),
    )
    assert isinstance(lines, list) and "push exp" in lines


def test_without_the_library_nothing_happens() -> None:
    (found,) = run(
        """
from vibetensor.torch.cuda import nvtx
nvtx._SONAMES = ("libnothing.so.1",)
import vibetensor.torch.cuda._backend as backend
backend._find_library = lambda name: None
with nvtx.range("step"), nvtx.op_ranges():
    nvtx.mark("here")
    vt.ones(2).exp()
print(json.dumps([nvtx.is_available(), nvtx.range_push("x"), nvtx.range_pop(), nvtx.range_start("y")]))
"""
    )
    assert found == [False, -1, -1, 0]
