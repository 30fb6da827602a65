"""What a captured function uses besides tensors: modules, optimizers, schedules.

A recording sees ops. What Python decides around them - which branch `training` took, the learning
rate, a schedule's step - is found here while the function runs, so that a replay can repeat it or
notice that it changed.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.surroundings import Surroundings, of_class
from vibetensor.torch import _recording
from vibetensor.torch import session as settings
from vibetensor.torch.library import overrides
from vibetensor.torch.nn.modules import hooks
from vibetensor.torch.nn.modules.module import (
    CALL_HOOK_TABLES,
    REGISTRIES,
    observed_attributes,
)
from vibetensor.torch.optim import optimizer as optim
from vibetensor.torch.optim.lr_scheduler import base as schedules
from vibetensor.torch.utils.registry import HookTable, Registry, StateTable

# Kept in a group by schedules for themselves; no update reads it.
_CHANGED_BY_SCHEDULES = "initial_lr"

# And as attributes of an optimizer.
_SET_BY_SCHEDULES = ("_opt_called", "_step_count")

_NO_KEYS: frozenset[Any] = frozenset()

# Attributes of modules that a function which is recorded sets itself, a counter or a cache say:
# effects of Python's, which no replay has and none of the function's depends on.
Effects: TypeAlias = weakref.WeakKeyDictionary[Any, set[str]]


@dataclass
class Rate:
    """A learning rate, which is read before every replay and written where the program reads it."""

    optimizer: Any
    index: int  # of the group
    live: Any  # a 0-d float64 tensor

    def __call__(self) -> None:
        self.live.fill_(float(self.group["lr"]))

    @property
    def group(self) -> dict[str, Any]:
        """The options it is one of."""
        return self.optimizer.param_groups[self.index]


class TensorRate(Rate):
    """A rate in a tensor: the same tensor in every replay, with the value it has then."""

    def __call__(self) -> None:
        with vt.no_grad():
            self.live.copy_(self.group["lr"].reshape(self.live.shape))


class Momentum:
    """A momentum or first beta, likewise."""

    def __init__(self, group: dict[str, Any], key: str, live: Any) -> None:
        self.group = group
        self.key = key
        self.live = live

    def __call__(self) -> None:
        self.live.fill_(float(_momentum(self.group[self.key])))


class OptionsHold:
    """The options of an optimizer as one of its steps found them, after schedules had stepped in the same
    run: a replay whose schedules make them others must not go on."""

    def __init__(self, session: Session, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._wanted = [_settings(group) for group in optimizer.param_groups]
        self._momenta = session._momenta  # complete when replays begin

    def __call__(self) -> None:
        for group, wanted in zip(self._optimizer.param_groups, self._wanted):
            for key in _moved(wanted, _settings(group)):
                was, now = wanted[key], group[key]
                if (id(group), key) in self._momenta and _follows(was, now):
                    continue
                raise RuntimeError(
                    _SCHEDULED.format(key=key, name=type(self._optimizer).__name__)
                    + f" (it was {was!r}, and is {now!r})"
                )


def set_modes(modes: list[tuple[Any, bool]]) -> None:
    """Sets `training` of modules."""
    for module, training in modes:
        if module.training is not training:
            module.training = training


def _mode(module: Any) -> bool:
    # Where it is a property, the fields do not show it.
    return module.training if hasattr(type(module), "training") else vars(module)["training"]


class Session:
    """Collected while a function is recorded, on the thread that records.

    effects: of all recordings of the function; what one finds holds for the captures before it too."""

    def __init__(self, effects: Effects | None = None) -> None:
        self._effects = Effects() if effects is None else effects
        self.modules: list[Any] = []
        self.optimizers: list[Any] = []
        # In the order of the run: what the host does before a replay.
        self.host: list[Callable[[], None]] = []
        self._thread = threading.get_ident()
        # `training` of the modules that it looks at or sets, as the function found it, and of those
        # that it leaves otherwise.
        self._modes: dict[int, tuple[Any, bool]] = {}
        self._left: list[tuple[Any, bool]] = []
        self._reads: dict[int, tuple[Any, dict[str, Any]]] = {}  # module, marks of its attributes
        self._options: list[list[dict[str, Any]]] = []  # of the optimizers, likewise
        self.course: Any = None  # what decides how Python runs, from freeze() on
        self.tensors: Any = None  # and which tensors it runs on
        self._live: dict[tuple[int, int, int], Any] = {}
        self._steps: dict[int, int] = {}
        self._rates: dict[tuple[int, int], tuple[float, int]] = {}
        self._schedules = 0
        self.schedulers: list[Any] = []
        self.names: dict[str, Any] = {}  # what the function found outside of itself
        self._surroundings: Any = None
        # Of the step that is running: optimizer, group, rate, what stands for it, and its version.
        self._restore: list[tuple[Any, dict[str, Any], Any, Any, int]] = []
        self._seen: set[int] = set()
        self._lost = ""
        self._hosts_random: Any = None
        # Options of optimizers, and versions of rates in tensors, as they were before the function or a
        # schedule could change them; those that schedules changed before a step: optimizer, group, key.
        self._at_entry: dict[int, list[dict[str, Any]]] = {}
        self._versions: dict[int, tuple[Any, int]] = {}
        self._scheduled: list[tuple[Any, Any, str]] = []
        self._counts: dict[
            int, dict[Any, Any]
        ] = {}  # of optimizers, the numbers they keep in Python
        self.notes = _recording.Notes()
        self.notes.live = self._live_momentum
        # Groups of optimizers whose updates read a momentum, and those that do, by group and name:
        # the number then, and how many steps schedules had made.
        self._reading: dict[int, dict[str, Any]] = {}
        self._momenta: dict[tuple[int, str], tuple[float, int]] = {}
        # Called with modules and optimizers, before the function can change them.
        self.at_first_sight: Callable[[Any], None] | None = None

    def about_to_run(
        self, function: Any, arguments: Iterable[Any] = (), optimizers: Iterable[Any] = ()
    ) -> None:
        """Notes what the names of the function, and of functions among its arguments, are bound to,
        where Python's random numbers are, and the options of optimizers that earlier runs used."""
        of_all = (*hooks.CALL_HOOKS_OF_ALL, optim._global_pre_hooks, optim._global_post_hooks)
        of_all_called = [hook for table in of_all for hook in [*table.values()]]
        self._surroundings = Surroundings(function, (*arguments, *of_all_called))
        self._hosts_random = _hosts_random()
        for optimizer in optimizers:
            self._note_entry(optimizer)

    def _note_entry(self, optimizer: Any) -> None:
        groups = optimizer.param_groups
        self._at_entry.setdefault(id(optimizer), [_settings(group) for group in groups])
        for rate in (group.get("lr") for group in groups):
            if isinstance(rate, vt.Tensor):
                self._versions.setdefault(id(rate), (rate, rate._version))

    def surroundings_of(self, function: Any) -> Surroundings:
        """What the names of the function are bound to now, and of what this run of it has met."""
        found = Surroundings(function, self.modules)
        for module, reads in self._reads.values():
            for name in reads:
                found.read(module, name)
        return found

    def lost(self) -> str:
        """What Python did in a run that no replay would do, though what follows depends on it; empty
        for nothing."""
        if self._lost:
            return self._lost
        for optimizer, group, key in self._scheduled:
            if (id(group), key) not in self._momenta:
                return _SCHEDULED.format(key=key, name=type(optimizer).__name__)
        for optimizer in self.optimizers:
            name = type(optimizer).__name__
            for index, group in enumerate(optimizer.param_groups):
                last = self._rates.get((id(optimizer), index))
                rate = _rate(group)
                if last is None or rate is None or last[1] != self._schedules:
                    continue
                if rate != last[0]:
                    return f"it sets the learning rate of {name} by hand: {_RATE_BY_HAND}"
            before = self._counts.get(id(optimizer), {})
            now = _state_numbers(optimizer)
            for key in before.keys() & now.keys():
                if type(before[key]) is not type(now[key]) or before[key] != now[key]:
                    return (
                        f"{name} keeps a number in Python ({key[1]!r}, {before[key]} before the step "
                        f"and {now[key]} after it), and every replay would go on with the one of the "
                        "recording: keep it in a tensor that the step changes in place"
                    )
        # Other threads may draw from the same generators.
        if threading.active_count() == 1 and (drawn := self._drawn_from()):
            return (
                f"it draws from {drawn}, and every replay would have the numbers of the recording: "
                "draw tensors (torch.rand), or pass them as arguments"
            )
        return ""

    def _drawn_from(self) -> str:
        if self._hosts_random is not None:
            now = _hosts_random()
            for name, x, y in zip(("random", "numpy.random"), self._hosts_random, now):
                if x != y:
                    return f"Python's {name}"
        return "" if self._surroundings is None else self._surroundings.drawn_from()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sees what runs meanwhile."""
        schedules.step_observers.append(self._on_schedule)
        try:
            with (
                hooks.observed_calls(self._on_module),
                observed_attributes(self._on_read, self._on_mode),
                _recording.noting(self.notes),
                optim.observed_steps(self._before_step, self._after_step),
            ):
                yield
        finally:
            schedules.step_observers.remove(self._on_schedule)
            self._give_back()
            now = [(module, _mode(module), before) for module, before in self._modes.values()]
            self._left = [(module, mode) for module, mode, before in now if mode != before]

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def _show(self, found: Any) -> None:
        if self.at_first_sight is not None:
            self.at_first_sight(found)

    def _met(self, found: Any) -> None:
        if self._surroundings is not None:
            self._surroundings.met(found)

    def _on_module(self, module: Any) -> None:
        if id(module) not in self._seen and not self._elsewhere():
            self._seen.add(id(module))
            self._show(module)
            self._met(module)
            self.modules.append(module)
            self._modes.setdefault(id(module), (module, _mode(module)))

    def _on_mode(self, module: Any) -> None:
        if id(module) not in self._modes and "_modules" in vars(module) and not self._elsewhere():
            self._show(module)
            self._modes[id(module)] = (module, _mode(module))

    def _on_read(self, module: Any, name: str) -> None:
        if self._elsewhere():
            return
        known = self._reads.get(id(module))
        if known is None:
            self._show(module)
            known = self._reads[id(module)] = (module, {})
        if name not in known[1]:
            known[1][name] = _mark(_attribute(module, name))
            if self._surroundings is not None:
                self._surroundings.read(module, name)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._elsewhere():
            return
        if id(optimizer) not in self._seen:
            self._seen.add(id(optimizer))
            self._show(optimizer)
            self._met(optimizer)
            self.optimizers.append(optimizer)
            self._options.append([_options(optimizer, g) for g in optimizer.param_groups])
            if not optimizer._steps_knowingly():
                self._counts[id(optimizer)] = _state_numbers(optimizer)
            found = [_settings(group) for group in optimizer.param_groups]
            if found != self._at_entry.get(id(optimizer), found) and not self._schedules:
                self._lose_by_hand(optimizer)
        if self._schedules:
            entry = self._at_entry.get(id(optimizer), ())
            for group, before in zip(optimizer.param_groups, entry):
                moved = _moved(before, _settings(group))
                self._scheduled.extend((optimizer, group, key) for key in moved)
            self.host.append(OptionsHold(self, optimizer))
        else:
            self._check_versions(optimizer)
        step = self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        if optimizer._steps_knowingly():
            self._reading.update((id(group), group) for group in optimizer.param_groups)
        for index, group in enumerate(optimizer.param_groups):
            if not _reads_rate(optimizer, group):
                if (rate := _rate(group)) is not None:
                    self._rates[(id(optimizer), index)] = (rate, self._schedules)
                continue
            value = group["lr"]
            with _recording.outside():
                self._check_rate(optimizer, index, float(value))
                if isinstance(value, vt.Tensor):
                    live = value.detach().clone()
                else:
                    live = vt.from_numpy(np.array(float(value)))
                    live.stands_for_number = True
            self._live[(id(optimizer), index, step)] = live
            number = not isinstance(value, vt.Tensor)
            self.host.append((Rate if number else TensorRate)(optimizer, index, live))
            self._restore.append((optimizer, group, value, live, live._version))
            group["lr"] = live

    def _lose_by_hand(self, optimizer: Any) -> None:
        self._lost = f"it sets options of {type(optimizer).__name__} by hand: {_RATE_BY_HAND}"

    def _check_versions(self, optimizer: Any) -> None:
        """A rate in a tensor is read before a replay, and not after ops of the function."""
        for rate in (group.get("lr") for group in optimizer.param_groups):
            _, version = self._versions.get(id(rate), (rate, None))
            if version is not None and rate._version != version:
                self._lose_by_hand(optimizer)

    def _check_rate(self, optimizer: Any, index: int, value: float) -> None:
        """A rate that the function sets by hand between two steps would be lost in replays."""
        last = self._rates.get((id(optimizer), index))
        if last is not None and last[0] != value and last[1] == self._schedules:
            raise RuntimeError(
                "a captured function cannot set a learning rate between two steps of an optimizer: "
                "a replay would not. Use a schedule, or set it outside"
            )
        self._rates[(id(optimizer), index)] = (value, self._schedules)

    def _live_momentum(self, group: dict[str, Any], key: str) -> Any:
        """A tensor for a group's momentum, for one update; None where it stays a number."""
        value = _momentum(group[key])
        if id(group) not in self._reading or type(value) is not float or value == 0:
            return None
        with _recording.outside():
            live = vt.from_numpy(np.array(value))
            live.stands_for_number = True
        self._live[(id(group), len(self._live), 0)] = live
        self.host.append(Momentum(group, key, live))
        self._momenta.setdefault((id(group), key), (value, self._schedules))
        return live

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._elsewhere():
            self._give_back()

    def _give_back(self) -> None:
        for optimizer, group, value, live, version in self._restore:
            if group["lr"] is not live or live._version != version:  # by a hook
                self._lose_by_hand(optimizer)
            group["lr"] = value
        self._restore.clear()

    def _on_schedule(self, scheduler: Any, args: tuple[Any, ...]) -> None:
        if self._elsewhere():
            return
        if any(arg is not None for arg in args):
            raise RuntimeError(
                f"{type(scheduler).__name__}.step with an argument cannot be captured: a replay "
                "would pass the same one again. Step the schedule outside"
            )
        for optimizer in _optimizers_of(scheduler):
            if not self._schedules:
                self._check_versions(optimizer)
            self._note_entry(optimizer)
        self._schedules += 1
        if not any(known is scheduler for known in self.schedulers):
            self.schedulers.append(scheduler)
        self.host.append(lambda: scheduler.step(*args))

    def freeze(self) -> None:
        """Ends the collection: from now on the session tells whether a replay is right."""
        self.course, self.tensors = _C.graphs.Watch(), _C.graphs.Watch()
        self.course.add_attribute(settings, "_deterministic", settings._deterministic)
        self.course.add_attribute(overrides, "token", overrides.token)
        for table in hooks.CALL_HOOKS_OF_ALL:
            self._watch_hooks(table)
        classes: set[tuple[type, str]] = set()
        for module, reads in self._reads.values():
            self._watch_reads(module, reads, classes)
        # A module whose children or tensors are used may never be called: a ModuleList, say.
        touched = {id(module): module for module in self.modules}
        touched.update((key, module) for key, (module, _) in self._reads.items())
        for module in touched.values():
            self._watch_registries(module)
        for module, training in self._modes.values():
            self._watch_module(module, training)
        if self._left:
            self.host.append(functools.partial(set_modes, self._left))
        for optimizer, options in zip(self.optimizers, self._options):
            self._watch_optimizer(optimizer, options)
        if self.optimizers:
            self._watch_hooks(optim._global_pre_hooks)
            self._watch_hooks(optim._global_post_hooks)
        for owner, name, value in self.notes.relied_on.values():
            self.course.add_attribute(owner, name, value)
        if self._surroundings is not None:
            self.names = self._surroundings.watch(self.course)
        self._surroundings = None
        self._reads.clear()
        self._options.clear()

    def _watch_reads(
        self, module: Any, reads: dict[str, Any], classes: set[tuple[type, str]]
    ) -> None:
        """The attributes that the function read, but not those that it also sets. `classes`: what
        is watched of classes already."""
        fields, kind = vars(module), type(module)
        effects = self._effects.setdefault(module, set())
        same = {name for name, mark in reads.items() if _mark(_attribute(module, name)) == mark}
        effects.update(reads.keys() - same - {"training"})
        if id(module) in self._modes:
            same.discard("training")  # watched as the function found it
        kept = {name: fields.get(name, _C.graphs.ABSENT) for name in same}
        self.course.add_items(fields, kept, effects, _counts(module))
        for name in same - fields.keys():
            held = of_class(kind, name)
            if type(held) is types.MemberDescriptorType:
                value = _attribute(module, name)
                self.course.add_attribute(module, name, value, _counts(module))
            elif held is not _C.graphs.ABSENT and (kind, name) not in classes:
                classes.add((kind, name))
                self.course.add_attribute(kind, name, held)

    def _watch_registries(self, module: Any) -> None:
        """What is registered, and the class, which decides what is done with it."""
        fields = vars(module)
        kept = {name: fields[name] for name in REGISTRIES}
        self.course.add_items(fields, kept, _NO_KEYS, _counts(module))
        self.course.add_attribute(module, "__class__", type(module), _counts(module))
        for held in kept.values():
            self.tensors.add_dict(held, dict(held), _NO_KEYS, type(held) is Registry)

    def _watch_module(self, module: Any, training: bool) -> None:
        fields = vars(module)
        if hasattr(type(module), "training"):
            self.course.add_attribute(module, "training", training)
        else:
            # Few modules read it, and it may be written past them.
            read = id(module) in self._reads and "training" in self._reads[id(module)][1]
            kept = {"training": training}
            self.course.add_items(fields, kept, _NO_KEYS, _counts(module) and not read)
        for table in CALL_HOOK_TABLES:
            self._watch_hooks(fields.get(table))

    def _watch_optimizer(self, optimizer: Any, options: list[dict[str, Any]]) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        # Loading a state dict makes new ones.
        self.course.add_attribute(optimizer, "param_groups", groups)
        self.course.add_attribute(optimizer, "state", state)
        self._watch_hooks(optimizer._optimizer_step_pre_hooks)
        self._watch_hooks(optimizer._optimizer_step_post_hooks)
        self.tensors.add_list(groups)
        self.tensors.add_dict(state, dict(state), _NO_KEYS, type(state) is StateTable)
        for values in state.values():
            self.tensors.add_dict(values, dict(values), _NO_KEYS, type(values) is Registry)
        for group, found in zip(groups, options):
            found = {**found, **self.live_options(group)}
            ignored = frozenset({_CHANGED_BY_SCHEDULES, "params"})
            self.course.add_dict(group, found, ignored, False)
            for option in found.values():
                if isinstance(option, list):
                    self.course.add_list(option)
            self.tensors.add_items(group, {"params": group["params"]}, _NO_KEYS, False)
            self.tensors.add_list(group["params"])

    def live_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options that replays read: any number but 0, which takes another way. One that the function
        itself changes stays watched."""
        found: dict[str, Any] = {}
        for (owner, key), (value, steps) in self._momenta.items():
            if owner != id(group):
                continue
            now = group[key]
            changed = _momentum(now) != value
            if changed and (steps == self._schedules or not any(map(_cycles, self.schedulers))):
                continue
            found[key] = _C.graphs.NONZERO
            if isinstance(now, tuple):
                found[key] = (_C.graphs.NONZERO, *now[1:])
        return found

    def _watch_hooks(self, table: Any) -> None:
        if table is None:  # an object without, from an old pickle say
            return
        self.course.add_dict(table, dict(table), _NO_KEYS, type(table) is HookTable)

    def parameters(self) -> list[Any]:
        """What the optimizers that stepped train."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    @property
    def sets_modes(self) -> bool:
        """Whether the function leaves `training` of modules otherwise than it found it."""
        return bool(self._left)

    def modes(self) -> list[tuple[Any, bool]]:
        """The modules that ran, each with `training` as the function found it."""
        return [self._modes[id(module)] for module in self.modules]

    def acts(self) -> list[Any]:
        """What the host does before a replay, for one without Python code: learning rates as the
        group and the tensor, others to be called."""
        return [
            (act.group, act.live, "lr" if isinstance(act, Rate) else act.key)
            if isinstance(act, Rate | Momentum)
            else act
            for act in self.host
        ]

    def same_course(self) -> bool:
        """Whether Python would decide again as it did: attributes and hooks of modules, options of
        optimizers."""
        return self.course.holds()

    def same_tensors(self) -> bool:
        """Whether modules and optimizers hold the tensors they did."""
        return self.tensors.holds()

    def read_like(self, other: Session) -> None:
        """Takes over the rates that another run of the function read."""
        for key, live in other._live.items():
            self._live[key].copy_(live)

    @contextlib.contextmanager
    def otherwise(self) -> Iterator[None]:
        """Learning rates that a replay reads, step counts and what schedules count are others
        meanwhile, and so is the seed of random numbers. What steps a schedule meanwhile takes that
        back itself."""
        undo: list[Callable[[], None]] = []

        def put(target: Any, key: str, value: Any) -> None:
            undo.append(functools.partial(target.__setitem__, key, target[key]))
            target[key] = value

        try:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    rate = group.get("lr")
                    if _reads_rate(optimizer, group) and not isinstance(rate, vt.Tensor):
                        put(group, "lr", _another(float(rate)))
                for values in optimizer.state.values():
                    counts = [k for k, v in dict(values).items() if k == "step" and type(v) is int]
                    for key in counts:
                        put(values, key, values[key] + 1)
            for scheduler in self.schedulers:
                fields = vars(scheduler)
                for key in ("last_epoch", "_step_count"):
                    if type(fields.get(key)) is int:
                        put(fields, key, fields[key] + 1)
                if isinstance(last := fields.get("_last_lr"), list):
                    put(fields, "_last_lr", [_another(x) if type(x) is float else x for x in last])
            vt.manual_seed(vt.initial_seed() ^ 1)
            yield
        finally:
            for act in reversed(undo):
                act()

    def live_buffers(self, recording: Any) -> list[Any]:
        """Where the rates lie."""
        return [recording.buffer_of(live) for live in self._live.values()]


