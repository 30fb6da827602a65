"""Runs pointwise ops that follow one another as one op, `_fused_pointwise`.

Pattern: pointwise ops of one iteration shape and phase (casts, where and copies among them) of which
one reads what another writes, or both read one tensor; the ops between can run before or after them.
A buffer that one of them writes is read and written by them through one view. Rewrite: one op that
runs them block by block; what nothing else reads is never stored. Every part keeps its kernel and its
dtypes: bitwise.

On a GPU the op is a kernel made for the chain, whose parts round as their own kernels do: bitwise,
too; a single op that computes much becomes one as well. There a chain also computes again what
another one made from tensors that it reads anyway, as the backward of a gated layer does with the
gate's activation: a read and mostly a write less.

Random ops stay apart: their numbers belong to places in their whole output. So do single ops. Ops of
few elements stay apart where nothing is gained: on the CPU tensors that stay in the cache from op to
op anyway, if they are not of 16-bit floats, which a chain converts less often; on a GPU those whose
launch saved would not pay for a kernel compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import vibetensor.torch as vt
from vibetensor.graphs.pointwise import Access, Step, fuse, step_of
from vibetensor.graphs.tape import Buffer, Decision, Op, Tape

BITWISE = True
LEAST_ELEMENTS, LEAST_16_BIT = 1 << 20, 4096  # of an op that gains by it
_REACH = 24  # ops that a part may be moved over
LEAST_ON_GPU = 1 << 14
_MOST_PARTS = 64
# A GPU's kernel takes 12 tensors and 32 numbers, which a part has two of at most.
_MOST_PARTS_ON_GPU, _MOST_TENSORS_ON_GPU = 16, 12
_COSTLY = ("gelu", "gelu_backward", "mish", "silu", "silu_backward")
_MOST_AGAIN = 4  # parts computed again for one tensor
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
    again = _compute_again(nodes, tape, users, decisions)
    ops: list[Op] = []
    for node in again:
        if len(node.steps) < 2 and not _gains_alone(node.steps):
            ops += node.ops
            continue
        inner = _inner(node.steps, users)
        fused = fuse(node.steps, inner)
        ops.append(fused)
        names = ", ".join(step.op.name for step in node.steps)
        text = f"{names} in one op; {len(inner)} results stay in registers"
        if len(node.steps) == 1:
            text = f"{names} as a kernel of its own"
        decisions[f"{len(ops)}"] = Decision("chains", True, text, fused)
    return tape.replaced(ops, decisions.values())


def _gains_alone(steps: list[Step]) -> bool:
    """Whether a single op runs faster as a chain: on a GPU, where it computes much, or reads tensors
    of several dtypes, which the library's own kernels take element by element."""
    if not steps or steps[0].device == "cpu" or steps[0].numel < LEAST_ON_GPU:
        return False
    name = steps[0].op.name.removesuffix("_")
    dtypes = {a.dtype for a in (*steps[0].inputs, steps[0].out) if not a.is_single}
    return name in _COSTLY or (name in ("add", "sub", "mul", "div") and len(dtypes) > 1)


def _node(op: Op) -> _Node:
    if op.is_view:
        return _Node([op], [], set(), set())
    reads = {view.buffer for view in op.reads()}
    writes = {view.buffer for view in op.writes()}
    step = step_of(op)
    if isinstance(step, str):
        return _Node([op], [], reads, writes, step)
    if step.device != "cpu":
        return _Node([op], [step] if step.numel >= LEAST_ON_GPU else [], reads, writes)
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


def _compute_again(
    nodes: list[_Node], tape: Tape, users: dict[Buffer, int], decisions: dict[str, Decision]
) -> list[_Node]:
    """The nodes, those on a GPU with steps of others in the place of tensors that they read and can
    make from what else they read. What nobody reads any more is gone."""
    writers: dict[Buffer, list[int]] = {}
    for at, node in enumerate(nodes):
        for buffer in node.writes:
            writers.setdefault(buffer, []).append(at)
    for at, node in enumerate(nodes):
        if not node.steps or node.steps[0].device == "cpu":
            continue
        for read in sorted(_tensors_read(node), key=lambda access: access.buffer.index):
            made_at = writers.get(read.buffer, [])
            if read.buffer.role != "scratch" or len(made_at) != 1 or not made_at[0] < at:
                continue
            maker = nodes[made_at[0]]
            seen = {a for step in node.steps for a in step.inputs} - {read}
            if any(a.buffer is read.buffer for a in seen):
                continue  # other elements of it are read too, as where rows are repeated
            steps = _steps_for(read, maker, seen)
            if not steps or len(node.steps) + len(steps) > _MOST_PARTS_ON_GPU:
                continue
            if not _has_inputs(node, steps, seen, maker, (made_at[0], at), writers):
                continue
            _insert(node, steps, read, tape, users)
            names = ", ".join(step.op.name for step in steps)
            text = f"{names} computed again instead of kept"
            decisions[f"{text} {at}"] = Decision("chains", True, text, node.ops[0])
    for node in reversed(nodes):  # readers first: what only they needed goes with them
        if node.steps and node.steps[0].device != "cpu":
            for step in reversed(node.steps):
                _drop_unread(node, step, users)
    return [node for node in nodes if node.steps or node.ops]


