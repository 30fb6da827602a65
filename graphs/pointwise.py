"""Pointwise ops as parts of one: what they compute in, and the program of `_fused_pointwise`.

On the CPU the fused op runs its ops one after the other on each block of elements, every one by its
own kernel on its own dtypes. On a GPU it is a kernel made for the chain, which has fewer ops
(csrc/cuda/chain_source.cpp) and rounds as theirs do. An operand is one view for the whole op.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.rewrite import make_op
from vibetensor.graphs.tape import Buffer, Op, View

NAME = "_fused_pointwise"
# Ops that are not of the kind `pointwise` and have a kernel for blocks, with the attributes it takes.
_BY_ROWS = {"_to_dtype": 0, "clone": 0, "copy_": 0, "_where": 0, "_dropout_backward": 1}
# What a GPU's chains are made of besides, and the dtypes of their operands.
_ON_GPU = frozenset(
    [
        "abs",
        "add",
        "div",
        "eq",
        "erf",
        "exp",
        "exp2",
        "ge",
        "gelu",
        "gelu_backward",
        "gt",
        "le",
        "log",
        "log2",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "maximum",
        "minimum",
        "mish",
        "mul",
        "ne",
        "neg",
        "pow",
        "reciprocal",
        "relu",
        "rsqrt",
        "sigmoid",
        "sigmoid_backward",
        "silu",
        "silu_backward",
        "sqrt",
        "square",
        "sub",
        "tanh",
        "tanh_backward",
        "threshold_backward",
    ]
)
_GPU_DTYPES = (vt.bool, vt.float16, vt.bfloat16, vt.float32, vt.float64)
_GPU_DIMS = 6
_LONGEST_TEXT = 8
_MOST_INPUTS = 7  # of one op
# The runtime's numbers of dtypes.
_DTYPES = [
    vt.bool, vt.uint8, vt.int8, vt.int16, vt.int32, vt.int64,
    vt.float16, vt.bfloat16, vt.float32, vt.float64, vt.float8_e4m3fn, vt.float8_e5m2,
]  # fmt: skip

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Access:
    """How an op walks a buffer: strides over its iteration shape without dimensions of one element;
    None for one that is dense in that order, () for a single element."""

    buffer: Buffer
    dtype: Any
    offset: int
    strides: Strides | None
    number: bool = False

    @property
    def is_single(self) -> bool:
        return self.strides == ()


@dataclass
class Step:
    """One op of a chain. shape: over which it iterates, None if every operand is dense."""

    op: Op
    out: Access
    inputs: list[Access]
    attributes: list[Any]
    numel: int
    shape: tuple[int, ...] | None

    @property
    def device(self) -> str:
        return self.out.buffer.device

    @property
    def fastest(self) -> int:
        """The dimension of `shape` along which the output lies element by element, counted from the
        last one."""
        strides = self.out.strides
        return len(strides) - 1 - _fastest(strides) if strides else 0


def step_of(op: Op) -> Step | str:
    """The op as a part of a chain; why it cannot be one, empty if it is no pointwise op at all."""
    by_rows = op.name in _BY_ROWS
    if not by_rows and not (
        op.capture_class == "pointwise" and _C.graphs.has_pointwise_kernel(op.name)
    ):
        return f"{op.name} draws random numbers" if op.is_random else ""
    views = [arg for arg in op.args if isinstance(arg, View)]
    (out,) = op.writes()
    numel = math.prod(out.sizes)
    device = out.buffer.device
    if device == "cpu" and any(view.buffer.device != "cpu" for view in views):
        return f"{op.name} reads another device"
    if device != "cpu" and (problem := _problem_on_gpu(op, out, views)):
        return problem
    if len(views) > _MOST_INPUTS or numel == 0:
        return f"{op.name} has no elements" if numel == 0 else f"{op.name} has many inputs"
    if op.name == "copy_":
        views = views[1:]  # it reads nothing of what it writes
    attributes = [arg for arg in op.args if not isinstance(arg, View)]
    if by_rows:
        attributes = attributes[: _BY_ROWS[op.name]]
    if any(not _is_attribute(value) for value in attributes):
        return f"{op.name} has an argument that is no number"
    if op.name in ("pow", "pow_") and math.prod(views[1].sizes) != 1:
        return f"{op.name} looks at its exponents as a whole"
    sizes = [n for n in out.sizes if n != 1]
    result = access_of(out, out.sizes)
    if any(stride == 0 for stride in result.strides or ()):
        return f"{op.name} writes one place for several elements"
    inputs = [access_of(view, out.sizes) for view in views]
    if device != "cpu" and not _by_rows(result, inputs):
        return f"{op.name} reads its operands across rows"
    dense = all(access.strides is None or access.is_single for access in (result, *inputs))
    return Step(op, result, inputs, attributes, numel, None if dense else tuple(sizes))


def _problem_on_gpu(op: Op, out: View, views: Sequence[View]) -> str:
    """Why an op is no part of a GPU's chains, apart from how its operands lie."""
    name = op.name.removesuffix("_")
    if op.name not in _BY_ROWS and name not in _ON_GPU:
        return f"{op.name} is no part of chains on {out.buffer.device}"
    if any(view.dtype not in _GPU_DTYPES for view in (out, *views) if not view.number):
        return f"{op.name} has operands that are integers or 8-bit floats"
    if any(
        view.buffer.device != out.buffer.device and math.prod(view.sizes) != 1 for view in views
    ):
        return f"{op.name} reads another device"
    if sum(n != 1 for n in out.sizes) > _GPU_DIMS:
        return f"{op.name} has many dimensions"
    if op.name not in _BY_ROWS:
        _, compute = _C.graphs.pointwise(op.name, _stand_ins(op))
        tests = out.dtype == vt.bool and compute == vt.bool
        if compute not in _GPU_DTYPES or (compute == vt.bool and not tests):
            return f"{op.name} computes in integers"
    return chains_problem(out.buffer.device)


