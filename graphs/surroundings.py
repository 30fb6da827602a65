"""The names that a function finds outside of itself: globals, closures, defaults, and attributes of
its object, of classes and of other objects that a name or a chain of attributes leads to.

A recording has what they were bound to. A `Watch` on them tells whether they still are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import generators
from vibetensor.graphs.loaded_names import loaded_names
from vibetensor.torch.autograd.function import Function
from vibetensor.torch.nn.modules.module import CALL_HOOK_TABLES
from vibetensor.torch.optim.lr_scheduler.base import LRScheduler

_NOTHING: frozenset[Any] = frozenset()
_MISSING = object()
_PLAIN = (bool, int, float, str, bytes, type(None))
_LIBRARY = vt.__name__.partition(".")[0]
_PYTHON = sys.stdlib_module_names - {"test"}  # a name that programs have, too

# What an autograd.Function runs for `apply` and in backward.
_OF_FUNCTIONS = ("forward", "setup_context", "backward", "vjp")


class Surroundings:
    """What the names that a function and those that it calls refer to are bound to now.

    Of modules of `vibetensor.torch.nn` the forwards and hooks are followed, and their attributes are
    not noted: whoever records sees which of them are read, and tells what no name leads to with
    `met` and `read`. What this library, NumPy and Python's own refer to themselves stays as it is.
    """

    def __init__(self, function: Any, arguments: Iterable[Any] = ()) -> None:
        self._names = _Names()
        self._visit = _Visit(self._names)
        self.met(function, *arguments)
        self._names.running = True

    def met(self, *found: Any) -> None:
        """What runs: the function, and modules and optimizers that come out of a list, say."""
        for value in found:
            self._visit.value(value)
        self._visit.follow()

    def read(self, module: Any, name: str) -> None:
        """A method of a module that somebody is about to call."""
        self._visit.method_of(module, name)
        self._visit.follow()

    def drawn_from(self) -> str:
        """A generator of random numbers that has moved meanwhile, in words; empty for none."""
        for owner, before in self._names.generators.values():
            if generators.place(owner) != before:
                return f"a {type(owner).__name__} of its own"
        return ""

    def watch(self, watch: Any) -> dict[str, Any]:
        """Adds those that are still the same to a Watch: others the function sets itself. Returns
        them by name."""
        return self._names.watch(watch)


class _Names:
    """Names, and what they were bound to when they were found."""

    def __init__(self) -> None:
        # By owner: a dictionary's entries, or attributes.
        self._items: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._attributes: dict[tuple[int, str], tuple[Any, str, Any, str]] = {}
        self.running = False  # the function is
        self.generators: dict[int, tuple[Any, bytes]] = {}  # of random numbers, where they were

    def add_generator(self, found: Any) -> None:
        """Notes where it is, if it is one."""
        if id(found) not in self.generators and (at := generators.place(found)) is not None:
            self.generators[id(found)] = found, at

    def add_item(self, owner: dict[str, Any], name: str, value: Any) -> None:
        """An entry; ABSENT where there is none."""
        self._items.setdefault(id(owner), (owner, {}))[1].setdefault(name, self._noted(value))

    def add_attribute(self, owner: Any, name: str, value: Any, shown: str) -> None:
        """What only getattr finds."""
        self._attributes.setdefault((id(owner), name), (owner, name, self._noted(value), shown))

    def _noted(self, value: Any) -> Any:
        """The value; of one that the run may have made only which one it is, as it must be free to
        go."""
        plain = not self.running or value is _C.graphs.ABSENT or type(value) in _PLAIN
        return value if plain else _Which(id(value))

    def watch(self, watch: Any) -> dict[str, Any]:
        """See `Surroundings`."""
        watched: dict[str, Any] = {}
        for owner, noted in self._items.values():
            found = {name: _same(x, owner.get(name)) for name, x in noted.items()}
            kept = found if _holds("add_items", owner, found, _NOTHING, False) else {}
            for name, value in () if kept else found.items():
                if _holds("add_items", owner, {name: value}, _NOTHING, False):
                    kept[name] = value
            watch.add_items(owner, kept, _NOTHING, False)
            watched.update(kept)
        for owner, name, noted, shown in self._attributes.values():
            value = _same(noted, getattr(owner, name, None))
            if _holds("add_attribute", owner, name, value):
                watch.add_attribute(owner, name, value)
                watched[shown] = value
        return watched


def of_class(kind: type, name: str) -> Any:
    """A class's attribute. What is made anew each time (a class method) is as good as absent."""
    held = getattr(kind, name, _C.graphs.ABSENT)
    return held if held is getattr(kind, name, _C.graphs.ABSENT) else _C.graphs.ABSENT


