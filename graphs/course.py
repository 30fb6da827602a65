"""What a capture belongs to, in words, and how two captures of one function differ.

A function is captured anew when an argument has another shape, an option changed, a branch went
another way. The reader of a report wants to know which it was, and where the ops part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.record import Recording
from vibetensor.graphs.tape import Buffer, Op, View

_MOST_TEXT = 60
_PLAIN = (bool, int, float, str, bytes, type(None))
# Of an optimizer's group: tensors, and what schedules change between steps.
_NO_OPTIONS = ("params", "lr", "initial_lr")


@dataclass(frozen=True)
class Fact:
    """One circumstance of a capture. token tells apart what looks alike: which tensor it is."""

    text: str
    token: Any = None


@dataclass(frozen=True)
class Course:
    """number: the how-manieth capture of its function. facts: by name, "argument 0" and so on."""

    number: int
    facts: dict[str, Fact]

    def differences(self, before: Course) -> list[str]:
        """What changed since an earlier capture, a sentence each."""
        found = []
        for name in {**before.facts, **self.facts}:
            old, new = before.facts.get(name), self.facts.get(name)
            if old is None and new is not None:
                found.append(f"{name} is {new.text}, and was not there")
            elif new is None and old is not None:
                found.append(f"{name} was {old.text}, and is not there")
            elif old is not None and new is not None and old != new:
                changed = f"was {old.text}, is {new.text}"
                found.append(f"{name} {changed if old.text != new.text else 'is another one'}")
        return found


def course(
    number: int,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    session: Any,
    found: list[tuple[Any, bool]],
) -> Course:
    """The circumstances of a call that has just been recorded.

    call: its arguments. session: what it used besides. found: the leaves it used, and whether each
    had a .grad before.
    """
    facts: dict[str, Fact] = {}
    args, kwargs = call
    seen: dict[int, str] = {}
    for index, value in enumerate(args):
        facts.update(_argument(f"argument {index}", value, seen))
    for key, value in kwargs.items():
        facts.update(_argument(f"argument {key}", value, seen))
    facts.update(_modes())
    facts.update((f"the name {name}", _name(x)) for name, x in session.names.items())
    if session.modules:
        facts["training"] = _training(session.modes())
    for index, optimizer in enumerate(session.optimizers):
        facts.update(_options(f"{type(optimizer).__name__} {index}", optimizer, session))
    present = sum(has for _, has in found)
    facts["gradients at the start"] = Fact(f"{present} of {len(found)}")
    return Course(number, facts)


def _training(modes: list[tuple[Any, bool]]) -> Fact:
    """Which modules were training as the call began, in the order they ran."""
    token = tuple((type(module).__name__, training) for module, training in modes)
    off = [f"{name} {index}" for index, (name, on) in enumerate(token) if not on]
    if not off:
        return Fact(f"on in all {len(token)} modules", token)
    if len(off) == len(token):
        return Fact(f"off in all {len(token)} modules", token)
    shown = ", ".join(off[:3]) + ("" if len(off) <= 3 else f" and {len(off) - 3} others")
    return Fact(f"off in {shown} of {len(token)} modules", token)


def _argument(name: str, value: Any, seen: dict[int, str]) -> Iterator[tuple[str, Fact]]:
    """The facts of an argument, leaf by leaf."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _argument(f"{name}[{key!r}]", item, seen)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _argument(f"{name}[{index}]", item, seen)
    elif isinstance(value, vt.Tensor):
        text = shape_text(value.dtype, value.shape)
        if not value.is_contiguous():
            text += f" of strides {list(value.stride())}"
        if value.device.type != "cpu":
            text += f" on {value.device}"
        first = seen.setdefault(value._storage_key(), name)
        if first != name:
            text += f", the memory of {first}"
        if value.requires_grad:
            yield name, Fact(f"{text}, requires grad", id(value))
        else:
            yield name, Fact(text)
    elif hasattr(value, "__array_interface__"):
        yield name, Fact(f"array {shape_text(value.dtype, value.shape)}")
    else:
        yield name, _constant(value)


