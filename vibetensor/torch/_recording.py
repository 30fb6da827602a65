"""What optimizers, schedules and GradScaler ask of a recording on this thread.

A recording (see vibetensor.graphs) sees the ops of a step. "running": they run as they are
recorded. "dry": they do not, so whoever makes lasting state makes it `outside`, for real, and says
with `undo_with` how to take it back if the recording fails.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vibetensor import _C


def recording() -> str | None:
    """ "running", "dry", or None where nothing is recorded on this thread."""
    return _C.graphs.recording()


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Runs its body as if nothing were recorded: host reads, and state that was there before."""
    paused = _C.graphs.pause()
    try:
        yield
    finally:
        if paused is not None:
            paused.resume()


class Notes:
    """What Python does around the ops that a recording must know of."""

    def __init__(self) -> None:
        # The last first, if the recording fails; None where nobody will ask.
        self.undo: list[Callable[[], None]] | None = None
        self.unsteady = False  # the next run will do something else
        self.taken_back = False  # state that this one made, which the next makes again
        # Makes an option of a group a tensor that replays set; None for what it cannot be.
        self.live: Callable[[dict[str, Any], str], Any] | None = None
        # Objects with the attributes, and their values, that the run relied on.
        self.relied_on: dict[tuple[int, str], tuple[Any, str, Any]] = {}


class _Current(threading.local):
    notes: Notes | None = None


_current = _Current()


@contextlib.contextmanager
def noting(notes: Notes) -> Iterator[None]:
    """Notes of this thread go to `notes` meanwhile."""
    before, _current.notes = _current.notes, notes
    try:
        yield
    finally:
        _current.notes = before


def undo_with(undo: Callable[[], None]) -> None:
    """Called if the recording fails, or never."""
    if _current.notes is not None and _current.notes.undo is not None:
        _current.notes.undo.append(undo)


def rely_on(owner: Any, names: Iterable[str]) -> None:
    """What comes of this run is right as long as these attributes are what they are now."""
    if (notes := _current.notes) is not None:
        for name in names:
            key = (id(owner), name)
            notes.relied_on.setdefault(key, (owner, name, getattr(owner, name)))


def mark_unsteady() -> None:
    """This run did what the next one will not: it is not kept."""
    if _current.notes is not None:
        _current.notes.unsteady = True


def mark_taken_back() -> None:
    """State that this run made is gone again, so that the next run may be like it."""
    if _current.notes is not None:
        _current.notes.taken_back = True


def live_momentum(group: dict[str, Any], key: str) -> Any:
    """The momentum of an optimizer's group, `group[key]` or the first of two betas: a number, or in a
    recording a 0-d tensor that replays set to what the group has then. Schedules cycle it."""
    notes = _current.notes
    if notes is not None and notes.live is not None and recording() is not None:
        live = notes.live(group, key)
        if live is not None:
            return live
    value = group[key]
    return value[0] if isinstance(value, tuple | list) else value