def _momentum(option: Any) -> Any:
    """The number itself, or the first of two betas."""
    return option[0] if isinstance(option, tuple) else option


def _follows(was: Any, now: Any) -> bool:
    """Whether a program that reads a momentum can go from one to the other: 0 takes another way, and the
    second beta is a part of the program."""
    if not (_momentum(was) and _momentum(now)):
        return False
    return not isinstance(now, tuple) or now[1:] == was[1:]


def _cycles(scheduler: Any) -> bool:
    """Whether a schedule changes momenta."""
    inner = getattr(scheduler, "_schedulers", ())
    return bool(getattr(scheduler, "cycle_momentum", False)) or any(map(_cycles, inner))


def _optimizers_of(scheduler: Any) -> Iterator[Any]:
    """Whose options a schedule changes."""
    optimizer = getattr(scheduler, "optimizer", None)
    if isinstance(optimizer, optim.Optimizer):
        yield optimizer
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _optimizers_of(inner)


_SCHEDULED = (
    "a schedule changes {key} of {name} before it steps, in the same call, which a replay of that step "
    "would not follow: step the schedule after the optimizer"
)
_RATE_BY_HAND = "a replay would not. Use a schedule of torch.optim.lr_scheduler, or set it outside of the function"


def _hosts_random() -> tuple[Any, Any]:
    """Where the generators of Python and NumPy are."""
    kind, keys, *place = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *place)


