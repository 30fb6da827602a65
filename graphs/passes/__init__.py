"""Passes: rewrites of a tape that make a step cheaper and leave its numbers as stated.

A pass is a module with `run(tape) -> Tape`, a docstring that names its pattern, rewrite and bound,
and `BITWISE`, whether results stay bit for bit. `docs/passes.md` tells how to write one.
"""

from __future__ import annotations

from vibetensor.graphs.passes import dead_code, repeated
from vibetensor.graphs.tape import Tape

ALL = (repeated, dead_code)


def run(tape: Tape) -> Tape:
    """Every pass in order."""
    for one in ALL:
        tape = one.run(tape)
    return tape
