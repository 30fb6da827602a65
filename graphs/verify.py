"""Whether a replay does what the function does, from the same state.

With `capture(..., verify=True)` the first call that could replay runs the function as well, both
from one snapshot of all state, and compares what they leave. The ops' arguments are compared with
those of the recording: a number that Python computes, and that has changed since, is frozen there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.lower import lower
from vibetensor.graphs.record import Recording
from vibetensor.graphs.session import set_modes
from vibetensor.graphs.tape import Buffer, Op, Tape, View

# Larger tensors made on the host are data, and data is what changes.
_CONSTANT_BYTES = 4096
# A tape's bound is that of one op's result; how many times it a step's results, made of it, may differ.
OF_A_STEP = 8
# What cancels leaves roundings of what it was made of, a bias's gradient before a batch norm say: a
# tensor may differ by so many of the largest element among those of its kind, and by this part of
# the bound, as two bytes have few digits.
_ROUNDINGS = 32
_PART_OF_THE_BOUND = 1 / 32


class CaptureMismatch(RuntimeError):
    """A replay that differs from the function, with the first op that does."""


def frozen_numbers(
    before: Recording, now: Recording, read_before: list[Any], read_now: list[Any]
) -> list[str]:
    """Where two recordings of one function differ in what a replay does not read anew.

    read_before, read_now: the buffers of learning rates, which it does.
    """
    first, second = before.tape.ops, now.tape.ops
    if len(first) != len(second):
        return [f"the function ran {len(first)} ops when it was recorded, and now {len(second)}"]
    read = {*read_before, *read_now}
    written = {view.buffer for op in (*first, *second) if not op.is_view for view in op.writes()}
    found = []
    for a, b in zip(first, second):
        if a.name != b.name:
            return [f"{a.name} ({a.source}) has become {b.name} ({b.source})"]
        for index, (x, y) in enumerate(zip(a.args, b.args)):
            if not _same_argument(x, y):
                found.append(f"argument {index} of {a.name} was {x!r} and is {y!r} ({b.source})")
        for x, y in zip(a.reads(), b.reads()):
            if x.buffer in read or x.buffer in written or y.buffer in written:
                continue
            if (change := _changed_constant(before, now, x, y)) is not None:
                found.append(f"a number in {a.name} {change} ({b.source})")
    return found


def _changed_constant(before: Recording, now: Recording, x: View, y: View) -> str | None:
    """How a tensor that Python made anew has changed; None for one that is the same memory."""
    if x.buffer.role != "state" or y.buffer.role != "state" or x.buffer.nbytes > _CONSTANT_BYTES:
        return None
    old, new = before.memory(x.buffer), now.memory(y.buffer)
    if old.data_ptr() == new.data_ptr() or same_bits(old, new):
        return None
    if old.numel() == new.numel() == 1:
        return f"was {old.item()!r} and is {new.item()!r}"
    return f"was {old.tolist()!r:.80} and is {new.tolist()!r:.80}"


def _same_argument(x: Any, y: Any) -> bool:
    if isinstance(x, View) and isinstance(y, View):
        return (x.dtype, x.sizes, x.strides, x.offset) == (y.dtype, y.sizes, y.strides, y.offset)
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_same_argument, x, y))
    return type(x) is type(y) and (x == y or x != x)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors of one geometry hold the same values; any NaN is the same as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = a == b
    if a.is_floating_point():
        equal = equal | ((a != a) & (b != b))
    return bool(equal.all())


def agree(a: Any, b: Any, bound: float, among: float = 0.0) -> bool:
    """Whether two tensors are the same within `bound`, relative to the largest element; bit for bit
    for a bound of 0 and where the values are no floats. among: the largest element of tensors of
    their kind, some roundings of which they may differ by in any case."""
    if same_bits(a, b):
        return True
    if bound == 0 or not a.is_floating_point() or a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.double(), b.double()
    finite = vt.isfinite(y)
    if not bool(((x == y) | finite | ((x != x) & (y != y))).all()):
        return False
    away = vt.where(finite, x - y, vt.zeros_like(y)).abs().max().item()
    least = min(_ROUNDINGS * vt.finfo(a.dtype).eps, _PART_OF_THE_BOUND * bound)
    return away <= max(bound * _largest(b), least * among)


def _largest(tensor: Any) -> float:
    """The largest finite element."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    values = tensor.detach().double().abs()
    return vt.where(vt.isfinite(values), values, vt.zeros_like(values)).max().item()


class Largest:
    """The largest elements of tensors, by their kind: results, gradients or weights, say."""

    def __init__(self, tensors: Iterable[tuple[Any, Any]]) -> None:
        """Of pairs of a kind and a tensor."""
        self._found: dict[Any, float] = {}
        for kind, tensor in tensors:
            key = (kind, tensor.dtype)
            self._found[key] = max(self._found.get(key, 0.0), _largest(tensor))

    def of(self, kind: Any, tensor: Any) -> float:
        """Among the tensors of this kind and of the dtype of this one."""
        return self._found.get((kind, tensor.dtype), 0.0)


