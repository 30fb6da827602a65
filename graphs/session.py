"""What a captured function uses besides tensors: modules, optimizers, schedules.

A recording sees ops. What Python decides around them - which branch `training` took, the learning
rate, a schedule's step - is found here while the function runs, so that a replay can repeat it or
notice that it changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import numpy as np

import vibetensor.torch as vt
from vibetensor.torch.nn.modules import hooks
from vibetensor.torch.optim import optimizer as optim
from vibetensor.torch.optim.lr_scheduler import base as schedules

# Options of a parameter group that a replay reads anew each time.
_LIVE = ("lr",)


class Session:
    """Collected while a function is recorded."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.optimizers: list[Any] = []
        # In the order of the run: what the host does before a replay.
        self.host: list[Callable[[], None]] = []
        self._live: dict[tuple[int, str], Any] = {}
        self._restore: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()
        self._course: tuple[Any, ...] = ()
        self._held: list[tuple[dict[Any, Any], tuple[Any, ...]]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sees what runs meanwhile."""
        before = optim.register_optimizer_step_pre_hook(self._before_step)
        after = optim.register_optimizer_step_post_hook(self._after_step)
        schedules.step_observers.append(self._on_schedule)
        try:
            with hooks.observed_calls(self._on_module):
                yield
        finally:
            before.remove()
            after.remove()
            schedules.step_observers.remove(self._on_schedule)
            self._give_back()

    def _on_module(self, module: Any) -> None:
        if id(module) not in self._seen:
            self._seen.add(id(module))
            self.modules.append(module)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._seen:
            self._seen.add(id(optimizer))
            self.optimizers.append(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            for key in _LIVE:
                value = group.get(key)
                if not isinstance(value, float | int) or isinstance(value, bool):
                    continue  # a tensor is read anew as it is
                live = self._live.get((id(optimizer), index))
                if live is None:
                    live = vt.from_numpy(np.array(float(value)))
                    self._live[(id(optimizer), index)] = live
                    self.host.append(_reader(optimizer, index, key, live))
                self._restore.append((group, key, value))
                group[key] = live

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for group, key, value in self._restore:
            group[key] = value
        self._restore.clear()

    def _on_schedule(self, scheduler: Any, epoch: int | None) -> None:
        self.host.append(lambda: scheduler.step(epoch) if epoch is not None else scheduler.step())

    def read_like(self, other: Session) -> None:
        """Takes over the rates that another run of the function read."""
        for key, live in other._live.items():
            self._live[key].copy_(live)

    def live_buffers(self, recording: Any) -> list[Any]:
        """Where the rates lie."""
        return [recording.buffer_of(live) for live in self._live.values()]

    def freeze(self) -> list[Any]:
        """Ends the collection; the tensors that modules and optimizers hold."""
        self._course = self._now()
        for module in self.modules:
            for held in (module._parameters, module._buffers):
                self._held.append((held, tuple(held.values())))
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                self._held.append((state, tuple(state.values())))
        tensors = [value for _, values in self._held for value in values]
        return [tensor for tensor in tensors if isinstance(tensor, vt.Tensor)]

    def same_course(self) -> bool:
        """Whether Python would decide again as it did: modes of modules, options of optimizers."""
        return self._now() == self._course

    def same_tensors(self) -> bool:
        """Whether modules and optimizers hold the tensors they did."""
        return all(
            len(held) == len(values) and all(map(is_, held.values(), values))
            for held, values in self._held
        )

    def _now(self) -> tuple[Any, ...]:
        return (
            tuple([module.training for module in self.modules]),
            tuple([_options(optimizer) for optimizer in self.optimizers]),
        )


def _reader(optimizer: Any, index: int, key: str, live: Any) -> Callable[[], None]:
    def read() -> None:
        live.fill_(float(optimizer.param_groups[index][key]))

    return read


class _Same:
    """Equal to another of the same object only."""

    __slots__ = ("object",)

    def __init__(self, object: Any) -> None:
        self.object = object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.object is self.object

    __hash__ = None  # type: ignore[assignment]


def _options(optimizer: Any) -> tuple[Any, ...]:
    """The options a run bakes in, and which state the optimizer works on."""
    return (
        _Same(optimizer),
        _Same(optimizer.state),  # loading a state dict makes a new one
        tuple(
            tuple(
                (key, value)
                for key, value in group.items()
                if key != "params"
                and key not in _LIVE
                and isinstance(value, float | int | bool | tuple | str | type(None))
            )
            for group in optimizer.param_groups
        ),
        tuple(len(group["params"]) for group in optimizer.param_groups),
    )
