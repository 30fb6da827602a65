"""Python's objects as they were: what a function that only passes leaves in them is taken back.

A dry recording computes nothing, so a tensor that the function keeps, in a module or in an optimizer of
the user's own, would have no values; and what runs after it, the function itself say, is to find
counters and the like as they were.
"""

from __future__ import annotations

import collections
import dis
import functools
import operator
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import vibetensor.torch as vt
from vibetensor.graphs import generators
from vibetensor.graphs.loaded_names import loaded_names
from vibetensor.graphs.surroundings import is_fixed, is_ours
from vibetensor.torch.amp import GradScaler
from vibetensor.torch.optim.lr_scheduler import base as schedules

_LEAVES = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType)
_CACHED = type(functools.lru_cache(lambda: None))
_UNBOUND = object()
_MOST = 100_000  # objects; more are data
_PLAIN = (bool, int, float, complex, str, bytes, vt.device, vt.dtype, vt.memory_format)
#: Captures know themselves what changes in these and in containers of theirs.
_WATCHED = (vt.optim.Optimizer, schedules.LRScheduler, GradScaler)


Same: TypeAlias = Callable[[Any, Any], bool]  # whether two values count as one


@dataclass
class _Kept:
    """One thing as it was. what: for people; empty where a change of it is no effect of Python code."""

    what: str
    changed: Callable[[Same], bool]
    put_back: Callable[[], None]


