"""Absurd requests get an error that says what was asked for, and the process goes on."""

from __future__ import annotations

import pytest

import vibetensor.torch as vt

HUGE = 2**62


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (lambda: vt.empty(HUGE), RuntimeError, f"overflowed with sizes=.{HUGE}"),
        (lambda: vt.empty(2**40, 2**40), RuntimeError, "overflowed"),
        (lambda: vt.zeros(2, -3), RuntimeError, r"negative dimension -3: \[2, -3\]"),
        (lambda: vt.arange(HUGE), RuntimeError, "overflowed"),
        (lambda: vt.zeros(3).repeat(HUGE), RuntimeError, "overflowed"),
        (lambda: vt.zeros(3).expand(HUGE, 3) * 2, RuntimeError, "overflowed"),
        (lambda: vt.zeros(3).as_strided((HUGE, HUGE), (1, 1)), RuntimeError, "overflowed"),
        (lambda: vt.zeros(3).as_strided((4,), (1,)), RuntimeError, "out of bounds"),
        (lambda: vt.zeros(3).reshape(HUGE, -1), RuntimeError, "invalid for input of size 3"),
        (lambda: vt.zeros(3).view(-2), RuntimeError, "invalid shape dimension -2"),
        (lambda: vt.empty([1] * 65), RuntimeError, "at most 64 dimensions, got 65"),
        (lambda: vt.zeros(3)[HUGE], IndexError, f"index {HUGE} is out of bounds"),
        (lambda: vt.zeros(3)[-HUGE], IndexError, "out of bounds"),
        (lambda: vt.zeros(3)[2**70], OverflowError, "too big"),
        (lambda: vt.zeros(3)[vt.tensor([HUGE])], IndexError, "out of bounds"),
    ],
)
def test_absurd_request(request_, error, says) -> None:
    with pytest.raises(error, match=says):
        request_()


def test_huge_sizes_beside_a_zero_hold_nothing() -> None:
    assert vt.zeros(0, HUGE, HUGE).numel() == 0
    assert vt.zeros(3).expand(HUGE, 3).shape == (HUGE, 3)
    assert vt.empty([1] * 64).dim() == 64


def test_deeply_nested_list() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="at most 64"):
        vt.tensor(nested)
    while nested:
        nested = nested.pop()


def test_list_that_holds_itself() -> None:
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="at most 64"):
        vt.tensor(loop)
    loop.clear()


OUT_OF_MEMORY = """
import resource
import vibetensor.torch as vt
(vt.ones(300, 300) @ vt.ones(300, 300)).sum()
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
for _ in range(3):
    try:
        vt.empty(2**30, dtype=vt.float32)
    except vt.OutOfMemoryError as error:
        assert str(2**32) in str(error), error
    else:
        raise SystemExit("no error")
    assert vt.ones(1000, 1000).sum().item() == 1e6
print("usable")
"""


def test_out_of_memory_names_the_bytes_and_leaves_the_process_usable(run_python) -> None:
    done = run_python(OUT_OF_MEMORY)
    assert (done.returncode, done.stdout) == (0, "usable\n"), done.stderr
