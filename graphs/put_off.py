"""A recording whose ops are put off: run afterwards by a program, in memory that is planned, so that
the run that is recorded takes no more than a replay.

See `csrc/graphs/tape.h`. Python has finished by then. Should one of the ops fail, what Python did that
relies on them is taken back: gradients and state of optimizers that the run made, and schedules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs.dry import SchedulesAsTheyWere
from vibetensor.graphs.session import Session


class PutOff:
    """One recording's ops that are yet to run; none where it did not put any off."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._schedules = SchedulesAsTheyWere()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes what Python does meanwhile, on this thread."""
        with self._schedules.watching():
            yield

    def catch_up(self, native: Any) -> None:
        """Runs them one by one. Those before one that fails are done."""
        try:
            native.catch_up()
        except BaseException:
            self._take_back(native)
            raise

    def run(self, native: Any, program: Any) -> None:
        """Runs the program that does what they do."""
        native.hand_over()
        try:
            program.run()
        except BaseException:
            self._take_back(native)
            raise

    def _take_back(self, native: Any) -> None:
        fresh = [storage[2] for storage in native.storages()]

        def made(value: Any) -> bool:
            index = native.find(value) if isinstance(value, vt.Tensor) else -1
            return index >= 0 and fresh[index]

        for leaf in native.leaves():
            if made(leaf.grad):
                leaf.grad = None
        for optimizer in self._session.optimizers:
            for parameter, values in list(optimizer.state.items()):
                for key in [key for key, value in values.items() if made(value)]:
                    del values[key]
                if not values:
                    del optimizer.state[parameter]
        self._schedules.put_back()
