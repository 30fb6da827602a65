"""Rounds of a benchmark on cores that nobody else keeps busy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SLOWER = 1.2  # a core that takes so many times the least a probe has taken is shared
PATIENCE = 30.0  # seconds of waiting for a quiet core, in all


class QuietCore:
    """Moves the calling thread to a core at full speed for every round, and repeats rounds in which it
    lost that speed. On a shared host a core does two machines' work at times, in phases of
    milliseconds to minutes, and everything then takes about twice as long; a median over such rounds
    tells how many there were. `disturbed` counts rounds that had to be taken all the same.

    Threads that start later start on the same core, so those of both sides must be there before.
    """

    def __init__(self) -> None:
        self.disturbed = 0
        self._cores = sorted(os.sched_getaffinity(0))
        self._waited = 0.0
        self._least = min(self._on(core) for _ in range(3) for core in self._cores)

    def measure(self, round: Callable[[], T]) -> T:
        """What `round` returns, from a core that was quiet before and after it."""
        while True:
            found = self._find()
            start = time.perf_counter()
            result = round()
            if found and self._is_quiet():
                return result
            self._waited += time.perf_counter() - start
            if self._waited > PATIENCE:
                self.disturbed += 1
                return result

    def _find(self) -> bool:
        """Whether there is a quiet core, on which the thread then is."""
        start = time.perf_counter()
        try:
            while True:
                if self._is_quiet():
                    return True
                for core in self._cores:
                    if self._on(core) <= SLOWER * self._least:
                        return True
                if self._waited + time.perf_counter() - start > PATIENCE:
                    return False
        finally:
            self._waited += time.perf_counter() - start

    def _on(self, core: int) -> float:
        os.sched_setaffinity(0, {core})
        return self._probe()

    def _is_quiet(self) -> bool:
        return self._probe() <= SLOWER * self._least

    @staticmethod
    def _probe() -> float:
        """Seconds of a little work, the least of some: an interrupt slows one down, a neighbour all."""
        least = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            sum(range(2000))
            least = min(least, time.perf_counter() - start)
        return least
