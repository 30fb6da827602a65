"""What a captured function uses besides tensors: modules, optimizers, schedules.

A recording sees ops. What Python decides around them - which branch `training` took, the learning
rate, a schedule's step - is found here while the function runs, so that a replay can repeat it or
notice that it changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import numpy as np

import vibetensor.torch as vt
from vibetensor.torch.nn.modules import hooks
from vibetensor.torch.optim import optimizer as optim
from vibetensor.torch.optim.lr_scheduler import base as schedules

# Kept in a group by schedules for themselves; no update reads it.
_CHANGED_BY_SCHEDULES = ("initial_lr",)


class Session:
    """Collected while a function is recorded, on the thread that records."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.optimizers: list[Any] = []
        # In the order of the run: what the host does before a replay.
        self.host: list[Callable[[], None]] = []
        self._thread = threading.get_ident()
        self._modes: list[bool] = []  # `training` as the function found it
        self._options: list[Any] = []  # of the optimizers, likewise
        self._live: dict[tuple[int, int, int], Any] = {}
        self._steps: dict[int, int] = {}
        self._rates: dict[tuple[int, int], tuple[float, int]] = {}
        self._schedules = 0
        self._restore: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()
        self._held: list[tuple[Any, tuple[Any, ...]]] = []
        self._items: list[tuple[dict[str, Any], str, Any]] = []

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

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def _on_module(self, module: Any) -> None:
        if id(module) not in self._seen and not self._elsewhere():
            self._seen.add(id(module))
            self.modules.append(module)
            self._modes.append(module.training)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._elsewhere():
            return
        if id(optimizer) not in self._seen:
            self._seen.add(id(optimizer))
            self.optimizers.append(optimizer)
            self._options.append(_options(optimizer))
        step = self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        for index, group in enumerate(optimizer.param_groups):
            if not _reads_rate(group):
                continue
            value = group["lr"]
            self._check_rate(optimizer, index, value)
            live = vt.from_numpy(np.array(float(value)))
            self._live[(id(optimizer), index, step)] = live
            self.host.append(_reader(optimizer, index, live))
            self._restore.append((group, "lr", value))
            group["lr"] = live

    def _check_rate(self, optimizer: Any, index: int, value: float) -> None:
        """A rate that the function sets by hand between two steps would be lost in replays."""
        last = self._rates.get((id(optimizer), index))
        if last is not None and last[0] != value and last[1] == self._schedules:
            raise RuntimeError(
                "a captured function cannot set a learning rate between two steps of an optimizer: "
                "a replay would not. Use a schedule, or set it outside"
            )
        self._rates[(id(optimizer), index)] = (value, self._schedules)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._elsewhere():
            self._give_back()

    def _give_back(self) -> None:
        for group, key, value in self._restore:
            group[key] = value
        self._restore.clear()

    def _on_schedule(self, scheduler: Any, args: tuple[Any, ...]) -> None:
        if self._elsewhere():
            return
        if any(arg is not None for arg in args):
            raise RuntimeError(
                f"{type(scheduler).__name__}.step with an argument cannot be captured: a replay "
                "would pass the same one again. Step the schedule outside"
            )
        self._schedules += 1
        self.host.append(lambda: scheduler.step(*args))

    def freeze(self) -> None:
        """Ends the collection: from now on the session tells whether a replay is right."""
        for module in self.modules:
            for held in (module._parameters, module._buffers, module._modules):
                self._held.append((held, tuple(held.values())))
        for optimizer in self.optimizers:
            self._held.append((optimizer.param_groups, tuple(optimizer.param_groups)))
            self._held.append((optimizer.state, tuple(optimizer.state.values())))
            for state in optimizer.state.values():
                self._held.append((state, tuple(state.values())))
            for group in optimizer.param_groups:
                self._items.append((group, "params", group["params"]))
                self._held.append((group["params"], tuple(group["params"])))

    def parameters(self) -> list[Any]:
        """What the optimizers that stepped train."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def same_course(self) -> bool:
        """Whether Python would decide again as it did: modes of modules, options of optimizers."""
        return [module.training for module in self.modules] == self._modes and [
            _options(optimizer) for optimizer in self.optimizers
        ] == self._options

    def same_tensors(self) -> bool:
        """Whether modules and optimizers hold the tensors they did."""
        for held, values in self._held:
            now = held.values() if isinstance(held, dict) else held
            if len(now) != len(values) or not all(map(is_, now, values)):
                return False
        return all(group.get(key) is value for group, key, value in self._items)

    def read_like(self, other: Session) -> None:
        """Takes over the rates that another run of the function read."""
        for key, live in other._live.items():
            self._live[key].copy_(live)

    def live_buffers(self, recording: Any) -> list[Any]:
        """Where the rates lie."""
        return [recording.buffer_of(live) for live in self._live.values()]


def _reads_rate(group: dict[str, Any]) -> bool:
    """Whether the group's update takes its rate from a tensor: the plain form does not."""
    plain = group.get("foreach") is False or group.get("fused") is False
    rate = group.get("lr")
    return not (plain or group.get("differentiable")) and type(rate) in (float, int)


def _reader(optimizer: Any, index: int, live: Any) -> Callable[[], None]:
    def read() -> None:
        live.fill_(float(optimizer.param_groups[index]["lr"]))

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
        _Same(optimizer.state),  # loading a state dict makes a new one
        [
            [
                (key, _Same(value) if isinstance(value, vt.Tensor) else value)
                for key, value in group.items()
                if key != "params" and not (key in _CHANGED_BY_SCHEDULES or _is_rate(group, key))
            ]
            for group in optimizer.param_groups
        ],
    )


def _is_rate(group: dict[str, Any], key: str) -> bool:
    return key == "lr" and _reads_rate(group)