def _rate(group: dict[str, Any]) -> float | None:
    """A rate that is a number: a tensor's changes are recorded."""
    rate = group.get("lr")
    return float(rate) if isinstance(rate, int | float) else None


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if type(value) in (int, float, bool)}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """The group's options that can be compared; lists as tuples."""
    found = {}
    for key, value in group.items():
        if type(value) in _PLAIN:
            found[key] = value
        elif isinstance(value, tuple | list) and all(type(item) in _PLAIN for item in value):
            found[key] = tuple(value)
    return found


def _moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The options that have changed, but for rates: replays read those."""
    return [
        key
        for key, value in now.items()
        if key not in ("lr", _CHANGED_BY_SCHEDULES) and before.get(key, value) != value
    ]


def _state_numbers(optimizer: Any) -> dict[Any, Any]:
    """The numbers that an optimizer keeps in Python, for its parameters and for itself."""
    found = {(None, key): value for key, value in _numbers(vars(optimizer)).items()}
    for name in _SET_BY_SCHEDULES:
        found.pop((None, name), None)
    for p, values in dict(optimizer.state).items():
        if isinstance(values, dict):
            found.update(((id(p), key), value) for key, value in _numbers(values).items())
    for index, group in enumerate(optimizer.param_groups):
        numbers = _numbers(group)
        found.update(((index, key), value) for key, value in numbers.items() if key != "lr")
    return found


def _another(rate: float) -> float:
    """A learning rate near by."""
    return rate * 0.75 if rate else 1e-3


def _reads_rate(optimizer: Any, group: dict[str, Any]) -> bool:
    """Whether the group's update takes its rate from a tensor that replays set: those of
    vibetensor's optimizers, unless autograd goes through it."""
    if not optimizer._steps_knowingly() or group.get("differentiable"):
        return False
    rate = group.get("lr")
    # NumPy's float64 is a float: schedules by hand often give one.
    if isinstance(rate, float) or type(rate) is int:
        return True
    return isinstance(rate, vt.Tensor) and not rate.requires_grad


_PLAIN = (bool, int, float, str, bytes, type(None))


def _counts(module: Any) -> bool:
    """Whether every change of the module's attributes is counted."""
    kind, base = type(module), vt.nn.Module
    return kind.__setattr__ is base.__setattr__ and kind.__delattr__ is base.__delattr__


def _attribute(module: Any, name: str) -> Any:
    """What an attribute of a module is, without running its code (a property's, say)."""
    fields = vars(module)
    if name in fields:
        return fields[name]
    held = of_class(type(module), name)
    if type(held) is types.MemberDescriptorType:  # one of __slots__
        try:
            return held.__get__(module)
        except AttributeError:
            return _C.graphs.ABSENT
    return held


def _mark(value: Any) -> tuple[int, Any]:
    """Tells an object from others, and holds it only if it has no tensors: what a recording makes
    must be free to go."""
    return id(value), value if type(value) in _PLAIN else None


def _options(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The options a run bakes in: all but rates that it reads."""
    skipped = ("params", _CHANGED_BY_SCHEDULES)
    found = {key: value for key, value in group.items() if key not in skipped}
    if _reads_rate(optimizer, group) and not isinstance(group["lr"], vt.Tensor):
        found["lr"] = _C.graphs.RATE
    return found
