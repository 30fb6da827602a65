"""Random number state. The generator is Philox: state is a seed and a counter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from vibetensor import _C

default_generator = _C._default_generator()


def manual_seed(seed: int) -> _C.Generator:
    """Seeds the default generator of every device; negative seeds are taken modulo 2**64."""
    value = int(seed)
    if not -(2**63) <= value < 2**64:
        raise RuntimeError(f"Overflow when unpacking long: seed {value} does not fit in 64 bits")
    _C._manual_seed(value % 2**64)
    return default_generator


def seed() -> int:
    """Seeds from the operating system; returns the seed."""
    value = default_generator.seed()
    _C._manual_seed(value)
    return value


def initial_seed() -> int:
    """The seed of the default generator."""
    return default_generator.initial_seed()


def get_rng_state() -> _C.Tensor:
    """The default CPU generator's state as a uint8 tensor of 16 bytes."""
    return default_generator.get_state()


def set_rng_state(new_state: _C.Tensor) -> None:
    """Restores a state from get_rng_state."""
    default_generator.set_state(new_state)


@contextlib.contextmanager
def fork_rng(
    devices: Iterable[Any] | None = None, enabled: bool = True, device_type: str = "cuda"
) -> Iterator[None]:
    """Restores the random state of the CPU and of the CUDA `devices` (None: all) on leaving."""
    del device_type
    if not enabled:
        yield
        return
    before = _states()
    kept = None if devices is None else {0, *(_place(device) for device in devices)}
    try:
        yield
    finally:
        after = _states()
        _set_states(old if kept is None or i in kept else after[i] for i, old in enumerate(before))


def _place(device: Any) -> int:
    """Where `_states` has a device: the CPU first, then CUDA devices by index."""
    if isinstance(device, int):
        return device + 1
    kind, _, index = str(device).partition(":")
    return 0 if kind == "cpu" else int(index or 0) + 1


def _states() -> list[tuple[int, int]]:
    """(seed, offset) of every device's default generator, the CPU's first. Opens no device."""
    return _C._rng_states()


def _set_states(states: Iterable[Iterable[int]]) -> None:
    """Restores what `_states` returned."""
    _C._set_rng_states([tuple(state) for state in states])
