"""What a run prints: one living line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """7s, 1:05, 2:03:04."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    return (f"{hours}:{minutes_left:02d}" if hours else str(minutes_left)) + f":{seconds_left:02d}"


def amount(value: float) -> str:
    """812, 31.2k, 4.05M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


class Progress:
    """Reports steps as they pass. Speed is a moving average over the last steps, so that
    validations and a slow first step do not distort it."""

    def __init__(self, first: int, steps: int, unit: str, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._living = self._stream.isatty()
        self._steps = steps
        self._unit = unit
        self._rate = self._seconds = 0.0
        self._last = time.monotonic()
        self._drawn = 0.0
        self._every = max(1, (steps - first) // 20)
        self._width = 0

    @property
    def units_per_second(self) -> float:
        return self._rate

    def resume_clock(self) -> None:
        """Time since the last step (a validation, a save) does not count."""
        self._last = time.monotonic()

    def step(self, done: int, loss: float, lr: float, units: int) -> None:
        """`done` steps are complete; this one handled `units` tokens or images."""
        now = time.monotonic()
        elapsed = max(now - self._last, 1e-9)
        self._last = now
        keep = 0.0 if self._seconds == 0 else 0.97
        self._seconds = keep * self._seconds + (1 - keep) * elapsed
        self._rate = units / self._seconds
        left = duration((self._steps - done) * self._seconds)
        facts = f"loss {loss:.4f}  lr {lr:.2e}  {amount(self._rate)} {self._unit}/s  ETA {left}"
        if self._living:
            if now - self._drawn < 0.08 and done < self._steps:
                return
            self._drawn = now
            self._draw(f"step {done}/{self._steps} ", facts, done / self._steps)
        elif done % self._every == 0 or done == self._steps:
            print(f"step {done}/{self._steps}  {facts}", file=self._stream, flush=True)

    def _draw(self, head: str, facts: str, part: float) -> None:
        columns = shutil.get_terminal_size().columns
        room = max(0, min(30, columns - len(head) - len(facts) - 10))
        filled = int(part * room)
        bar = "━" * filled + "─" * (room - filled)
        line = f"{head}{bar} {part:4.0%}  {facts}"[: max(1, columns - 1)]
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def line(self, text: str) -> None:
        """Prints a line above the living one."""
        if self._living:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        print(text, file=self._stream, flush=True)
