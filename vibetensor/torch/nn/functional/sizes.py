"""Sizes as callers give them: one integer of any type for every dimension, or several."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any


def sizes(value: Any, count: int) -> tuple[int, ...]:
    """``value`` as plain ints: an integer (NumPy's too) ``count`` times, several as they are."""
    if isinstance(value, Integral):
        return (operator.index(value),) * count
    return tuple(operator.index(n) for n in value)
