"""Text to learn from: files, folders, or the Python standard library's own sources."""

from __future__ import annotations

import math
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import vibetensor.torch as torch
from vibetensor import _C
from vibetensor.train.config import seed_of

# Enough for a small model to learn from for minutes without repeating itself.
_DEFAULT_BYTES = 4_000_000


class Vocabulary:
    """Numbers for bytes (`byte`), or for the characters seen in training (`char`; number 0 stands
    for all others)."""

    def __init__(self, kind: str, characters: str = ""):
        self.kind = kind
        self.characters = characters
        self._numbers = {character: i + 1 for i, character in enumerate(characters)}

    @classmethod
    def of(cls, kind: str, text: bytes) -> Vocabulary:
        if kind == "byte":
            return cls("byte")
        return cls("char", "".join(sorted(set(text.decode("utf-8", "replace")))))

    def __len__(self) -> int:
        return 256 if self.kind == "byte" else len(self.characters) + 1

    def encode(self, text: str | bytes) -> Sequence[int]:
        if self.kind == "byte":
            return text if isinstance(text, bytes) else text.encode()
        characters = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return [self._numbers.get(character, 0) for character in characters]

    def decode(self, numbers: Sequence[int]) -> str:
        if self.kind == "byte":
            return bytes(numbers).decode("utf-8", "replace")
        return "".join("\ufffd" if n == 0 else self.characters[n - 1] for n in numbers)

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "characters": self.characters}


def read_text(data: str | None, limit: int = _DEFAULT_BYTES) -> tuple[bytes, bytes, str]:
    """(training text, validation text, description of the source).

    None stands for `limit` bytes at most of the Python standard library's own modules. A folder is
    split by file, one in ten (by a checksum of its name) for validation; a single file keeps its
    last tenth for that. Binary files are skipped. Raises ValueError where there is too little text,
    OSError where there is none.
    """
    if data is None:
        folder = sysconfig.get_path("stdlib")
        train, held_out, count = _split_folder(folder, _python_sources(folder), limit)
        source = f"{count} files of Python's standard library"
    elif os.path.isdir(data):
        train, held_out, count = _split_folder(data, _all_files(data), None)
        source = f"{count} files of {data}"
    else:
        with open(data, "rb") as file:
            content = file.read()
        cut = len(content) * 9 // 10
        train, held_out, source = content[:cut], content[cut:], data
    if not held_out:  # a folder of a few files may leave none aside
        cut = len(train) * 9 // 10
        train, held_out = train[:cut], train[cut:]
    if len(held_out) < 2:
        raise ValueError(
            f"{source}: {len(train) + len(held_out)} bytes of text are too few to train on"
        )
    return train, held_out, source


def _all_files(root: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _python_sources(root: str) -> list[str]:
    """The library's own modules: not its tests, not what was installed into it. Their order is that
    of a checksum, so that a size limit leaves a mixture and not the beginning of the alphabet."""
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for path in _all_files(root):
        parts = os.path.relpath(path, root).split(os.sep)
        if path.endswith(".py") and not unwanted.intersection(parts):
            found.append(path)
    return sorted(found, key=lambda path: (_checksum(root, path), path))


def _checksum(root: str, path: str) -> int:
    return zlib.crc32(os.path.relpath(path, root).replace(os.sep, "/").encode())


def _split_folder(root: str, paths: list[str], limit: int | None) -> tuple[bytes, bytes, int]:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = count = 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:  # dangling links and unreadable files are common in folders
            continue
        if not content or b"\0" in content[:8192]:
            continue
        if limit is not None and total + len(content) > limit:
            continue
        # The low digits order the default files; the split takes others, to be independent.
        parts[_checksum(root, path) // 1000 % 10 == 0].append(content)
        total += len(content)
        count += 1
    if not count:
        raise FileNotFoundError(f"no text files in '{root}'; name some with --data FILE_OR_DIR")
    return b"\n".join(parts[0]), b"\n".join(parts[1]), count


def unigram_entropy(numbers: Sequence[int]) -> float:
    """Entropy in nats of single tokens: the loss of the best model that ignores context."""
    counts = Counter(numbers)
    total = sum(counts.values())
    return sum(n / total * math.log(total / n) for n in counts.values())


def token_tensor(numbers: Sequence[int]) -> Any:
    """Token numbers (each below 256, or below 2^31 as int32) as a 1-d tensor."""
    if isinstance(numbers, bytes):
        return _C._from_buffer(bytearray(numbers), torch.uint8, [len(numbers)], 0)
    return torch.tensor(numbers, dtype=torch.int32, device="cpu")


class TextBatches:
    """Random windows of a token tensor. Batch n depends on (seed, n) alone, so a resumed run needs
    no more than the number of the next batch to go on identically."""

    def __init__(self, tokens: Any, block: int, batch: int, seed: int):
        if len(tokens) <= block:
            raise ValueError(
                f"a text of {len(tokens)} tokens is too short for --block {block}; give more text "
                "or a smaller block"
            )
        self._tokens = tokens
        self._block = block
        self._batch = batch
        self._seed = seed
        self._generator = torch.Generator()

    def __call__(self, number: int) -> tuple[Any, Any]:
        """tokens and next tokens, both (batch, block) int64."""
        self._generator.manual_seed(seed_of(self._seed, number))
        last = len(self._tokens) - self._block
        starts = torch.randint(last, (self._batch, 1), generator=self._generator, device="cpu")
        window = self._tokens[starts + torch.arange(self._block + 1, device="cpu")].long()
        return window[:, :-1], window[:, 1:]
