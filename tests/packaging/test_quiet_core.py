"""bench/quiet_core.py on machines whose cores are shared at times, which stand for themselves here."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def module() -> ModuleType:
    path = BENCH / "quiet_core.py"
    if not path.exists():
        pytest.skip("needs a checkout")
    spec = importlib.util.spec_from_file_location("quiet_core", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Machine:
    """Cores 0 to 3. `shared`: those that run at half their speed, from a time on; a probe takes 10 us, a
    round as long as it says."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core, self.now, self.rounds = 0, 0.0, 0
        self.shared: dict[int, float] = {}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", self._move, raising=False)
        monkeypatch.setattr(module.QuietCore, "_probe", staticmethod(self._probe))
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def _move(self, pid: int, cores: Any) -> None:
        (self.core,) = cores

    def _probe(self) -> float:
        took = 1e-5 * (2 if self.shared.get(self.core, float("inf")) <= self.now else 1)
        self.now += took
        return took

    def round(self, seconds: float) -> tuple[int, float]:
        self.now += seconds
        self.rounds += 1
        return self.core, self.now


def test_rounds_are_taken_on_quiet_cores(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(module, monkeypatch)
    machine.shared = {0: 0.0, 1: 0.0, 3: 0.0}
    core = module.QuietCore()
    for _ in range(5):
        assert core.measure(lambda: machine.round(0.001))[0] == 2
    assert machine.rounds == 5 and core.disturbed == 0


def test_a_round_that_was_disturbed_is_repeated(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(module, monkeypatch)
    core = module.QuietCore()
    was = core.measure(lambda: machine.round(0.001))[0]
    machine.shared = {was: machine.now + 0.0005}  # in the middle of the next round
    found, _ = core.measure(lambda: machine.round(0.001))
    assert found != was and machine.rounds == 3 and core.disturbed == 0


def test_patience_ends(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    machine = Machine(module, monkeypatch)
    core = module.QuietCore()
    machine.shared = dict.fromkeys(range(4), machine.now)  # from now on all are
    assert core.measure(lambda: machine.round(0.001))
    assert core.disturbed == 1 and machine.now == pytest.approx(module.PATIENCE, rel=0.01)
    assert core.measure(lambda: machine.round(0.001)) and core.disturbed == 2
    assert machine.rounds == 2 and machine.now < module.PATIENCE * 1.01


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has affinities")
def test_here(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    allowed = os.sched_getaffinity(0)
    try:
        core = module.QuietCore()
        assert core.measure(lambda: sys.maxsize) == sys.maxsize
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(0) <= allowed
    finally:
        os.sched_setaffinity(0, allowed)
