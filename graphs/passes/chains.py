"""Runs pointwise ops that follow one another as one op, `_fused_pointwise`.

Pattern: pointwise ops of one iteration shape and phase (casts, where and copies among them) of which
one reads what another writes, or both read one tensor; the ops between can run before or after them.
A buffer that one of them writes is read and written by them through one view. Rewrite: one op that
runs them block by block; what nothing else reads is never stored. Every part keeps its kernel and its
dtypes: bitwise.

Random ops stay apart: their numbers belong to places in their whole output. So do single ops and
ops on an accelerator. Ops of few elements stay apart where nothing is gained: tensors that stay in
the cache from op to op anyway, if they are not of 16-bit floats, which a chain converts less often.
"""

from __future__ import annotations

from dataclasses import dataclass

import vibetensor.torch as vt
from vibetensor.graphs.pointwise import Access, Step, fuse, step_of
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape

BITWISE = True
LEAST_ELEMENTS, LEAST_16_BIT = 1 << 20, 4096  # of an op that gains by it
_REACH = 24  # ops that a part may be moved over
_MOST_PARTS = 64
# Tensors that a chain walks in memory. They often lie alike within pages, so that more of them than a
# cache has ways drive each other out.
MOST_TENSORS = 5


@dataclass(eq=False)
class _Node:
    """An op, or several that will be one. why_not: what keeps a pointwise op out of chains."""

    ops: list[Op]
    steps: list[Step]  # of pointwise ops; empty for others
    reads: set[Buffer]
    writes: set[Buffer]
    why_not: str = ""

    def needs(self, other: _Node) -> bool:
        """Whether one of them changes what the other reads or writes."""
        return not (
            self.reads.isdisjoint(other.writes)
            and self.writes.isdisjoint(other.reads)
            and self.writes.isdisjoint(other.writes)
        )


def run(tape: Tape) -> Tape:
    """The tape with its chains of pointwise ops as one op each."""
    nodes: list[_Node] = []
    decisions: dict[str, Decision] = {}
    users: dict[Buffer, int] = {}  # ops that touch it
    for op in tape.ops:
        for buffer in {v.buffer for v in (*op.reads(), *op.writes()) if not op.is_view}:
            users[buffer] = users.get(buffer, 0) + 1
    for op in tape.ops:
        nodes.append(_node(op))
        at: int | None = len(nodes) - 1
        while at is not None:
            at = _join(nodes, at, users, decisions)
    ops: list[Op] = []
    for node in nodes:
        if len(node.steps) < 2:
            ops += node.ops
            continue
        inner = _inner(node.steps, users)
        fused = fuse(node.steps, inner)
        ops.append(fused)
        names = ", ".join(step.op.name for step in node.steps)
        text = f"{names} in one op; {len(inner)} results stay in registers"
        decisions[f"{len(ops)}"] = Decision("chains", True, text, fused)
    return tape.replaced(ops, decisions.values())


def _node(op: Op) -> _Node:
    if op.is_view:
        return _Node([op], [], set(), set())
    reads = {view.buffer for view in op.reads()}
    writes = {view.buffer for view in op.writes()}
    step = step_of(op)
    if isinstance(step, str):
        return _Node([op], [], reads, writes, step)
    halves = any(a.dtype in (vt.bfloat16, vt.float16) for a in (step.out, *step.inputs))
    if step.numel < (LEAST_16_BIT if halves else LEAST_ELEMENTS):
        return _Node([op], [], reads, writes)
    return _Node([op], [step], reads, writes)


def _inner(steps: list[Step], users: dict[Buffer, int]) -> set[Buffer]:
    """Buffers that nothing but these steps touches."""
    own: dict[Buffer, int] = {}
    for step in steps:
        for buffer in {step.out.buffer, *(access.buffer for access in step.inputs)}:
            own[buffer] = own.get(buffer, 0) + 1
    return {b for b, count in own.items() if b.role == "scratch" and count == users[b]}


def _join(
    nodes: list[_Node], at: int, users: dict[Buffer, int], decisions: dict[str, Decision]
) -> int | None:
    """Joins a node with one before it: where it is then, None if it fits none."""
    node = nodes[at]
    if not node.steps and not node.why_not:
        return None
    for index in _linked(nodes, at):
        other = nodes[index]
        why_not = other.why_not or node.why_not or _why_apart(other, node, users)
        if not why_not:
            place = _merge(nodes, index, at)
            if place is not None:
                return place
            why_not = "what runs between them needs one and is needed by the other"
        if not node.reads.isdisjoint(other.writes):
            text = f"{other.ops[-1].name} and {node.ops[0].name} stay apart: {why_not}"
            decisions.setdefault(text, Decision("chains", False, text, node.ops[0]))
    return None


def _linked(nodes: list[_Node], at: int) -> list[int]:
    """Nodes in reach that make what this one reads, nearest first, then those that read the same."""
    node = nodes[at]
    read = _tensors_read(node)
    makers, siblings, passed = [], [], 0
    for index in range(at - 1, -1, -1):
        other = nodes[index]
        if other.ops[0].is_view:
            continue
        if (other.steps or other.why_not) and other.ops[0].phase == node.ops[0].phase:
            if not node.reads.isdisjoint(other.writes):
                makers.append(index)
            elif node.steps and not read.isdisjoint(_tensors_read(other)):
                siblings.append(index)
        passed += 1
        if passed > _REACH:
            break
    return makers + siblings


def _tensors_read(node: _Node) -> set[Access]:
    return {a for step in node.steps for a in step.inputs if not a.is_single}


def _why_apart(a: _Node, b: _Node, users: dict[Buffer, int]) -> str:
    """Why two nodes cannot be one op, whatever runs between them; empty if they can."""
    steps = [*a.steps, *b.steps]
    if len({step.numel for step in steps}) > 1:
        return "their sizes differ"
    if len({step.shape for step in steps if step.shape is not None}) > 1:
        return "their shapes differ"
    if len(steps) > _MOST_PARTS:
        return "together they are too many"
    walked = {x for s in steps for x in (s.out, *s.inputs) if not x.is_single}
    inner = _inner(steps, users)
    if steps[0].numel > 1 and sum(x.buffer not in inner for x in walked) > MOST_TENSORS:
        return "together they walk too many tensors"
    written = a.writes | b.writes
    views: dict[Buffer, Access] = {}
    for step in steps:
        for access in (step.out, *step.inputs):
            if access.buffer in written and views.setdefault(access.buffer, access) != access:
                return "one reads another part of what the other writes"
    return ""


def _merge(nodes: list[_Node], first: int, second: int) -> int | None:
    """Makes one node of two, with what runs between them before or after it: its place, None where
    that cannot be."""
    a, b = nodes[first], nodes[second]
    before: list[_Node] = []
    after: list[_Node] = []
    for node in nodes[first + 1 : second]:
        late = node.needs(a) or any(node.needs(other) for other in after)
        (after if late else before).append(node)
    if any(b.needs(other) for other in after):
        return None
    merged = _Node([*a.ops, *b.ops], [*a.steps, *b.steps], a.reads | b.reads, a.writes | b.writes)
    nodes[first : second + 1] = [*before, merged, *after]
    return first + len(before)
