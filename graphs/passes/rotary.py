"""Turns the halves of rows, as rotary position embeddings do, in one op.

Pattern: `x * cos + cat([-b, a], -1) * sin`, where a and b are the halves of x along its last
dimension, and what autograd makes of it: `g * cos + cat([b, -a], -1)` of the halves of `g * sin`.
Rewrite: one chain (chains.py) over the halves of rows, which reads and writes memory once. Bitwise:
every part is rounded as by itself. On the CPU the ops stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import vibetensor.torch as vt
from vibetensor.graphs.pointwise import Access, Step, access_of, chains_problem, fuse
from vibetensor.graphs.rewrite import Edits, Uses, numel, with_buffers
from vibetensor.graphs.tape import Buffer, Op, Tape, View

BITWISE = True
ON_THE_CPU = False
LEAST_ELEMENTS = 1 << 14

_DTYPES = (vt.bfloat16, vt.float16, vt.float32, vt.float64)
_MOST_DIMS = 6


def run(tape: Tape) -> Tape:
    """The tape with rotary embeddings as one op each."""
    edits, uses = Edits(tape, "rotary"), Uses(tape)
    for at, op in enumerate(tape.ops):
        if op.name in ("add", "add_") and op.args[2] == 1:
            for straight, turned in (op.args[:2], op.args[1::-1]):
                if _forward(edits, uses, at, straight, turned):
                    break
                if _backward(edits, uses, at, straight, turned):
                    break
    return edits.applied()


def _forward(edits: Edits, uses: Uses, at: int, straight: View, turned: View) -> bool:
    first, second = _straight(uses, straight, at), _made_for(uses, turned, at, "mul")
    if first is None or second is None:
        return False
    ops = uses.tape.ops
    for joined, sin in (ops[second].args, ops[second].args[::-1]):
        cat = _made_for(uses, joined, second, "cat")
        if cat is None or not _joins_two(ops[cat]):
            continue
        minus, a = ops[cat].args[0]
        neg = _made_for(uses, minus, cat, "neg")
        if neg is None:
            continue
        for x, cos in (ops[first].args, ops[first].args[::-1]):
            if _halves(x) == (a, ops[neg].args[0]):
                return _rewrite(edits, at, uses, (x, cos, sin), (first, second, cat, neg), False)
    return False


def _backward(edits: Edits, uses: Uses, at: int, straight: View, turned: View) -> bool:
    first, cat = _straight(uses, straight, at), _made_for(uses, turned, at, "cat")
    if first is None or cat is None:
        return False
    ops = uses.tape.ops
    if not _joins_two(ops[cat]):
        return False
    b, minus = ops[cat].args[0]
    neg = _made_for(uses, minus, cat, "neg")
    if neg is None:
        return False
    a = ops[neg].args[0]
    writes = uses.writes(b.buffer)
    if b.buffer.role != "scratch" or len(writes) != 1 or ops[writes[0]].name != "mul":
        return False
    second = writes[0]
    product = ops[second].outputs[0]
    if _halves(product) != (a, b) or set(uses.reads(b.buffer)) != {neg, cat}:
        return False
    for g, cos in (ops[first].args, ops[first].args[::-1]):
        for other, sin in (ops[second].args, ops[second].args[::-1]):
            if g == other:
                return _rewrite(edits, at, uses, (g, cos, sin), (first, second, cat, neg), True)
    return False


def _straight(uses: Uses, view: View, at: int) -> int | None:
    """The product with the cosines, which the add may take the place of."""
    add = uses.tape.ops[at]
    if add.outputs[0] is None or add.outputs[0].buffer is not view.buffer:
        return _made_for(uses, view, at, "mul")
    made = uses.writer(view, at)
    if made is None or uses.tape.ops[made].name != "mul" or add.outputs[0] != view:
        return None
    if view.buffer.role != "scratch" or uses.touched_between(view.buffer, made, at):
        return None
    return made


def _made_for(uses: Uses, view: View, reader: int, name: str) -> int | None:
    """The op of that name which made a view for this reader and nobody else."""
    made = uses.writer(view, reader)
    if made is None or uses.tape.ops[made].name != name:
        return None
    return made if uses.only_reader(view.buffer) == reader else None


def _joins_two(cat: Op) -> bool:
    tensors, dim = cat.args
    return len(tensors) == 2 and dim in (-1, len(tensors[0].sizes) - 1)


def _halves(view: View) -> tuple[View, View] | None:
    """The halves of a view along its last dimension."""
    if not view.sizes or view.sizes[-1] % 2:
        return None
    half = view.sizes[-1] // 2
    sizes = (*view.sizes[:-1], half)
    return (
        View(view.buffer, view.dtype, sizes, view.strides, view.offset),
        View(view.buffer, view.dtype, sizes, view.strides, view.offset + half * view.strides[-1]),
    )


def _rewrite(
    edits: Edits,
    at: int,
    uses: Uses,
    inputs: tuple[View, View, View],
    parts: tuple[int, int, int, int],
    backward: bool,
) -> bool:
    """Puts one op in the place of the add. parts: the product with the cosines, that with the sines,
    the joining of halves and the negation."""
    op = uses.tape.ops[at]
    out = op.outputs[0]
    assert out is not None
    text = "the gradient of a rotary embedding" if backward else "a rotary embedding"
    why = _refused(edits, uses, at, out, inputs, parts)
    if why:
        edits.refused(f"{text} stays {len(parts) + 1} ops: {why}", op)
        return True
    edits.replace(at, _by_halves(uses, op, out, inputs, parts, backward), parts)
    edits.made(f"{text} in one op", op)
    return True


def _refused(
    edits: Edits,
    uses: Uses,
    at: int,
    out: View,
    inputs: tuple[View, View, View],
    parts: tuple[int, int, int, int],
) -> str:
    x, cos, sin = inputs
    if out.buffer.device == "cpu" and not ON_THE_CPU:
        return "on the CPU its parts run as chains"
    if out.sizes != x.sizes or any(v.sizes[-1:] != x.sizes[-1:] for v in (cos, sin)):
        return "cosines and sines are not as long as rows"
    if any(v.dtype != out.dtype for v in inputs) or out.dtype not in _DTYPES:
        return "their dtypes differ"
    if any(v.strides[-1] != 1 for v in (out, *inputs)) or x.sizes[-1] < 4:
        return "rows are not dense"
    if not numel(x) > 0 or len(x.sizes) > _MOST_DIMS or numel(x) < LEAST_ELEMENTS:
        return "it is small, or has many dimensions"
    if any(v.buffer.device != out.buffer.device or v.buffer is out.buffer for v in inputs):
        return "it is written where it is read"
    if any(uses.written_between(v.buffer, min(parts), at) for v in inputs):
        return "what it reads changes in between"
    if not all(map(edits.free, parts)):
        return "a part of it belongs to another op"
    return chains_problem(out.buffer.device) if out.buffer.device != "cpu" else ""


def _by_halves(
    uses: Uses,
    op: Op,
    out: View,
    inputs: tuple[View, View, View],
    parts: tuple[int, int, int, int],
    backward: bool,
) -> Op:
    """The chain whose operands are halves of rows."""
    straight, turned, _, negation = (uses.tape.ops[i] for i in parts)
    device, nbytes = out.buffer.device, out.buffer.nbytes
    # The second half of the result stands for memory of its own until the op is made.
    second = Buffer(-1, nbytes, device, "scratch")
    (x_a, x_b), (cos_a, cos_b), (sin_a, sin_b) = map(_halves_of, inputs)
    out_a, out_b = _halves_of(out)
    out_b = replace(out_b, buffer=second)
    count = numel(out_a)
    sizes = out_a.sizes
    inner: set[Buffer] = set()
    steps: list[Step] = []

    def access(view: View) -> Access:
        return access_of(view, sizes)

    def step(part: Op, target: View | None, *read: Access) -> Access:
        """One op on halves; without a target its result stays in registers."""
        if target is None:
            buffer = Buffer(-1, nbytes, device, "scratch")
            inner.add(buffer)
            made = Access(buffer, out.dtype, 0, None)
        else:
            made = access(target)
        attributes = [1] if part is op else []
        shape = tuple(n for n in sizes if n != 1)
        steps.append(Step(part, made, list(read), attributes, count, shape))
        return made

    def half(x: View, cos: View, other: View, sin: View, negative: bool, to: View) -> None:
        kept = step(straight, None, access(x), access(cos))
        value = access(other)
        if negative and not backward:
            value = step(negation, None, value)
        value = step(turned, None, value, access(sin))
        if negative and backward:
            value = step(negation, None, value)
        step(op, to, kept, value)

    # Backward the product comes first, and its halves change places.
    half(x_a, cos_a, x_b, sin_b if backward else sin_a, not backward, out_a)
    half(x_b, cos_b, x_a, sin_a if backward else sin_b, backward, out_b)
    return with_buffers(fuse(steps, inner), {second: out.buffer})


def _halves_of(view: View) -> tuple[View, View]:
    halves = _halves(view)
    assert halves is not None
    return halves
