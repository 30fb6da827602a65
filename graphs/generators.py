"""Generators of random numbers of Python's, NumPy's and this library's that a program has of its own."""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np

import vibetensor.torch as vt
from vibetensor.torch._recording import outside


def as_now(value: Any) -> Callable[[], None] | None:
    """What puts a generator back to where it is now; None for other objects."""
    if isinstance(value, vt.Generator):
        with outside():
            state = value.get_state()
        return functools.partial(value.set_state, state)
    held = _held(value)
    if held is None:
        return None
    state, put_back = held
    return functools.partial(put_back, state)


def place(value: Any) -> bytes | None:
    """Where a generator of Python's or NumPy's is; None for other objects, and for tensors' generators,
    whose draws a recording sees."""
    held = _held(value)
    return None if held is None else pickle.dumps(held[0])


def _held(value: Any) -> tuple[Any, Callable[[Any], None]] | None:
    """Its state, and what sets it."""
    if isinstance(value, random.SystemRandom):
        return None  # it has none
    if isinstance(value, random.Random):
        return value.getstate(), value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return value.state, functools.partial(setattr, value, "state")
    return None
