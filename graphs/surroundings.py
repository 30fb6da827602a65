"""The names that a function finds outside of itself: globals, closures, attributes of its object.

A recording has what they were bound to. A `Watch` on them tells whether they still are: of
`torch.compile` on all of them, of `capture` on those bound to numbers and other `Constants`.
"""

from __future__ import annotations

import dis
import types
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C

_NOTHING: frozenset[Any] = frozenset()
_PLAIN = (bool, int, float, str, bytes, type(None))
_LIBRARY = vt.__name__.partition(".")[0]


def surroundings(function: Any) -> Any:
    """A Watch on every name that the function, functions it names in turn and forwards of modules
    among them refer to. What the library's own code refers to stays."""
    watch = _C.graphs.Watch()
    _Visit(watch).value(function)
    return watch


class Constants:
    """Plain values (numbers, strings, None) that a function's names are bound to, as they are now."""

    def __init__(self, function: Any) -> None:
        self._items: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._cells: list[tuple[str, Any, Any]] = []
        _Visit(self).value(function)

    def add_items(self, owner: dict[str, Any], found: dict[str, Any], *_: Any) -> None:
        """What a `Watch` is told too."""
        plain = {name: value for name, value in found.items() if type(value) in _PLAIN}
        if plain:
            self._items.append((owner, plain))

    def add_cell(self, name: str, cell: Any, contents: Any) -> None:
        """Of a closure."""
        if type(contents) in _PLAIN:
            self._cells.append((name, cell, contents))

    def watch(self, watch: Any) -> dict[str, Any]:
        """Adds those that are still the same: others the function sets itself. Returns them by name."""
        watched: dict[str, Any] = {}
        for owner, found in self._items:
            same = {name: v for name, v in found.items() if _same(owner.get(name, found), v)}
            watch.add_items(owner, same, _NOTHING, False)
            watched.update(same)
        for name, cell, contents in self._cells:
            try:
                same = _same(cell.cell_contents, contents)
            except ValueError:  # unbound by now
                continue
            if same:
                watch.add_attribute(cell, "cell_contents", contents)
                watched[name] = contents
        return watched


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


class _Visit:
    def __init__(self, watch: Any) -> None:
        self._watch = watch
        self._seen: set[int] = set()

    def value(self, found: Any) -> None:
        if isinstance(found, types.MethodType):
            if not isinstance(found.__self__, vt.nn.Module):
                self._fields(found.__self__, found.__func__)
            self.value(found.__func__)
            found = found.__self__
        if isinstance(found, vt.nn.Module):
            for module in found.modules():
                forward = vars(module).get("forward", type(module).forward)
                self.value(getattr(forward, "__func__", forward))
        elif isinstance(found, types.FunctionType) and id(found) not in self._seen:
            self._seen.add(id(found))
            if not found.__module__ or found.__module__.partition(".")[0] != _LIBRARY:
                self._function(found)

    def _function(self, function: types.FunctionType) -> None:
        names = _names(function.__code__, None)
        found = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
        self._watch.add_items(function.__globals__, found, _NOTHING, False)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                contents = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            if isinstance(self._watch, Constants):
                self._watch.add_cell(name, cell, contents)
            else:
                self._watch.add_attribute(cell, "cell_contents", contents)
            self.value(contents)
        for value in found.values():
            self.value(value)

    def _fields(self, owner: Any, function: Any) -> None:
        fields = getattr(owner, "__dict__", None)
        if type(fields) is not dict or not isinstance(function, types.FunctionType):
            return
        code = function.__code__
        if code.co_argcount == 0:
            return
        found = {name: fields[name] for name in _names(code, code.co_varnames[0]) & fields.keys()}
        self._watch.add_items(fields, found, _NOTHING, False)
        for value in found.values():
            self.value(value)


def _names(code: types.CodeType, owner: str | None) -> set[str]:
    """The globals that code and the functions inside it read, or, of `owner`, the attributes.

    Not `co_names`: there the `step` of `optimizer.step()` is one with a global of that name."""
    names: set[str] = set()
    before: Any = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if owner is None:
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.add(instruction.argval)
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and _loads(before, owner):
            names.add(instruction.argval)
        before = instruction
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant, owner)
    return names


def _loads(instruction: Any, variable: str) -> bool:
    """Whether what an instruction leaves on top of the stack is a function's variable."""
    if instruction is None or not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return False
    found = instruction.argval  # two names where an instruction loads two
    return found[-1] == variable if isinstance(found, tuple) else found == variable
