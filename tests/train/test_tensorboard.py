"""TensorBoard's event files, with whichever of its writers is installed, read back byte by byte."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

WRITERS = [name for name in ("tensorboardX", "tensorboard") if find_spec(name)]

WRITE = """
import sys
if sys.argv[2] == "tensorboard":
    sys.modules["tensorboardX"] = None  # the other one is preferred where both are
from vibetensor.train.metrics import Metrics
metrics = Metrics(sys.argv[1])
for step in range(1, 4):
    metrics.write(step, loss=1.0 / step, lr=0.5)
metrics.write(3, val_loss=0.25)
metrics.close()
"""


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protocol buffer: varints as int, the rest as bytes."""

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    place = 0
    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[place : place + size]
        place += size


def scalars(path: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of an event file: records of length, checksum, Event, checksum."""
    content, found, place = path.read_bytes(), [], 0
    while place < len(content):
        (size,) = struct.unpack_from("<Q", content, place)
        event = list(fields(content[place + 12 : place + 12 + size]))
        place += size + 16
        step = next((value for number, value in event if number == 2), 0)
        for summary in (value for number, value in event if number == 5):
            for value in (dict(fields(part)) for number, part in fields(summary) if number == 1):
                (number,) = struct.unpack("<f", value[2])
                found.append((step, value[1].decode(), number))
    return found


@pytest.mark.parametrize("writer", ["tensorboardX", "tensorboard"])
def test_scalars(
    writer: str, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    if writer not in WRITERS:
        pytest.skip(f"needs {writer}")
    done = run_python(WRITE, tmp_path, writer)
    assert done.returncode == 0, done.stderr
    (events,) = (tmp_path / "tensorboard").iterdir()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], name, r[name]) for r in lines for name in r if name != "step"]
    assert len(expected) == 7
    written = scalars(events)
    assert [(step, tag) for step, tag, _ in written] == [(s, t) for s, t, _ in expected]
    assert [value for *_, value in written] == pytest.approx([v for *_, v in expected])
