"""Images from a folder: CIFAR-10's binary format, MNIST's and Fashion-MNIST's idx files.

Nothing here needs a network except `download`, which runs only on `vibetensor download`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as torch
from vibetensor import _C
from vibetensor.train.config import seed_of


@dataclass
class Images:
    """pixels (N, C, H, W) uint8, labels (N,) int64."""

    pixels: Any
    labels: Any


_CIFAR_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
_IDX = [("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")]  # fmt: skip

HOW = (
    "vit needs a folder of images: --data DIR with CIFAR-10's binary files (data_batch_1.bin …, "
    "test_batch.bin) or MNIST's or Fashion-MNIST's idx files (train-images-idx3-ubyte[.gz] …). "
    "With a network, `vibetensor download cifar10 DIR` (or fashion-mnist, mnist) fetches and "
    "checks them."
)


def load_images(folder: str | None) -> tuple[Images, Images, str]:
    """(training images, test images, name of the format) found in `folder` or one folder below."""
    if folder is None:
        raise ValueError(HOW)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"'{folder}' is not a folder. {HOW}")
    inner = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    for place in [folder, *filter(os.path.isdir, inner)]:
        if _existing(place, "test_batch.bin"):
            return (
                _read_cifar(place, _CIFAR_TRAIN),
                _read_cifar(place, ["test_batch.bin"]),
                "CIFAR-10",
            )
        if _existing(place, _IDX[0][0]):
            return _read_idx_pair(place, *_IDX[0]), _read_idx_pair(place, *_IDX[1]), "idx"
    raise FileNotFoundError(f"no images in '{folder}'. {HOW}")


def _existing(folder: str, name: str) -> str | None:
    """The path of `name`, raw or gzipped; some copies spell idx names with a dot."""
    for variant in (
        name,
        name + ".gz",
        name.replace("-idx", ".idx"),
        name.replace("-idx", ".idx") + ".gz",
    ):
        path = os.path.join(folder, variant)
        if os.path.isfile(path):
            return path
    return None


def _content(folder: str, name: str) -> tuple[bytes, str]:
    path = _existing(folder, name)
    if path is None:
        raise FileNotFoundError(f"'{folder}' lacks {name}")
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        return file.read(), path


def _bytes_tensor(content: bytes | bytearray, shape: list[int]) -> Any:
    return _C._from_buffer(bytearray(content), torch.uint8, shape, 0)


def _read_cifar(folder: str, names: list[str]) -> Images:
    """Records of one label byte and 3×32×32 pixel bytes, plane by plane."""
    record = 1 + 3 * 32 * 32
    content = bytearray()
    for name in names:
        part, path = _content(folder, name)
        if not part or len(part) % record:
            raise ValueError(f"{path} has {len(part)} bytes, not a multiple of {record}")
        content += part
    table = _bytes_tensor(content, [len(content) // record, record])
    labels = table[:, 0].long()
    if labels.max().item() > 9:
        raise ValueError(f"{folder}: a label is above 9; are these CIFAR-10's binary files?")
    return Images(table[:, 1:].reshape(-1, 3, 32, 32), labels)


def _read_idx(folder: str, name: str) -> Any:
    """idx: two zero bytes, the type (8: unsigned byte), the rank, big-endian sizes, the data."""
    content, path = _content(folder, name)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    rank = content[3]
    shape = list(struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank]))
    size = 1
    for n in shape:
        size *= n
    data = content[4 + 4 * rank :]
    if len(data) != size or size == 0:
        raise ValueError(f"{path} claims shape {shape}, but holds {len(data)} bytes of data")
    return _bytes_tensor(data, shape)


def _read_idx_pair(folder: str, images: str, labels: str) -> Images:
    pixels, numbers = _read_idx(folder, images), _read_idx(folder, labels)
    if pixels.dim() != 3 or numbers.dim() != 1 or len(pixels) != len(numbers):
        raise ValueError(
            f"{folder}: images {list(pixels.shape)} and labels {list(numbers.shape)} do not belong "
            "together"
        )
    return Images(pixels.unsqueeze(1), numbers.long())


class ImageBatches:
    """Shuffled passes over images, normalised by the channels' mean and deviation. Batch n depends
    on (seed, n) alone. CIFAR images are mirrored at random in training."""

    def __init__(
        self, images: Images, batch: int, seed: int, mean: Any, deviation: Any, mirror: bool
    ):
        self._images = images
        self._batch = min(batch, len(images.labels))
        self._seed = seed
        self._mean, self._deviation = mean, deviation
        self._mirror = mirror
        self._per_pass = len(images.labels) // self._batch
        self._order: tuple[int, Any] = (-1, None)
        self._generator = torch.Generator()

    def __call__(self, number: int) -> tuple[Any, Any]:
        """images (batch, C, H, W) float32 and labels (batch,) int64."""
        epoch, position = divmod(number, self._per_pass)
        if self._order[0] != epoch:
            self._generator.manual_seed(seed_of(self._seed, epoch))
            order = torch.randperm(
                len(self._images.labels), generator=self._generator, device="cpu"
            )
            self._order = (epoch, order)
        chosen = self._order[1][position * self._batch : (position + 1) * self._batch]
        pixels = normalised(self._images.pixels[chosen], self._mean, self._deviation)
        if self._mirror:
            self._generator.manual_seed(seed_of(self._seed, number + 2**40))
            coin = torch.rand(self._batch, 1, 1, 1, generator=self._generator, device="cpu") < 0.5
            pixels = torch.where(coin, pixels.flip(3), pixels)
        return pixels, self._images.labels[chosen]


def normalised(pixels: Any, mean: Any, deviation: Any) -> Any:
    return (pixels.float() / 255 - mean) / deviation


def channel_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and deviation of every channel over the first 5000 images, pixels scaled to 0…1."""
    sample = images.pixels[:5000].float() / 255
    flat = sample.transpose(0, 1).flatten(1)
    return flat.mean(dim=1).tolist(), [max(d, 1e-3) for d in flat.std(dim=1).tolist()]


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# The MD5 sums that the data sets' own pages state: they find damage, not malice, and the readers
# above check every size again.
SOURCES = {
    "cifar10": {
        _CIFAR + "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    },
    "fashion-mnist": {
        _FASHION + "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        _FASHION + "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        _FASHION + "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        _FASHION + "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "mnist": {
        _MNIST + "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        _MNIST + "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        _MNIST + "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        _MNIST + "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
}


def download(name: str, folder: str) -> None:
    """Fetches a data set into `folder`, checking each file before it gets its name."""
    import shutil
    import tarfile
    import urllib.request

    os.makedirs(folder, exist_ok=True)
    for url, expected in SOURCES[name].items():
        target = os.path.join(folder, url.rsplit("/", 1)[1])
        partial = target + ".part"
        print(f"fetching {url}")
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(partial, "wb") as file:
                while piece := answer.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != expected:
                raise ValueError(f"{url} has checksum {digest.hexdigest()}, expected {expected}")
            os.replace(partial, target)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)
        if target.endswith(".tar.gz"):
            with tarfile.open(target) as archive:
                for member in archive:  # plain files only, by base name: nothing lands elsewhere
                    if member.isfile() and (source := archive.extractfile(member)):
                        with open(
                            os.path.join(folder, os.path.basename(member.name)), "wb"
                        ) as file:
                            shutil.copyfileobj(source, file)
            os.unlink(target)
    print(f"done: vibetensor train vit --data {folder}")
