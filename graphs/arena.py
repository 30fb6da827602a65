"""A memory plan over the ops of a tape, for readers: who lies where, from which op to which."""

from __future__ import annotations

from dataclasses import dataclass

from vibetensor.graphs.plan import Plan, aligned
from vibetensor.graphs.tape import Buffer, Tape


@dataclass(frozen=True)
class Block:
    """A buffer in the arena, live from op `first` to op `last`, both included.

    in_place_of: the buffer whose place it took over."""

    buffer: Buffer
    first: int
    last: int
    offset: int
    in_place_of: Buffer | None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.nbytes


def blocks(tape: Tape, plan: Plan) -> list[Block]:
    """The buffers of a plan in the order of their first op."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for at, op in enumerate(tape.ops):
        for view in () if op.is_view else (*op.reads(), *op.writes()):
            if view.buffer in plan.offsets:
                first.setdefault(view.buffer, at)
                last[view.buffer] = at
    return [
        Block(buffer, at, last[buffer], plan.offsets[buffer], plan.shared.get(buffer))
        for buffer, at in first.items()
    ]


def live_bytes(tape: Tape, plan: Plan) -> list[int]:
    """Bytes that are taken at each op, as the plan counts them: rounded up to its alignment, and once
    for buffers that share a place."""
    change = [0] * (len(tape.ops) + 1)
    places: dict[Buffer, list[int]] = {}
    for block in blocks(tape, plan):
        root = block.buffer
        while root in plan.shared:
            root = plan.shared[root]
        span = places.setdefault(root, [block.first, block.last])
        span[0], span[1] = min(span[0], block.first), max(span[1], block.last)
    for root, (start, end) in places.items():
        change[start] += aligned(root.nbytes)
        change[end + 1] -= aligned(root.nbytes)
    total, levels = 0, []
    for step in change[:-1]:
        total += step
        levels.append(total)
    return levels


def live_at(found: list[Block], at: int) -> list[Block]:
    """Which of the blocks hold something at an op; of two in one place, the one that took it."""
    live = [block for block in found if block.first <= at <= block.last]
    gone = {block.in_place_of for block in live}
    return [block for block in live if block.buffer not in gone]