@functools.cache
def chains_problem(device: str) -> str:
    """Why a device has no chains; empty if it has."""
    problem = _C.graphs.chains_problem(device)
    return f"no chains on {device}: {problem}" if problem else ""


def _fastest(strides: Sequence[int]) -> int:
    """The dimension with the least stride, the first of several."""
    return min(range(len(strides)), key=lambda d: strides[d])


def _by_rows(result: Access, inputs: Sequence[Access]) -> bool:
    """Whether all lie element by element where the result does, or are one element there."""
    strides = result.strides
    if strides is None:
        return all(a.is_single or a.strides is None or a.strides[-1] < 2 for a in inputs)
    fastest = _fastest(strides)
    if strides[fastest] != 1:
        return False
    dense = fastest == len(strides) - 1
    return all(
        a.is_single or (dense if a.strides is None else a.strides[fastest] < 2) for a in inputs
    )


def _is_attribute(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.encode()) <= _LONGEST_TEXT
    return isinstance(value, bool | int | float)


def access_of(view: View, sizes: Sequence[int]) -> Access:
    """How an op over these sizes walks an operand."""
    lead = len(sizes) - len(view.sizes)
    strides = tuple(
        0 if d < lead or view.sizes[d - lead] == 1 else view.strides[d - lead]
        for d, n in enumerate(sizes)
        if n != 1
    )
    shape = [n for n in sizes if n != 1]
    if strides == _dense(shape):
        # A single element of a single one, too: there, dense and single are the same.
        return Access(view.buffer, view.dtype, view.offset, None, view.number)
    if not any(strides):
        strides = ()
    return Access(view.buffer, view.dtype, view.offset, strides, view.number)


def _dense(shape: Sequence[int]) -> Strides:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


@dataclass
class _Registers:
    """Registers by dtype; one whose value is read for the last time is free for the next."""

    dtypes: list[Any] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def take(self, dtype: Any, instead: int | None) -> int:
        """A register; `instead`, one that ends here, if it is of the dtype."""
        if instead is not None and self.dtypes[instead] == dtype:
            return instead
        for index in self.free:
            if self.dtypes[index] == dtype:
                self.free.remove(index)
                return index
        self.dtypes.append(dtype)
        return len(self.dtypes) - 1


