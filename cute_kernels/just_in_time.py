"""Variants of the library's own kernels that were not compiled into it, made as they are chosen: asked
for by VT_CUTE_JIT=1. They are kept in the user's cache folder, like the objects of users' ops."""

from __future__ import annotations

import sys
import time

from . import objects
from .build import BuildError, dsl_version, key_of, source_hash
from .registry import load
from .user_ops import kernel_log


def symbols(kernel: str, variant: str) -> tuple[str, str, str, str] | None:
    """The shared library with a variant's code and the names of its functions; None, with a line on
    stderr, where it cannot be made. It never raises: an op waits for it, and has another kernel."""
    try:
        return _symbols(kernel, variant)
    except Exception as error:
        print(f"vibetensor: CuTe {kernel} {variant} is not compiled: {error}", file=sys.stderr)
        return None


def _symbols(kernel: str, variant: str) -> tuple[str, str, str, str]:
    found = load()[kernel]
    of = next(v for v in found.variants if v.name == variant)
    folder = objects.cache_folder(create=True)
    if folder is None:
        raise BuildError("the cache folder is not this user's alone")
    prefix = found.prefix(of)
    # Without the DSL what was made before is still found.
    key = key_of(found, of, source_hash(found.family), "")[:24]
    made = objects.find(prefix, key, folder)
    if made is None:
        if not dsl_version():
            raise BuildError("the CuTe DSL is not installed")
        began = time.perf_counter()
        job = objects.Job(variant, prefix, found.contract(of), lambda: found.make(of))
        made, compiled = objects.find_or_compile(prefix, key, [job], folder)
        if compiled and kernel_log():
            spent = time.perf_counter() - began
            print(f"vibetensor: CuTe {kernel} {variant} compiled in {spent:.1f} s", file=sys.stderr)
    (code,) = made.codes
    return str(made.library), code.entry, code.init, code.load
