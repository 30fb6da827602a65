"""Converts many tensors in one op.

Pattern: `_to_dtype` between floating dtypes of weights, which a step under autocast converts one by
one before it uses them, or of gradients, which it converts as they are made. Rewrite: casts of what
lived before the step are made by one op at the first of them; of the others, those whose results
nobody needs before the last are made there; of what is then left, those whose sources are ready at
the first. And a cast to a wider float that is only added to something in place falls away: the sum
reads the narrow one. Bitwise.

On CUDA only, where an op is a launch: on the CPU a cast belongs beside what reads it. Results that
come early, and sources that live on, take memory: weights' copies are needed until backward anyway,
and gradients wait while activations have gone.
"""

from __future__ import annotations

from collections.abc import Callable

from vibetensor.graphs.rewrite import Edits, Uses, is_dense, make_op
from vibetensor.graphs.tape import Op, Tape

BITWISE = True
DEVICES = ("cuda",)  # where it rewrites


def run(tape: Tape) -> Tape:
    """The tape with its casts in groups."""
    tape = _read_narrow(tape)
    given = [at for at in _casts(tape) if tape.ops[at].args[0].buffer.role == "state"]
    tape = _grouped(tape, given, Uses(tape).can_run_at)
    tape = _grouped(tape, _casts(tape)[::-1], Uses(tape).can_wait)
    return _grouped(tape, _casts(tape), Uses(tape).can_run_at, tells=True)


def _read_narrow(tape: Tape) -> Tape:
    """Leaves out casts that only an `add_` reads, as gradients of 16 bits that are accumulated."""
    uses, ops, edits = Uses(tape), tape.ops, Edits(tape, "joined_casts")
    for at in _casts(tape):
        source, wide = ops[at].args[0], ops[at].outputs[0]
        reader = uses.only_reader(wide.buffer)
        if reader is None or ops[reader].name != "add_" or source.dtype.itemsize > 2:
            continue
        target, added, alpha = ops[reader].args
        why_not = ""
        if added != wide or source.sizes != wide.sizes:
            why_not = "only a part is added"
        elif target.dtype != wide.dtype:
            why_not = "the sum is of another dtype"
        elif source.buffer is target.buffer or uses.written_between(source.buffer, at, reader):
            why_not = "its source changes before"
        if why_not:
            edits.refused(f"_to_dtype before add_ stays: {why_not}", ops[at])
            continue
        made = make_op("add_", (target, source), [target], ops[reader], alpha=alpha)
        edits.replace(reader, made, {at})
        edits.made("_to_dtype + add_ as one op", ops[reader])
    return edits.applied()


def _grouped(
    tape: Tape, casts: list[int], may: Callable[[int, int], bool], *, tells: bool = False
) -> Tape:
    """Joins casts with the first of the list where each of them may run there. tells: notes those
    that stay by themselves."""
    ops, edits = tape.ops, Edits(tape, "joined_casts")
    several = len(casts) > 1 or any(op.name == "_convert_all_" for op in ops)
    while casts:
        place, rest = casts[0], []
        group = [place]
        read, written = {ops[place].args[0].buffer}, {ops[place].outputs[0].buffer}
        for at in casts[1:]:
            source, target = ops[at].args[0].buffer, ops[at].outputs[0].buffer
            apart = source not in written and target not in written and target not in read
            if apart and source.device == ops[place].args[0].buffer.device and may(at, place):
                group.append(at)
                read.add(source)
                written.add(target)
            else:
                rest.append(at)
        casts = rest
        if len(group) > 1:
            targets = [ops[at].outputs[0] for at in group]
            sources = [ops[at].args[0] for at in group]
            made = make_op("_convert_all_", (targets, sources), targets, ops[place])
            edits.replace(place, made, set(group) - {place})
            edits.made(f"{len(group)} casts as one op", ops[place])
        elif tells and several:
            text = "_to_dtype stays by itself: other casts cannot run where it does"
            edits.refused(text, ops[place])
    return edits.applied()


def _casts(tape: Tape) -> list[int]:
    return [at for at, op in enumerate(tape.ops) if _is_plain(op)]


def _is_plain(op: Op) -> bool:
    if op.name != "_to_dtype":
        return False
    source, target = op.args[0], op.outputs[0]
    return (
        target.buffer.device.split(":")[0] in DEVICES
        and source.dtype.is_floating_point
        and target.dtype.is_floating_point
        and min(source.dtype.itemsize, target.dtype.itemsize) > 1  # not of 8-bit floats
        and is_dense(source)
        and is_dense(target)
        and source.buffer is not target.buffer
    )
