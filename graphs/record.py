"""Running a function once while its ops are recorded."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.tape import PHASES, Buffer, Op, Source, Tape, View

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(vt.__file__))) + os.sep


@dataclass
class Recording:
    """A tape with the memory that it was recorded on.

    result: what the function returned. leaves: tensors whose .grad backward touched.
    """

    tape: Tape
    native: Any
    result: Any
    leaves: list[Any]
    first_slot: dict[int, int]  # buffer index -> a slot on it

    def buffer_of(self, tensor: Any) -> Buffer | None:
        """The tensor's buffer; None if the recorded ops never touched it."""
        index = self.native.find(tensor)
        return None if index < 0 else self.tape.buffers[index]

    @functools.cached_property
    def written(self) -> set[Buffer]:
        """The buffers that its ops write."""
        return {view.buffer for op in self.tape.ops if not op.is_view for view in op.writes()}

    def memory(self, buffer: Buffer) -> Any:
        """A tensor on the buffer's recorded memory."""
        return self.native.tensor(self.first_slot[buffer.index])


def record(
    function: Callable[[], Any],
    *,
    dry: bool = False,
    catch_up: Callable[[Any], None] | None = None,
    thorough: bool = True,
) -> Recording:
    """Runs `function` and records every op it runs on this thread.

    dry: the ops only pass and nothing is computed: tensors keep their values, results have none.
    catch_up: given, ops from the first of an accelerator on may be left to the caller, without memory
    for what they make (`native.puts_off`); it is called with the native tape where they are to run
    after all, as the function fails. thorough: as for `recording_of`.

    Raises what the function raises, and RuntimeError where the function goes on after an error of an
    op, as replays would not know of that; the recording then leaves nothing behind.
    """
    native = _C.graphs.Tape(PACKAGE, dry, catch_up is not None)
    # A cast that autocast has kept from before, or keeps for later, is neither input nor result.
    _C._clear_autocast_cache()
    native.start()
    try:
        result = function()
        _C._clear_autocast_cache()
    except BaseException:
        if catch_up is not None:
            catch_up(native)  # what the function did before is done
        raise
    finally:
        native.stop()
    try:
        return recording_of(native, result, thorough=thorough)
    except BaseException:
        if catch_up is not None:
            catch_up(native)
        raise


def recording_of(
    native: Any, result: Any, *, collect: bool = True, thorough: bool = True
) -> Recording:
    """What a native tape that has been stopped recorded. collect: False takes garbage in reference
    cycles for something that lives on. thorough: False does so with what Python's collector has put by
    among the old objects meanwhile."""
    if native.failure:
        raise RuntimeError(
            f"the function went on after an error, which replays would not know of: {native.failure}"
        )
    storages = native.storages()
    held = {native.find(tensor) for tensor in (*_tensors(result), *_gradients(native))}
    if collect and any(
        fresh and escapes and at not in held
        for at, (_, _, fresh, escapes, _) in enumerate(storages)
    ):
        # Some may be garbage in reference cycles, and no state. A whole collection takes up to 0.1 s.
        gc.collect(2 if thorough else 1)
        native.find_escapes()
        storages = native.storages()
    buffers = [
        Buffer(
            index,
            nbytes,
            str(device),
            "state" if not fresh else "output" if escapes else "scratch",
            fixed,
        )
        for index, (nbytes, device, fresh, escapes, fixed) in enumerate(storages)
    ]
    sources = [Source(*source) for source in native.sources()]
    views: list[View] = []
    first_slot: dict[int, int] = {}
    for number, (storage, offset, *geometry, is_number) in enumerate(native.slots()):
        sizes, strides, dtype = geometry
        views.append(View(buffers[storage], dtype, sizes, strides, offset, is_number))
        # An array that the function wraps is somebody else's: they may change it.
        buffers[storage].fixed &= is_number
        first_slot.setdefault(storage, number)
    ops = [_op(call, views, sources) for call in native.calls()]
    native.loosen_foreign()  # the ops hold their functions from now on
    draws = [(str(device), count) for device, count in native.draws()]
    return Recording(Tape(ops, buffers, draws), native, result, native.leaves(), first_slot)


def shared_memory(recording: Recording, copied: Iterable[tuple[Any, Any]] = ()) -> str:
    """Why replays would be wrong where a step changes memory that is two storages, as of one array
    that is wrapped twice: passes know buffers apart. Empty if they are. copied: arguments, each with
    the tensor that the step uses in its place."""
    spans = []
    for buffer in recording.tape.buffers:
        if buffer.role == "state" and buffer.nbytes and buffer.index in recording.first_slot:
            spans.append((*_span(recording.memory(buffer), buffer.nbytes), buffer))
    for tensor, copy in copied:
        nbytes = tensor.untyped_storage().nbytes()
        if recording.native.find(tensor) < 0 and nbytes:
            spans.append((*_span(tensor, nbytes), recording.buffer_of(copy)))
    spans.sort(key=lambda span: span[:3])
    over: set[Buffer | None] = set()
    last = None  # of those so far, the one that ends last
    for span in spans:
        device, start, end, buffer = span
        if last is not None and last[0] == device and start < last[2] and last[3] is not buffer:
            over |= {last[3], buffer}
        if last is None or last[0] != device or end > last[2]:
            last = span
    for op in recording.tape.ops if over else ():
        if not op.is_view and any(view.buffer in over for view in op.writes()):
            return (
                "it changes memory that two tensors wrap apart from each other, as from_numpy and "
                f"from_dlpack make them: {op}. Wrap it once, and take views"
            )
    return ""


def _span(tensor: Any, nbytes: int) -> tuple[str, int, int]:
    """Where the tensor's storage lies."""
    start = tensor.data_ptr() - tensor.storage_offset() * tensor.dtype.itemsize
    return str(tensor.device), start, start + nbytes


def _tensors(value: Any) -> Iterator[Any]:
    """The tensors in nested containers."""
    if isinstance(value, vt.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _gradients(native: Any) -> Iterator[Any]:
    return (leaf.grad for leaf in native.leaves() if leaf.grad is not None)


def _op(call: Any, views: list[View], sources: list[Source]) -> Op:
    inputs = [None if slot < 0 else views[slot] for slot in call.inputs]
    tensors = iter(inputs)
    args = with_views(call, tensors)
    return Op(
        call.name,
        args,
        inputs,
        [None if slot < 0 else views[slot] for slot in call.outputs],
        PHASES[call.phase],
        call.capture_class,
        sources[call.source] if call.source >= 0 else None,
        call,
        call.random_offset,
        call.is_view,
    )


def with_views(call: Any, tensors: Iterator[View | None]) -> tuple[Any, ...]:
    """A native call's arguments in the order of the schema, with these in place of its tensors."""
    return tuple(
        next(tensors) if kind == 1 else [next(tensors) for _ in range(arg)] if kind == 2 else arg
        for kind, arg in call.args
    )