def fuse(steps: Sequence[Step], inner: set[Buffer]) -> Op:
    """The steps as one op. inner: buffers that nothing else reads; they become registers."""
    shape = next((s.shape for s in steps if s.shape is not None), (steps[0].numel,))
    device = steps[0].device
    results = _unique(s.out for s in steps if s.out.buffer not in inner)
    written = {access.buffer for access in results} | inner
    tensors = _unique(a for s in steps for a in s.inputs if a.buffer not in written)
    places = {access: index for index, access in enumerate((*results, *tensors))}
    by_buffer = {access.buffer: place for access, place in places.items() if access in results}
    last = {a.buffer: at for at, s in enumerate(steps) for a in (*s.inputs, s.out)}

    registers = _Registers()
    held: dict[Buffer, int] = {}
    memory = len(places)

    def place(access: Access) -> int:
        if access.buffer in held:
            return memory + held[access.buffer]
        return by_buffer[access.buffer] if access.buffer in by_buffer else places[access]

    code: list[int] = []
    numbers: list[Any] = []
    for at, step in enumerate(steps):
        number, compute = _C.graphs.pointwise(step.op.name, _stand_ins(step.op))
        read = [place(access) for access in step.inputs]
        ending = {a.buffer for a in step.inputs if a.buffer in inner and last[a.buffer] == at}
        if step.out.buffer in inner and step.out.buffer not in held:
            # A conversion reads ahead of what it writes.
            first = next(iter(ending), None) if step.op.name not in _BY_ROWS else None
            register = registers.take(step.out.dtype, held[first] if first else None)
            if first and register == held[first]:
                ending.discard(first)
            held[step.out.buffer] = register
        registers.free += [held[buffer] for buffer in ending]
        seen = step.out.dtype if compute is None else compute
        code += [number, _DTYPES.index(seen), place(step.out), len(read), *read]
        code.append(len(step.attributes))
        numbers += [_number(value) for value in step.attributes]
    program = [len(registers.dtypes), *map(_DTYPES.index, registers.dtypes), len(steps), *code]
    return make_op(
        NAME,
        (
            [_view(access, shape, device) for access in results],
            [_view(access, shape, device) for access in tensors],
            list(shape),
            program,
            numbers,
        ),
        [_view(access, shape, device) for access in results],
        steps[-1].op,
    )


def _unique(accesses: Any) -> list[Access]:
    return list(dict.fromkeys(accesses))


def _number(value: Any) -> Any:
    return int.from_bytes(value.encode(), "little") if isinstance(value, str) else value


def _stand_ins(op: Op) -> list[Any]:
    """Tensors that promote as the op's inputs do."""
    views = [arg for arg in op.args if isinstance(arg, View)]
    return [
        _C.graphs.tensor_on(
            vt.empty(8, dtype=vt.uint8),
            0,
            v.dtype,
            [1] * len(v.sizes),
            [1] * len(v.sizes),
            v.number,
        )
        for v in views
    ]


def _view(access: Access, shape: tuple[int, ...], device: str) -> View:
    if (access.is_single and math.prod(shape) != 1) or access.buffer.device != device:
        return View(access.buffer, access.dtype, (), (), access.offset, access.number)
    strides = _dense(shape) if access.strides is None else access.strides
    return View(access.buffer, access.dtype, shape, strides, access.offset, access.number)


def last_reads_and_first_writes(op: Op) -> tuple[dict[int, int], dict[int, int]]:
    """Of a fused op's operands in memory, results first: which of its parts reads it last, and which
    writes it first."""
    results, tensors, _, program, _ = op.args
    memory = len(results) + len(tensors)
    at = 1 + program[0]
    count, at = program[at], at + 1
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for part in range(count):
        out, inputs = program[at + 2], program[at + 3]
        for operand in program[at + 4 : at + 4 + inputs]:
            if operand < memory:
                reads[operand] = part
        if out < memory:
            writes.setdefault(out, part)
        at += 5 + inputs
    return reads, writes
