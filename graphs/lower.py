"""From a tape and a memory plan to a program: every op bound to its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.plan import Plan, plan
from vibetensor.graphs.record import Recording
from vibetensor.graphs.tape import Buffer, Tape, View


@dataclass
class Lowered:
    """A program and the memory it works on.

    memory: a tensor on the storage of each buffer outside the arena (state and outputs). plans: the
    arena's layout by device. outputs: of each op of the program.
    """

    program: Any
    outputs: list[list[Any]]
    memory: dict[Buffer, Any]
    plans: dict[str, Plan]


def lower(
    tape: Tape, recording: Recording, adopted: dict[Buffer, Any], *, arena: bool = True
) -> Lowered:
    """Plans the tape's memory and binds its ops to it.

    adopted: outputs that stay in the memory they were recorded in, with a tensor on it. arena:
    False gives every scratch buffer memory of its own.
    """
    memory: dict[Buffer, Any] = dict(adopted)
    plans: dict[str, Plan] = {}
    arenas: dict[str, Any] = {}
    for device in sorted({b.device for b in tape.buffers if arena and b.role == "scratch"}):
        plans[device] = plan(tape, device)
        arenas[device] = vt.empty(plans[device].nbytes, dtype=vt.uint8, device=device)

    def tensor(view: View | None) -> Any:
        if view is None:
            return None
        buffer = view.buffer
        place = 0
        if arena and buffer.role == "scratch" and buffer.nbytes:
            base, place = arenas[buffer.device], plans[buffer.device].offsets[buffer]
        else:
            base = memory.get(buffer)
            if base is None:
                base = memory[buffer] = _memory_of(buffer, recording)
        return _C.graphs.tensor_on(
            base,
            place + view.offset * view.dtype.itemsize,
            view.dtype,
            view.sizes,
            view.strides,
            view.number,
        )

    setup = _C.graphs.Program()
    for op in tape.setup:
        setup.add(op.call, [tensor(v) for v in op.inputs], [tensor(v) for v in op.outputs])
    setup.run()
    program = _C.graphs.Program()
    outputs = []
    for op in tape.ops:
        if not op.is_view:
            outputs.append([tensor(v) for v in op.outputs])
            program.add(op.call, [tensor(v) for v in op.inputs], outputs[-1])
    # What only led to other constants is done with.
    read = {view.buffer for op in tape.ops if not op.is_view for view in op.reads()}
    for buffer in [b for b in memory if b.role == "constant" and b not in read]:
        del memory[buffer]
    for device, counters in tape.draws:
        program.draw(device, counters)
    return Lowered(program, outputs, memory, plans)


def _memory_of(buffer: Buffer, recording: Recording) -> Any:
    """The start of a buffer's own memory: state stays where it is, an output gets its own."""
    if buffer.role == "state":
        return recording.memory(buffer)
    return vt.empty(buffer.nbytes, dtype=vt.uint8, device=buffer.device)