class ObjectsAsTheyWere:
    """What can be reached from some objects, as it is now: attributes, containers, names, and where
    generators of random numbers are. An iterator goes on from where it has got to."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # held, so that no id comes twice
        self._kept: list[_Kept] = []

    def keep(self, roots: Iterable[Any]) -> None:
        """Notes what can be reached from there, but what has been noted already."""
        open_ = [(value, False) for value in roots]
        while open_ and len(self._seen) < _MOST:
            value, watched = open_.pop()
            if isinstance(value, _LEAVES) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            contained = isinstance(value, dict | list | tuple | set | collections.deque)
            watched = isinstance(value, _WATCHED) or (watched and contained)
            begin = len(self._kept)
            open_.extend((found, watched) for found in self._note(value))
            if watched:
                for kept in self._kept[begin:]:
                    kept.what = ""

    def changed(self) -> str:
        """What is not as it was and nobody else takes care of, for people; empty for nothing."""
        return next((kept.what for kept in self._kept if kept.what and kept.changed(_alike)), "")

    def put_back(self) -> None:
        """All of it as it was."""
        for kept in reversed(self._kept):
            if kept.changed(operator.is_):
                kept.put_back()

    def _keep(
        self, what: str, changed: Callable[[Same], bool], put_back: Callable[[], None]
    ) -> None:
        self._kept.append(_Kept(what, changed, put_back))

    def _note(self, value: Any) -> Iterable[Any]:
        """How to put one object back; what it refers to."""
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, list | collections.deque):
            items = [*value]

            def fill() -> None:
                value.clear()
                value.extend(items)

            self._keep(f"a {type(value).__name__}", lambda same: not _all(same, value, items), fill)
            return items
        if isinstance(value, set):
            members = set(value)
            self._keep("a set", lambda _: value != members, lambda: _refill(value, members))
            return members
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.BuiltinMethodType):  # random.Random().random, say
            return (value.__self__,)
        if (put_back := generators.as_now(value)) is not None:
            self._keep("", lambda _: True, put_back)  # draws are looked for elsewhere
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, _CACHED):
            size = value.cache_info().currsize
            # What it has been told meanwhile is not known by itself.
            self._keep("", lambda _: value.cache_info().currsize != size, value.cache_clear)
            return ()
        return self._object(value)

    def _dict(self, value: dict[Any, Any]) -> Iterable[Any]:
        before = dict(value)

        def fill() -> None:
            value.clear()
            value.update(before)

        self._keep("a dict", lambda same: not _all_items(same, value, before), fill)
        return before.values()

    def _function(self, function: types.FunctionType) -> Iterable[Any]:
        # Not by its __module__, which a wrapper has from what it wraps.
        if is_fixed(function.__globals__.get("__name__")):
            wrapped = getattr(function, "__wrapped__", None)
            return () if wrapped is None else (wrapped,)
        found: list[Any] = [
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
        ]
        names = function.__globals__
        code = function.__code__
        read = {path[1] for path in loaded_names(code) if path[0] == "global"}
        for name in read | _set_names(code):
            held = names.get(name, _UNBOUND)
            self._keep(
                f"the global {name!r}",
                lambda same, name=name, held=held: not same(names.get(name, _UNBOUND), held),
                functools.partial(_bind, names, name, held),
            )
            found.append(held)
        for name, cell in zip(code.co_freevars, function.__closure__ or ()):
            held = _contents(cell)
            self._keep(
                f"the variable {name!r} around it",
                lambda same, cell=cell, held=held: not same(_contents(cell), held),
                functools.partial(_fill_cell, cell, held),
            )
            found.append(held)
        return found

    def _object(self, value: Any) -> Iterable[Any]:
        kind = type(value)
        known = isinstance(value, vt.nn.Module | vt.optim.Optimizer | schedules.LRScheduler)
        if isinstance(value, vt.Tensor):
            return ()
        # What libraries make has state that is not all in attributes, a file or a generator say.
        if not known and is_fixed(kind.__module__) and kind is not types.SimpleNamespace:
            return ()
        found: list[Any] = []
        fields = getattr(value, "__dict__", None)
        if type(fields) is dict:
            found += self._fields(value, fields)
        for base in kind.__mro__:
            slots = "__slots__" in vars(base)  # what an extension's class has may be read-only
            for name, member in vars(base).items():
                if slots and type(member) is types.MemberDescriptorType:
                    held = getattr(value, name, _UNBOUND)
                    self._keep(
                        f"{kind.__name__}.{name}",
                        lambda same, name=name, held=held: (
                            not same(getattr(value, name, _UNBOUND), held)
                        ),
                        functools.partial(_set_slot, value, name, held),
                    )
                    found.append(held)
                elif isinstance(member, types.FunctionType) and not known:
                    found.append(member)
        if known and not is_ours(kind.__module__):
            found += [m for m in vars(kind).values() if isinstance(m, types.FunctionType)]
        return found

    def _fields(self, owner: Any, fields: dict[str, Any]) -> Iterable[Any]:
        before = dict(fields)
        module = isinstance(owner, vt.nn.Module)

        def fill() -> None:
            fields.clear()
            fields.update(before)
            if module:
                vt._C._note_change()

        def noticed(all_: dict[str, Any]) -> dict[str, Any]:
            # The modes that a function sets are set by replays too.
            return {k: v for k, v in all_.items() if k != "training"} if module else all_

        what = f"attributes of {type(owner).__name__}"
        self._keep(what, lambda same: not _all_items(same, noticed(fields), noticed(before)), fill)
        if module:
            self._keep("", lambda same: not _all_items(same, fields, before), fill)
        return before.values()


def _alike(a: Any, b: Any) -> bool:
    """One object, or plain values that are equal, in equal containers too: what a function sets anew at
    each call may be another object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return _all(_alike, a, b)
    if isinstance(a, dict):
        return _all_items(_alike, a, b)
    return isinstance(a, _PLAIN) and a == b


def _all(same: Same, a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = [*a], [*b]
    return len(a) == len(b) and all(map(same, a, b))


def _all_items(same: Same, a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(same(a[key], value) for key, value in b.items())


def _refill(value: set[Any], members: set[Any]) -> None:
    value.clear()
    value.update(members)


def _bind(names: dict[str, Any], name: str, held: Any) -> None:
    if held is _UNBOUND:
        del names[name]
    else:
        names[name] = held


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _UNBOUND


def _fill_cell(cell: Any, held: Any) -> None:
    if held is _UNBOUND:
        del cell.cell_contents
    else:
        cell.cell_contents = held


def _set_slot(owner: Any, name: str, held: Any) -> None:
    if held is _UNBOUND:
        delattr(owner, name)
    else:
        setattr(owner, name, held)


def _set_names(code: types.CodeType) -> set[str]:
    """The globals that code and the functions inside it bind."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _set_names(constant)
    return names
