"""Small image files in the formats that `vibetensor train vit` reads."""

import gzip
import struct

import pytest


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
