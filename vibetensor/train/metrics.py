"""metrics.jsonl: one JSON object a line, as they come; and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

from vibetensor.io.atomic import sync_folder


class Metrics:
    """Appends to RUN/metrics.jsonl. On resuming at `first_step`, records beyond it are dropped:
    they belong to steps that are about to be taken again.

    A line that cannot be written (disk full) is kept and tried again with the next one; `warn` is
    told of the first. TensorBoard's events end where they fail. Raises OSError if the file cannot be
    made; that of an earlier run is then as it was.
    """

    def __init__(self, run: str, first_step: int = 0, warn: Callable[[str], None] = warnings.warn):
        self.path = os.path.join(run, "metrics.jsonl")
        self.records: list[dict[str, Any]] = []
        if first_step and os.path.exists(self.path):
            self.records = [r for r in read_metrics(self.path) if r["step"] <= first_step]
        self._warn = warn
        self._warned = False
        self._unwritten = b""
        self._file = _replace(self.path, b"".join(map(_line, self.records)))
        self._board = _tensorboard(run)

    def write(self, step: int, **values: float) -> None:
        """Records `values` as of `step` completed steps."""
        record = {"step": step, **values}
        self.records.append(record)
        self._unwritten += _line(record)
        self._write_lines()
        if self._board:
            try:
                self._board(step, values)
            except OSError as error:
                self._board = None  # its writers do not recover
                self._warn(f"could not write TensorBoard's events: {error}; going on without them")

    def _write_lines(self) -> None:
        try:
            # Not through a buffer: after an error it does not tell what reached the file.
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"could not write {self.path}: {error}; going on, and trying again")

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever `name` was recorded."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def close(self) -> None:
        self._write_lines()
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _replace(path: str, content: bytes) -> io.FileIO:
    """The file `path`, open at its end, with `content` instead of what it held: whole or not."""
    temporary = f"{path}.tmp"
    file = open(temporary, "wb", buffering=0)  # noqa: SIM115
    try:
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        file.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(os.path.dirname(path))
    return file


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; they end before a line that is none (a crash cut it off)."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
    return records


class _Board:
    """Scalars into TensorBoard's event files, through tensorboardX or TensorBoard's own writer."""

    def __init__(self, folder: str):
        try:
            from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

            self._writer = SummaryWriter(folder)
            self._protos = None
        except ImportError:
            from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore
            from tensorboard.summary.writer.event_file_writer import (  # type: ignore
                EventFileWriter,
            )

            self._writer = EventFileWriter(folder)
            self._protos = (event_pb2.Event, summary_pb2.Summary)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if self._protos is None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            return
        import time

        Event, Summary = self._protos
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        )

    def close(self) -> None:
        self._writer.close()


def _tensorboard(run: str) -> _Board | None:
    try:
        return _Board(os.path.join(run, "tensorboard"))
    except ImportError:
        return None
