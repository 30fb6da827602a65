"""The tape: what a captured step does, as data that passes read and change.

A `Buffer` is one block of memory, a `View` a tensor on one (dtype, sizes, strides, offset), an
`Op` one call of an op with the views it reads and writes. `Tape` is the list of ops in order. Views
and in-place changes are exact: two views of one buffer are one memory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PHASES = ("forward", "backward", "optimizer")


@dataclass(eq=False, slots=True)
class Buffer:
    """A block of memory of the step.

    role: "state" (lives before and after the step: parameters, moments, inputs' staging), "output"
    (made by the step, read after it), "scratch" (made and used up inside the step), "constant" (made
    once by `Tape.setup`). fixed: state whose values nobody can change, as a number in the program.
    """

    index: int
    nbytes: int
    device: str
    role: str
    fixed: bool = False

    @property
    def name(self) -> str:
        """A short name: the role's letter and the index."""
        return f"{self.role[0]}{self.index}"


@dataclass(frozen=True, slots=True)
class View:
    """A tensor on a buffer. `offset` and `strides` are in elements. number: a Python number, which
    promotes as one."""

    buffer: Buffer
    dtype: Any
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    number: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).rsplit(".", 1)[-1]
        shape = ", ".join(map(str, self.sizes))
        return f"{self.buffer.name}:{dtype}[{shape}]"


@dataclass(frozen=True, slots=True)
class Source:
    """A line of the captured program."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


@dataclass(eq=False, slots=True)
class Op:
    """One call: `args` as in the op's schema with views in place of tensors.

    is_view: it only names memory that exists, nothing runs for it.
    """

    name: str
    args: tuple[Any, ...]
    inputs: list[View | None]
    outputs: list[View | None]
    phase: str
    capture_class: str
    source: Source | None
    call: Any  # the native call that holds the arguments which are no tensors
    random_offset: int = -1
    is_view: bool = False

    @property
    def is_random(self) -> bool:
        return self.random_offset >= 0

    def reads(self) -> Iterator[View]:
        for view in self.inputs:
            if view is not None:
                yield view

    def writes(self) -> Iterator[View]:
        for view in self.outputs:
            if view is not None:
                yield view

    def text(self) -> str:
        """The call without its line."""
        outputs = ", ".join(map(str, self.writes()))
        shown = ", ".join(_show(arg) for arg in self.args)
        return f"{outputs} = {self.name}({shown})" if outputs else f"{self.name}({shown})"

    def __str__(self) -> str:
        return f"{self.text()}  # {self.source}" if self.source else self.text()


def _show(arg: Any) -> str:
    if isinstance(arg, list | tuple):
        return "[" + ", ".join(_show(item) for item in arg) + "]"
    return str(arg) if isinstance(arg, View) else repr(arg)


@dataclass(frozen=True, slots=True)
class Decision:
    """A rewrite that a pass made, or one that it nearly made and why it did not."""

    by: str  # the pass
    made: bool
    text: str
    op: Op  # where

    def __str__(self) -> str:
        return f"{self.by}: {self.text} ({self.op.source})"


@dataclass(eq=False)
class Tape:
    """The ops of a step in order, and the buffers they use.

    draws: the counters that a run takes from each device's random numbers. decisions: what passes
    did. bound: how far results may be from the recorded ops', relative to their largest element; 0
    is bit for bit. passes: of each that ran its name, and the ops before and after it. setup: ops that
    run once, before the first replay, and make the constants.
    """

    ops: list[Op]
    buffers: list[Buffer]
    draws: list[tuple[str, int]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    bound: float = 0.0
    passes: list[tuple[str, int, int]] = field(default_factory=list)
    setup: list[Op] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ops)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __str__(self) -> str:
        lines, phase = [], None
        if self.setup:
            lines += ["# once", *map(str, self.setup)]
        for at, op in enumerate(self.ops):
            if op.phase != phase:
                phase = op.phase
                lines.append(f"# {phase}")
            lines.append(f"{at:4} {op}")
        return "\n".join(lines)

    def diff(self, other: Tape) -> list[str]:
        """The calls in which two tapes differ, in the manner of a unified diff."""
        a, b = ([op.text() for op in tape.ops] for tape in (self, other))
        return list(difflib.unified_diff(a, b, "before", "after", lineterm="", n=1))

    def to_json(self) -> str:
        """The tape as JSON: ops with names, arguments and line; buffers with role and bytes."""
        return json.dumps(
            {
                "buffers": [
                    {"index": b.index, "nbytes": b.nbytes, "device": b.device, "role": b.role}
                    for b in self.buffers
                ],
                "ops": [
                    {
                        "name": op.name,
                        "args": [_json(arg) for arg in op.args],
                        "outputs": [_json(view) for view in op.outputs],
                        "phase": op.phase,
                        "class": op.capture_class,
                        "source": str(op.source) if op.source else None,
                    }
                    for op in self.ops
                ],
                "draws": [list(draw) for draw in self.draws],
            }
        )

    def replaced(
        self,
        ops: Iterable[Op],
        decisions: Iterable[Decision] = (),
        bound: float = 0.0,
        setup: Iterable[Op] = (),
    ) -> Tape:
        """The same step with other ops, after a pass that made these decisions, with its bound.
        setup: ops to run once, after those that do already."""
        return Tape(
            list(ops),
            self.buffers,
            self.draws,
            [*self.decisions, *decisions],
            max(self.bound, bound),
            setup=[*self.setup, *setup],
        )

    def new_buffer(self, nbytes: int, device: str, role: str = "scratch") -> Buffer:
        """Memory for a pass."""
        buffer = Buffer(len(self.buffers), nbytes, device, role)
        self.buffers.append(buffer)
        return buffer


def _json(arg: Any) -> Any:
    if isinstance(arg, View):
        return {
            "buffer": arg.buffer.index,
            "dtype": str(arg.dtype),
            "sizes": arg.sizes,
            "strides": arg.strides,
            "offset": arg.offset,
        }
    if isinstance(arg, list | tuple):
        return [_json(item) for item in arg]
    return arg if isinstance(arg, str | int | float | bool | type(None)) else str(arg)
