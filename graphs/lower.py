"""From a tape and a memory plan to a program: every op bound to its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import collector
from vibetensor.graphs.foreign import NAME as FOREIGN
from vibetensor.graphs.plan import Plan, plan
from vibetensor.graphs.record import Recording
from vibetensor.graphs.tape import Buffer, Op, Tape, View


@dataclass
class Lowered:
    """A program and the memory it works on.

    memory: a tensor on the storage of each buffer outside the arena (state and outputs). plans: the
    arena's layout by device. outputs: of each op of the program. device: the one whose graph the
    program's ops are in; None if they run one by one. fetched: for each input the number of the copy
    into it that a run makes by itself, or -1. sent: the same for results, by buffer. foreign: the
    functions that its foreign ops call.
    """

    program: Any
    device: str | None
    outputs: list[list[Any]]
    memory: dict[Buffer, Any]
    plans: dict[str, Plan]
    fetched: list[int]
    sent: dict[Buffer, int]
    foreign: list[Any]


@collector.paused()
def lower(
    tape: Tape,
    recording: Recording,
    adopted: dict[Buffer, Any],
    *,
    recorded: Collection[Buffer] = (),
    pool_of: Callable[[str], Any] | None = None,
    arena: bool = True,
    one_by_one: bool = False,
    inputs: Sequence[Any] = (),
    results: Iterable[Buffer] = (),
) -> Lowered:
    """Plans the tape's memory and binds its ops to it.

    adopted: outputs that stay in the memory they were recorded in, with a tensor on it. recorded: the
    same for outputs whose memory may not be there yet: it is asked for after the arena's. pool_of:
    gives the pool by device where the ops of an accelerator become a graph; without it the graph
    has a pool of its own. arena: False gives every scratch buffer memory of its own. one_by_one:
    ops of an accelerator run by themselves, as those of the CPU do. inputs, results: tensors (or
    None) that are written before each run, and buffers that are copied after it; the graph of an
    accelerator can do both.

    Raises RuntimeError for an op that the device's graph cannot have; the op is named.
    """
    memory: dict[Buffer, Any] = dict(adopted)
    plans: dict[str, Plan] = {}
    arenas: dict[str, Any] = {}
    accelerator = None if one_by_one else _accelerator(tape)
    pool = None
    if accelerator is not None:
        pool = pool_of(accelerator) if pool_of else _C.graphs.Pool(accelerator)
    for device in sorted({b.device for b in tape.buffers if arena and b.role == "scratch"}):
        plans[device] = plan(tape, device)
        nbytes = plans[device].nbytes
        shared = pool is not None and device == accelerator
        arenas[device] = (
            pool.arena(nbytes) if shared else vt.empty(nbytes, dtype=vt.uint8, device=device)
        )

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
                there = buffer.role == "state" or buffer in recorded
                base = memory[buffer] = recording.memory(buffer) if there else _new_memory(buffer)
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
    staged = _HostInputs(program, recording, accelerator, tensor)
    outputs = []
    for op in tape.ops:
        if not op.is_view:
            outputs.append([tensor(v) for v in op.outputs])
            program.add(op.call, staged.inputs(op), outputs[-1])
    for buffer in recorded:  # those too that no op writes
        memory.setdefault(buffer, recording.memory(buffer))
    # What only led to other constants is done with.
    read = {view.buffer for op in tape.ops if not op.is_view for view in op.reads()}
    for buffer in [b for b in memory if b.role == "constant" and b not in read]:
        del memory[buffer]
    for device, counters in tape.draws:
        program.draw(device, counters)
    own = accelerator or ""
    fetched = [program.copy_in(x) if _is_block(x, own) else -1 for x in inputs]
    sent = {b: program.copy_out(memory[b]) for b in results if b.device == own and b.nbytes}
    if pool is not None:
        _hand_over(program, pool, tape)
    foreign = [op.args[2] for op in tape.ops if op.name == FOREIGN]
    return Lowered(program, accelerator, outputs, memory, plans, fetched, sent, foreign)


def _hand_over(program: Any, pool: Any, tape: Tape) -> None:
    try:
        program.lower(pool)
    except RuntimeError as error:
        if program.failed_op < 0:
            raise
        op = [op for op in tape.ops if not op.is_view][program.failed_op]
        raise type(error)(f"{error}\n  recorded as: {op}") from None


def _is_block(tensor: Any, device: str) -> bool:
    """Whether a tensor is all bytes of its storage, on that device."""
    if tensor is None or str(tensor.device) != device:
        return False
    nbytes = tensor.numel() * tensor.dtype.itemsize
    return nbytes > 0 and tensor.untyped_storage().nbytes() == nbytes


def _accelerator(tape: Tape) -> str | None:
    """The device that is not the CPU; a tape has at most one."""
    for op in tape.ops:
        for view in op.writes():
            if not op.is_view and view.buffer.device != "cpu":
                return view.buffer.device
    return None


class _HostInputs:
    """What ops of an accelerator read from host memory.

    A number that the function made is part of the kernel call, as in eager. Other constants are
    copied to the device once. Everything else may change between runs (learning rates), or within
    one by ops of the host (step counts), and is uploaded with each.
    """

    def __init__(
        self,
        program: Any,
        recording: Recording,
        accelerator: str | None,
        tensor: Callable[[View | None], Any],
    ) -> None:
        self._program = program
        self._accelerator = accelerator
        self._tensor = tensor
        buffers = recording.tape.buffers
        self._constants = {buffers[i] for i in recording.native.constants()}
        self._known: dict[View, Any] = {}  # constants on the device, and uploads still valid

    def inputs(self, op: Op) -> list[Any]:
        """The op's tensors, those of the host replaced for an op of the accelerator."""
        if self._accelerator is None or _device(op) != self._accelerator:
            for view in op.writes():
                # What an op of the host changes is uploaded anew for those that read it later.
                for known in [k for k in self._known if k.buffer is view.buffer]:
                    del self._known[known]
            return [self._tensor(v) for v in op.inputs]
        return [
            self._tensor(v) if v is None or v.buffer.device != "cpu" else self._on_device(op, v)
            for v in op.inputs
        ]

    def _on_device(self, op: Op, view: View) -> Any:
        constant = view.buffer in self._constants or view.buffer.role == "constant"
        if constant and not view.sizes and op.name != "copy_":
            return self._tensor(view)
        found = self._known.get(view)
        if found is None:
            host = self._tensor(view)
            if constant:
                found = host.to(self._accelerator)
            else:
                found = self._program.upload(host, self._accelerator)
            self._known[view] = found
        return found


def _device(op: Op) -> str:
    return next((view.buffer.device for view in op.writes()), "cpu")


def _new_memory(buffer: Buffer) -> Any:
    """Memory of its own for an output."""
    return vt.empty(buffer.nbytes, dtype=vt.uint8, device=buffer.device)