@dataclass
class _Which:
    """A value by its id."""

    id: int


def _same(noted: Any, now: Any) -> Any:
    """What was noted; now if it is that."""
    return now if isinstance(noted, _Which) and noted.id == id(now) else noted


def _holds(kind: str, *what: Any) -> bool:
    watch = _C.graphs.Watch()
    getattr(watch, kind)(*what)
    return watch.holds()


class _Visit:
    def __init__(self, found: _Names) -> None:
        self._found = found
        self._seen: set[Any] = set()
        self._kept: list[Any] = []  # what ids in `_seen` are of
        self._open: list[tuple[types.FunctionType, dict[str, Any]]] = []

    def value(self, found: Any) -> None:
        """Whatever a name may lead to: what it runs when it is called."""
        self._found.add_generator(found)
        if isinstance(found, types.FunctionType):
            self._enqueue(found)
        elif isinstance(found, types.BuiltinMethodType):
            self._found.add_generator(found.__self__)
        elif isinstance(found, types.MethodType):
            self._callable(found.__func__, (found.__self__,), {})
            self.value(found.__self__)
        elif isinstance(found, functools.partial):
            self._callable(found.func, found.args, found.keywords)
            for value in (*found.args, *found.keywords.values()):
                self.value(value)
        elif isinstance(found, vt.nn.Module):
            self._module(found)
        elif isinstance(found, vt.optim.Optimizer):
            self._enqueue(_static(type(found), "step"), found)
            for table in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
                self._hooks(found, table)
        elif isinstance(found, type) and issubclass(found, Function):
            if self._first("class", found):
                for name in _OF_FUNCTIONS:
                    self.value(self._descriptor(found, None, name, _static(found, name)))
        elif not isinstance(found, type) and not is_fixed(type(found).__module__):
            if isinstance(run := _static(type(found), "__call__"), types.FunctionType):
                self._enqueue(run, found)
        elif wrapped := getattr(found, "__wrapped__", None) if callable(found) else None:
            self._callable(wrapped, (), {})  # of functools.lru_cache, say

    def _module(self, module: Any) -> None:
        """A module and those in it; without its methods, whose reads would be the function's."""
        if not self._first("module", module):
            return
        fields = vars(module)
        if (forward := fields.get("forward")) is None:
            self._enqueue(type(module).forward, module)
        else:
            self.value(forward)
        for table in CALL_HOOK_TABLES:
            self._hooks(module, table)
        for child in fields.get("_modules", {}).values():
            if isinstance(child, vt.nn.Module):
                self._module(child)

    def _hooks(self, owner: Any, table: str) -> None:
        for hook in [*(vars(owner).get(table) or {}).values()]:
            self._callable(hook, (owner,), {})

    def method_of(self, module: Any, name: str) -> None:
        """A method or property of a module's class."""
        held = _static(type(module), name)
        if held is not _MISSING and not is_fixed(_defined_in(type(module), name)):
            self._method(module, held)

    def follow(self) -> None:
        """Looks at what has been found, and at what that leads to."""
        while self._open:
            function, bound = self._open.pop()
            closure = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
            once = self._first("function", function)
            if once:
                self._defaults(function)
            for path in loaded_names(function.__code__):
                if path[0] == "global":
                    if once:
                        self._global(function, path[1:])
                elif path[0] == "super":
                    self._super(function, closure, bound, path[1:])
                elif path[1] in bound:
                    self._attributes(bound[path[1]], path[2:])
                elif once and path[1] in closure:
                    self._cell(path[1], closure[path[1]], path[2:])

    def _first(self, kind: str, found: Any) -> bool:
        if (kind, id(found)) in self._seen:
            return False
        self._seen.add((kind, id(found)))
        self._kept.append(found)
        return True

    def _callable(self, function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if isinstance(function, types.FunctionType):
            self._enqueue(function, *args, **named)
        else:
            self.value(function)

    def _enqueue(self, function: Any, *args: Any, **named: Any) -> None:
        """args, named: arguments that the function is known to be called with."""
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or is_fixed(function.__module__):
            return
        key = (id(function), *map(id, args), *((name, id(value)) for name, value in named.items()))
        if key in self._seen:
            return
        self._seen.add(key)
        values = (*args, *named.values())
        self._kept += (function, *(x for x in values if not isinstance(x, vt.Tensor)))
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        bound = dict(zip(reversed(names), reversed(function.__defaults__ or ())))
        bound.update(function.__kwdefaults__ or {}, **named)
        bound.update(zip(names, args))
        self._open.append((function, bound))
        for wrapped in _wrapped(function):
            self._enqueue(wrapped, *args, **named)

    def _defaults(self, function: types.FunctionType) -> None:
        if function.__defaults__ is not None:
            shown = f"{function.__name__}.__defaults__"
            self._found.add_attribute(function, "__defaults__", function.__defaults__, shown)
        for name, value in (function.__kwdefaults__ or {}).items():
            self._found.add_item(function.__kwdefaults__, name, value)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.value(value)

    def _global(self, function: types.FunctionType, path: tuple[str, ...]) -> None:
        value = function.__globals__.get(path[0], _MISSING)
        if value is not _MISSING:
            self._found.add_item(function.__globals__, path[0], value)
            self._attributes(value, path[1:])

    def _cell(self, name: str, cell: Any, path: tuple[str, ...]) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # not bound yet
            return
        self._found.add_attribute(cell, "cell_contents", value, name)
        self._attributes(value, path)

    def _super(
        self, function: Any, closure: dict[str, Any], bound: dict[str, Any], path: tuple[str, ...]
    ) -> None:
        names = function.__code__.co_varnames
        if not names or names[0] not in bound or "__class__" not in closure:
            return
        owner = bound[names[0]]
        order = (owner if isinstance(owner, type) else type(owner)).__mro__
        kind = closure["__class__"].cell_contents
        if kind in order:
            for base in order[order.index(kind) + 1 :]:
                if path[0] in vars(base):
                    self._descriptor(base, owner, path[0], vars(base)[path[0]])
                    return

    def _attributes(self, owner: Any, path: tuple[str, ...]) -> None:
        """What is found at the end of a chain of attributes."""
        for name in path:
            owner = self._attribute(owner, name)
            if owner is _MISSING:
                return
        self.value(owner)

    def _attribute(self, owner: Any, name: str) -> Any:
        """An attribute's value as far as it can be told without running code."""
        self._found.add_generator(owner)
        if name == "__class__" and not isinstance(owner, vt.Tensor | type):
            self._found.add_attribute(owner, name, type(owner), name)
            return type(owner)
        if isinstance(owner, vt.nn.Module):
            return self._of_module(owner, name)
        if isinstance(owner, types.ModuleType):
            value = vars(owner).get(name, _MISSING)
            if value is not _MISSING and not is_fixed(owner.__name__):
                self._found.add_item(vars(owner), name, value)
            return value
        if isinstance(owner, type):
            if issubclass(owner, Function):
                self.value(owner)
            held = _static(owner, name)
            return _MISSING if held is _MISSING else self._descriptor(owner, None, name, held)
        # Schedules step in replays as well, and the library's own objects are seen by whoever records.
        if isinstance(owner, vt.Tensor | LRScheduler) or is_ours(type(owner).__module__):
            return _MISSING
        return self._of_object(owner, name)

    def _of_module(self, module: Any, name: str) -> Any:
        fields = vars(module)
        for held in (fields, *(fields.get(x, {}) for x in ("_modules", "_parameters", "_buffers"))):
            if name in held:
                return held[name]
        held = _static(type(module), name)
        return held if held is _MISSING else self._method(module, held)

    def _of_object(self, owner: Any, name: str) -> Any:
        held = _static(type(owner), name)
        fields = getattr(owner, "__dict__", None)
        if type(fields) is dict and not hasattr(type(held), "__set__"):
            if name in fields:
                self._found.add_item(fields, name, fields[name])
                return fields[name]
            if held is not _MISSING and not is_fixed(_defined_in(type(owner), name)):
                self._found.add_item(fields, name, _C.graphs.ABSENT)
        if held is _MISSING:
            self._enqueue(_static(type(owner), "__getattr__"), owner)
            return _MISSING
        if type(held) is types.MemberDescriptorType:  # one of __slots__
            value = getattr(owner, name, _C.graphs.ABSENT)
            self._found.add_attribute(owner, name, value, name)
            return value
        return self._descriptor(type(owner), owner, name, held)

    def _descriptor(self, kind: type, owner: Any, name: str, held: Any) -> Any:
        """What a class has of a name, for an owner (None for the class itself)."""
        if is_fixed(_defined_in(kind, name)):
            return _MISSING
        value = of_class(kind, name)
        if value is not _C.graphs.ABSENT:
            self._found.add_attribute(kind, name, value, name)
        return self._method(kind if owner is None else owner, held, owner is None)

    def _method(self, owner: Any, held: Any, of_class_itself: bool = False) -> Any:
        if isinstance(held, staticmethod):
            return held.__func__
        if isinstance(held, classmethod):
            self._enqueue(held, owner if isinstance(owner, type) else type(owner))
        elif of_class_itself:
            return held
        elif isinstance(held, types.FunctionType):
            self._enqueue(held, owner)
        elif isinstance(held, property):
            self._enqueue(held.fget, owner)
        elif isinstance(held, functools.cached_property):
            self._enqueue(held.func, owner)
        elif not hasattr(type(held), "__get__"):
            return held
        elif wrapped := getattr(held, "__wrapped__", None):  # a decorated one
            self._enqueue(wrapped, owner)
        else:  # a descriptor of the program's own
            self._enqueue(_static(type(held), "__get__"), held, owner)
        return _MISSING


def _wrapped(function: types.FunctionType) -> Iterator[Any]:
    """What a decorator's function hands its arguments on to: the one that functools.wraps notes, or,
    without it, those in its closure."""
    found = [getattr(function, "__wrapped__", None)]
    if found == [None] and function.__code__.co_flags & inspect.CO_VARARGS:
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not bound yet
                found.append(cell.cell_contents)
    return (value for value in found if isinstance(value, types.FunctionType))


def is_fixed(module: Any) -> bool:
    """Whether a module of this name is of this library, Python's own or NumPy's."""
    root = module.partition(".")[0] if isinstance(module, str) else ""
    return root in (_LIBRARY, "numpy") or root in _PYTHON


def is_ours(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in (_LIBRARY, "numpy")


def _static(kind: type, name: str) -> Any:
    """A class's attribute as it is written there."""
    for base in kind.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return _MISSING


def _defined_in(kind: type, name: str) -> str:
    """The module of the class that has it."""
    for base in kind.__mro__:
        if name in vars(base):
            return base.__module__
    return ""
