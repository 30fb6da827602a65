"""Child processes that import the same vibetensor as the tests; small image files."""

import gzip
import os
import struct
import subprocess
import sys

import pytest

# A stand-in for the core that pytest loaded with -p must be loaded by children too.
STAND_IN = "import io_shim\n" if "io_shim" in sys.modules else ""


@pytest.fixture
def start_python(tmp_path):
    """start_python(source, *arguments) → Popen with its output piped."""

    def start(source, *arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(
            [sys.executable, "-c", STAND_IN + source, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment,
        )

    return start


def _write_cifar(folder, count=4):
    for name in ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin",
                 "data_batch_5.bin", "test_batch.bin"]:  # fmt: skip
        records = b"".join(
            bytes([i % 10]) + bytes([i]) * 1024 + bytes([100]) * 2048 for i in range(count)
        )
        (folder / name).write_bytes(records)


def _idx(shape, data):
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


def _write_idx(folder, zipped):
    for name, count in (("train", 6), ("t10k", 2)):
        images = _idx((count, 8, 8), bytes(range(64)) * count)
        labels = _idx((count,), bytes(range(count)))
        if zipped:
            (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
        else:
            (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
            (folder / f"{name}-labels.idx1-ubyte").write_bytes(labels)


@pytest.fixture
def write_cifar():
    """write_cifar(folder, count=4): CIFAR-10 files of `count` images each."""
    return _write_cifar


@pytest.fixture
def write_idx():
    """write_idx(folder, zipped): idx files of 6 images to train on and 2 to test."""
    return _write_idx