def all_agree(found: list[Any], expected: list[Any], kinds: list[Any], bound: float) -> bool:
    """Whether all of a step's tensors do, each with its kind."""
    if all(map(same_bits, found, expected)):
        return True
    largest = Largest(zip(kinds, expected))
    return all(agree(x, y, bound, largest.of(k, y)) for x, y, k in zip(found, expected, kinds))


class RandomNumbers:
    """Where the default generators are: the CPU's, and those of the tape's other devices."""

    def __init__(self, tape: Tape) -> None:
        devices = {"cpu", *(device for device, _ in tape.draws)}
        generators = [_C._default_generator(vt.device(device)) for device in sorted(devices)]
        self._states = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """All of them back to there."""
        for generator, state in self._states:
            generator.set_state(state)

    def here(self) -> bool:
        """Whether all of them are there now."""
        return all(same_bits(generator.get_state(), state) for generator, state in self._states)


class Modes:
    """Whether modules train, as it is now."""

    def __init__(self, modules: Iterable[Any]) -> None:
        self._kept = [(module, module.training) for module in modules]

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Puts them back meanwhile."""
        now = [(module, module.training) for module, _ in self._kept]
        set_modes(self._kept)
        try:
            yield
        finally:
            set_modes(now)


class Snapshot:
    """The values of tensors, and where random numbers are, to go back to."""

    def __init__(self, tensors: list[Any], tape: Tape) -> None:
        self._kept = [(t, t.detach().clone()) for t in tensors]
        self._random = RandomNumbers(tape)

    def restore(self) -> None:
        """Everything as it was."""
        with vt.no_grad():
            for tensor, value in self._kept:
                tensor.copy_(value)
        self._random.restore()


def state_tensors(recording: Recording) -> dict[Buffer, Any]:
    """All of each buffer that lives before and after the step, in the dtype that the ops see there;
    in bytes where they see several."""
    seen: dict[Buffer, set[Any]] = {}
    for op in recording.tape.ops:
        for view in (*op.reads(), *op.writes()):
            seen.setdefault(view.buffer, set()).add(view.dtype)
    found = {}
    for buffer in recording.tape.buffers:
        if buffer.role == "state" and buffer.nbytes:
            dtypes = seen.get(buffer, set())
            dtype = dtypes.pop() if len(dtypes) == 1 else vt.uint8
            if buffer.nbytes % dtype.itemsize:
                dtype = vt.uint8
            size = buffer.nbytes // dtype.itemsize
            memory = recording.memory(buffer)
            found[buffer] = _C.graphs.tensor_on(memory, 0, dtype, [size], [1])
    return found


def names_of_state(recording: Recording, optimizers: Iterable[Any]) -> dict[Buffer, str]:
    """What optimizers call the state that lies there; weights and what modules keep have no name."""
    found: dict[Buffer, str] = {}
    for optimizer in optimizers:
        for values in optimizer.state.values():
            for key, value in values.items() if isinstance(values, dict) else ():
                buffer = recording.buffer_of(value) if isinstance(value, vt.Tensor) else None
                if buffer is not None:
                    found[buffer] = str(key)
    return found


def first_difference(recording: Recording, optimized: Tape, snapshot: Snapshot) -> str:
    """The first op whose result in the optimised tape is not the recorded one's.

    Runs both from the snapshot, the recorded one with each buffer in memory of its own.
    """
    expected: dict[int, list[Any]] = {}
    snapshot.restore()
    plain = lower(recording.tape, recording, {}, arena=False, one_by_one=True)
    plain.program.reserve()
    for index, op in enumerate(_running(recording.tape)):
        plain.program.run_op(index)
        expected[id(op.call)] = [t.clone() for t in plain.outputs[index] if t is not None]
    snapshot.restore()
    packed = lower(optimized, recording, {}, one_by_one=True)
    packed.program.reserve()
    phases = {id(op.call): op.phase for op in recording.tape.ops}
    largest = Largest((phases[call], t) for call, made in expected.items() for t in made)
    small = ""  # the first that differs by roundings of larger ones
    for index, op in enumerate(_running(optimized)):
        packed.program.run_op(index)
        results = [t for t in packed.outputs[index] if t is not None]
        for view, mine, other in zip(op.writes(), results, expected.get(id(op.call), ())):
            if agree(mine, other, optimized.bound):
                continue
            what = f"the first to differ is {view} of: {op}"
            if not agree(mine, other, optimized.bound, largest.of(op.phase, other)):
                return what
            small = small or what
    return small or "no op by itself differs: a result is overwritten, or read from the wrong place"


def _running(tape: Tape) -> list[Op]:
    return [op for op in tape.ops if not op.is_view]
