"""Passes: rewrites of a tape that make a step cheaper and leave its numbers as stated.

A pass is a module with `run(tape) -> Tape`, a docstring that names its pattern, rewrite and bound,
and `BITWISE`, whether results stay bit for bit. `docs/passes.md` tells how to write one.
"""

from __future__ import annotations

from vibetensor.graphs import collector
from vibetensor.graphs.passes import (
    activations,
    attention_sums,
    bias_gradients,
    casts,
    chains,
    constants,
    copies,
    cross_entropy,
    dead_code,
    embeddings,
    epilogues,
    joined_casts,
    late_sums,
    optimizer,
    recompute,
    repeated,
    residual_norm,
    rotary,
    split_head,
    weight_gradients,
)
from vibetensor.graphs.tape import Tape

ALL = (
    repeated,
    residual_norm,
    bias_gradients,
    optimizer,
    cross_entropy,
    epilogues,
    rotary,
    embeddings,
    constants,
    casts,
    copies,
    attention_sums,
    joined_casts,
    dead_code,
    split_head,
    recompute,
    activations,
    chains,
    weight_gradients,
    late_sums,
)


@collector.paused()
def run(tape: Tape) -> Tape:
    """Every pass in order. The tape tells how many ops ran before and after each."""
    counts = []
    for one in ALL:
        before = tape
        tape = one.run(tape)
        name = one.__name__.rsplit(".", 1)[-1]
        counts.append((name, _running(before), _running(tape)))
    tape.passes = counts
    return tape


def _running(tape: Tape) -> int:
    return sum(not op.is_view for op in tape.ops)