def _steps_for(read: Access, maker: _Node, seen: set[Access]) -> list[Step]:
    """The steps of a node that make a tensor from what is seen, in order; none if it is made
    otherwise."""
    wanted, steps = {read.buffer}, []
    for step in reversed(maker.steps):
        if step.out.buffer not in wanted:
            continue
        if step.out.buffer is read.buffer and (step.out != read or steps):
            return []
        if any(a.buffer is step.out.buffer for a in step.inputs):
            return []
        steps.insert(0, step)
        wanted |= {a.buffer for a in step.inputs if a not in seen}
    made = [step.out.buffer for step in steps]
    return steps if len(set(made)) == len(made) <= _MOST_AGAIN else []


def _has_inputs(
    node: _Node,
    steps: list[Step],
    seen: set[Access],
    maker: _Node,
    places: tuple[int, int],
    writers: dict[Buffer, list[int]],
) -> bool:
    """Whether a node reads all tensors that the steps begin from, with the values they had. places:
    of the node that makes them and of this one."""
    both = (*steps, *node.steps)
    if len({s.numel for s in both}) > 1 or len({s.fastest for s in both}) > 1:
        return False
    if len({s.shape for s in both if s.shape is not None}) > 1:
        return False
    made = {step.out.buffer for step in steps}
    for step in steps:
        for access in step.inputs:
            if access.buffer in made:
                continue
            if access not in seen and not access.number:
                return False
            if any(places[0] < writer <= places[1] for writer in writers.get(access.buffer, [])):
                return False
            # What the maker itself writes it must have written before.
            at = maker.steps.index(step)
            if any(other.out.buffer is access.buffer for other in maker.steps[at:]):
                return False
    return True


def _insert(
    node: _Node, steps: list[Step], read: Access, tape: Tape, users: dict[Buffer, int]
) -> None:
    """Lets a node make a tensor by these steps, in registers, instead of reading it."""
    instead = {
        step.out.buffer: tape.new_buffer(step.out.buffer.nbytes, step.out.buffer.device)
        for step in steps
    }

    def moved(access: Access) -> Access:
        buffer = instead.get(access.buffer)
        return access if buffer is None else replace(access, buffer=buffer)

    copies = [
        replace(step, out=moved(step.out), inputs=[moved(a) for a in step.inputs]) for step in steps
    ]
    only = {read.buffer: instead[read.buffer]}
    rest = []
    for step in node.steps:
        inputs = [replace(a, buffer=only.get(a.buffer, a.buffer)) for a in step.inputs]
        users[read.buffer] -= any(a.buffer is read.buffer for a in step.inputs)
        rest.append(replace(step, inputs=inputs))
    node.steps = [*copies, *rest]
    node.reads = node.reads - {read.buffer}
    for step in copies:
        for buffer in {step.out.buffer, *(a.buffer for a in step.inputs)}:
            users[buffer] = users.get(buffer, 0) + 1
    users[instead[read.buffer]] += sum(
        any(a.buffer is instead[read.buffer] for a in step.inputs) for step in rest
    )


def _drop_unread(node: _Node, step: Step, users: dict[Buffer, int]) -> None:
    """Takes a step out of its node if nobody else uses the memory that it writes."""
    out = step.out.buffer
    if out.role != "scratch" or users.get(out) != 1 or any(a.buffer is out for a in step.inputs):
        return
    node.steps = [s for s in node.steps if s is not step]
    node.ops = [op for op in node.ops if op is not step.op]
    for access in {a.buffer for a in step.inputs}:
        users[access] -= 1


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
    if len({step.device for step in steps}) > 1:
        return "they are on two devices"
    on_gpu = steps[0].device != "cpu"
    if len(steps) > (_MOST_PARTS_ON_GPU if on_gpu else _MOST_PARTS):
        return "together they are too many"
    if on_gpu and len({step.fastest for step in steps}) > 1:
        return "they walk their results in other orders"
    walked = {x for s in steps for x in (s.out, *s.inputs) if not x.is_single}
    inner = _inner(steps, users)
    if on_gpu:
        # Single elements as well, those of the host too: only numbers of the program are arguments.
        walked.update(x for s in steps for x in s.inputs if not x.number)
    most = _MOST_TENSORS_ON_GPU if on_gpu else MOST_TENSORS
    if steps[0].numel > 1 and sum(x.buffer not in inner for x in walked) > most:
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
