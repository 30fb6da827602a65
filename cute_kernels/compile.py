"""Compiles one variant to an object and a header, with what the assembler said of it.

Runs in worker processes of the builder: the DSL is imported once a worker.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .contract import Contract
from .manifest import Built
from .registry import Kernel

ARCHITECTURE = "sm_90a"
#: The host code of an object runs on any x86-64, whatever the machine that builds has.
OPTIONS = (
    f"--gpu-arch {ARCHITECTURE} --host-target 'llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64'"
)


def placeholders(contract: Contract) -> list[Any]:
    """The arguments a kernel is compiled with: dynamic extents and strides, promised divisors."""
    from . import dsl

    runtime = dsl.cute.runtime
    extents = {e.name: dsl.cute.sym_int(divisibility=e.divisible_by) for e in contract.extents}
    arguments: list[Any] = []
    for t in contract.tensors:
        shape = tuple(extents[name] for name in t.shape)
        strides = tuple(
            1 if i == len(shape) - 1 else dsl.cute.sym_int64(divisibility=t.stride_divisible_by)
            for i in range(len(shape))
        )
        arguments.append(
            runtime.make_fake_tensor(dsl.DTYPES[t.dtype], shape, strides, assumed_align=t.align)
        )
    zero = {"float32": dsl.Float32, "int32": dsl.Int32, "int64": dsl.Int64, "uint64": dsl.Uint64}
    arguments += [zero[s.type](0) for s in contract.scalars]
    return [*arguments, runtime.make_fake_stream()]


@contextlib.contextmanager
def _captured_output() -> Iterator[list[str]]:
    """What the compiler's native code writes to stdout and stderr."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            for fd, old in zip((1, 2), saved):
                os.dup2(old, fd)
                os.close(old)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _usage(text: str) -> tuple[int, int]:
    """Registers and bytes spilled of the worst kernel in ptxas's remarks."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
    return max(registers, default=0), sum(spills)


def compile_variant(kernel: Kernel, variant: Any, out: Path, key: str) -> Built:
    """Writes `out`/PREFIX.o and .h and returns their record. Raises what the DSL raises."""
    from . import dsl

    if dsl.PROBLEM:
        raise RuntimeError(dsl.PROBLEM)
    prefix = kernel.prefix(variant)
    contract = kernel.contract(variant)
    started = time.perf_counter()
    with _captured_output() as said:
        compiled = dsl.cute.compile(kernel.make(variant), *placeholders(contract), options=OPTIONS)
        compiled.export_to_c(file_path=str(out), file_name=prefix, function_prefix=prefix)
    seconds = time.perf_counter() - started
    registers, spilled = _usage(said[0])
    if registers == 0:
        raise RuntimeError(f"{prefix}: the assembler's remarks were not found in:\n{said[0]}")
    return Built(
        kernel=kernel.name,
        family=kernel.family,
        variant=variant.name,
        prefix=prefix,
        key=key,
        options=kernel.options(variant),
        registers=registers,
        spilled_bytes=spilled,
        object_bytes=(out / f"{prefix}.o").stat().st_size,
        seconds=round(seconds, 2),
    )