def _constant(value: Any) -> Fact:
    text = repr(value)
    return Fact(text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…", text)


def _name(value: Any) -> Fact:
    if value is _C.graphs.ABSENT:
        return Fact("not bound")
    if type(value) in _PLAIN:
        return _constant(value)
    return Fact(f"an object of {type(value).__name__}", id(value))


def shape_text(dtype: Any, shape: Any) -> str:
    """A tensor's kind: float32[2, 3]."""
    return f"{str(dtype).rsplit('.', 1)[-1]}[{', '.join(map(str, shape))}]"


def _modes() -> Iterator[tuple[str, Fact]]:
    yield "gradient recording", Fact("on" if vt.is_grad_enabled() else "off")
    yield "inference mode", Fact("on" if vt.is_inference_mode_enabled() else "off")
    deterministic = vt.are_deterministic_algorithms_enabled()
    yield "deterministic algorithms", Fact("on" if deterministic else "off")
    for device in ("cpu", "cuda"):
        enabled = vt.is_autocast_enabled(device)
        text = f"to {_short(vt.get_autocast_dtype(device))}" if enabled else "off"
        yield f"autocast on {device}", Fact(text)
    yield "switched on for kernels", Fact(", ".join(_C._kernel_switches_on()) or "nothing")
    yield "the default dtype", Fact(_short(vt.get_default_dtype()))


def _short(dtype: Any) -> str:
    return str(dtype).rsplit(".", 1)[-1]


def _options(name: str, optimizer: Any, session: Any) -> Iterator[tuple[str, Fact]]:
    for index, group in enumerate(optimizer.param_groups):
        live = session.live_options(group)
        for key, value in group.items():
            if key in _NO_OPTIONS or isinstance(value, vt.Tensor):
                continue
            if key in live:  # a momentum that replays read, alone or as the first of two betas
                if not isinstance(value, tuple):
                    continue
                value = value[1:]
            yield f"{key} of {name}, group {index},", Fact(repr(value))


def first_change(before: Recording, after: Recording, data: Collection[Buffer] = ()) -> str | None:
    """The first op in which two recordings part; None if each op is the same.

    data: buffers whose values may differ, as inputs do; other single numbers are compared."""
    first, second = before.tape.ops, after.tape.ops
    for at, (old, new) in enumerate(zip(first, second)):
        if old.name != new.name:
            return f"op {at} {old.name} has become {new.name}{_line(new)}"
        change = _change(old, new) or _number(old, new, before, after, data)
        if change is not None:
            return f"op {at} {new.name} {change}{_line(new)}"
    if len(first) == len(second):
        return None
    common = min(len(first), len(second))
    longer, verb = (first, "has gone") if len(first) > len(second) else (second, "has come")
    op = longer[common]
    return f"op {common} {op.name} {verb}{_line(op)}"


def _number(
    old: Op, new: Op, before: Recording, after: Recording, data: Collection[Buffer]
) -> str | None:
    """A number that Python gave to the op, and that is another one now."""
    for x, y in zip(old.reads(), new.reads()):
        if x.sizes or x.buffer in data or y.buffer in data:
            continue
        if x.buffer.role == y.buffer.role == "state":
            one, other = before.memory(x.buffer), after.memory(y.buffer)
            if one.numel() == other.numel() == 1 and one.data_ptr() != other.data_ptr():
                a, b = one.item(), other.item()
                if _differs(a, b):
                    return f"{a!r}→{b!r}"
    return None


def _line(op: Op) -> str:
    return f", {op.source}" if op.source else ""


def _change(old: Op, new: Op) -> str | None:
    for x, y in zip((*old.reads(), *old.writes()), (*new.reads(), *new.writes())):
        if (change := _view_change(x, y)) is not None:
            return change
    for index, (x, y) in enumerate(zip(old.args, new.args)):
        if _differs(x, y):
            return f"argument {index} {_arg(x)}→{_arg(y)}"
    return None


def _view_change(x: View, y: View) -> str | None:
    if x.dtype != y.dtype:
        return f"{_short(x.dtype)}→{_short(y.dtype)}"
    if x.sizes != y.sizes:
        changed = [(a, b) for a, b in zip(x.sizes, y.sizes) if a != b]
        if len(x.sizes) == len(y.sizes) and len(set(changed)) == 1:
            return f"{changed[0][0]}→{changed[0][1]}"
        return f"{list(x.sizes)}→{list(y.sizes)}"
    if x.strides != y.strides:
        return f"strides {list(x.strides)}→{list(y.strides)}"
    if x.buffer.device != y.buffer.device:
        return f"{x.buffer.device}→{y.buffer.device}"
    return None


def _arg(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_arg, value)) + "]"
    return str(value) if isinstance(value, View) else repr(value)


def _differs(x: Any, y: Any) -> bool:
    """Whether two arguments differ otherwise than in the geometry of tensors."""
    if isinstance(x, View) and isinstance(y, View):
        return False
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) != len(y) or any(map(_differs, x, y))
    return type(x) is not type(y) or (x != y and not (x != x and y != y))
