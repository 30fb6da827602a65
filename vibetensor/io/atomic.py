"""Small files and whole folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from typing import Any


def sync_folder(folder: str) -> None:
    """Makes renames inside `folder` durable. File systems that cannot sync a folder are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON so that `path` is either the old file, whose permissions it keeps, or the
    whole new one. Where `path` is a link to a file, that one is replaced; what is no file (a device, a
    pipe) is written as it is."""
    target = os.path.realpath(path)
    # Made before a file is touched: a value that is not JSON costs nothing.
    text = json.dumps(value, indent=1, allow_nan=True)
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        with open(target, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        return
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # there may be no file yet
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]):
    """Yields `path`.tmp to fill; on success it becomes `path`, on any error it is removed.

    A `path` that exists is replaced only once the new folder is complete. What a killed process
    left at `path`.tmp is removed first.
    """
    final = os.fspath(path)
    temporary, displaced = final + ".tmp", final + ".old"
    if os.path.isdir(displaced) and not os.path.isdir(final):
        # A process was killed between the two renames below: this is the good one.
        os.rename(displaced, final)
    for leftover in (temporary, displaced):
        shutil.rmtree(leftover, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        sync_folder(temporary)
        if os.path.isdir(final):
            # Folders cannot be exchanged portably; for this moment the good one is `path`.old.
            os.rename(final, displaced)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.isdir(displaced) and not os.path.isdir(final):
            os.rename(displaced, final)
        raise
    sync_folder(os.path.dirname(final))
    shutil.rmtree(displaced, ignore_errors=True)
