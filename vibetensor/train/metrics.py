"""metrics.jsonl: one JSON object a line, as they come; and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
from typing import Any


class Metrics:
    """Appends to RUN/metrics.jsonl. On resuming at `first_step`, records beyond it are dropped:
    they belong to steps that are about to be taken again."""

    def __init__(self, run: str, first_step: int = 0):
        self.path = os.path.join(run, "metrics.jsonl")
        self.records: list[dict[str, Any]] = []
        if first_step and os.path.exists(self.path):
            self.records = [r for r in read_metrics(self.path) if r["step"] <= first_step]
        self._file = open(self.path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        for record in self.records:
            self._file.write(json.dumps(record) + "\n")
        self._board = _tensorboard(run)

    def write(self, step: int, **values: float) -> None:
        """Records `values` as of `step` completed steps."""
        record = {"step": step, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        if self._board:
            self._board(step, values)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever `name` was recorded."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


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
