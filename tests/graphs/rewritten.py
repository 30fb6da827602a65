"""What the tests of bitwise passes share: a recording run as it is and rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vibetensor.torch as vt
from vibetensor.graphs import record
from vibetensor.graphs.lower import lower
from vibetensor.graphs.passes import chains
from vibetensor.graphs.pointwise import NAME
from vibetensor.graphs.tape import Tape
from vibetensor.graphs.verify import same_bits


def op_names(tape: Tape) -> list[str]:
    """Its ops in order, without views."""
    return [op.name for op in tape.ops if not op.is_view]


def check_bits(
    rewrite: Callable[[Tape], Tape],
    function: Callable[..., Any],
    *tensors: vt.Tensor,
    poison: float = 0,
) -> Tape:
    """The rewritten tape, after the function's results (a list), and what it leaves in its tensors,
    have been found equal to eager's: bit for bit, or to the bound that the tape states (of each result's
    largest element). poison: what results hold before."""
    kept = [t.clone() for t in tensors]
    with vt.no_grad():
        recording = record(lambda: function(*tensors))
        expected = [t.clone() for t in (*recording.result, *tensors)]
        for tensor, value in zip(tensors, kept):
            tensor.copy_(value)
        tape = rewrite(recording.tape)
        adopted = {recording.buffer_of(t): t for t in recording.result}
        for result in recording.result:
            result.fill_(poison)
        lower(tape, recording, adopted).program.run()
        for mine, other in zip((*recording.result, *tensors), expected):
            assert mine.dtype == other.dtype
            if tape.bound and mine.is_floating_point():
                apart = (mine.double() - other.double()).abs().max()
                assert bool(apart <= tape.bound * other.double().abs().max()), (mine, other)
            else:
                assert same_bits(mine, other), (mine, other)
    return tape


def check_chains(
    function: Callable[..., Any], *tensors: vt.Tensor, chain_ops: int | None = 1
) -> Tape:
    """check_bits for the pass chains, which makes so many chains; None: some."""

    def rewrite(tape: Tape) -> Tape:
        tape = chains.run(tape)
        found = op_names(tape).count(NAME)
        assert found == chain_ops or (chain_ops is None and found > 0), tape
        return tape

    return check_bits(rewrite, function, *tensors)
