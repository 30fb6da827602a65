"""The names that a function's bytecode loads, with the attributes that it loads of them."""

from __future__ import annotations

import dis
import types
import weakref
from collections.abc import Iterator
from typing import Any

_known: weakref.WeakKeyDictionary[Any, tuple[tuple[str, ...], ...]]
_known = weakref.WeakKeyDictionary()


def loaded_names(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The names that code and the functions inside it load, with the attributes loaded of them:
    ("global", "config", "width"), ("variable", "self", "scale"), ("super", "step"). `type(self)` is
    ("variable", "self", "__class__")."""
    found = _known.get(code)
    if found is None:
        found = _known[code] = tuple(dict.fromkeys(_loads(code, inner=False)))
    return found


def _loads(code: types.CodeType, inner: bool) -> Iterator[tuple[str, ...]]:
    path: tuple[str, ...] = ()  # what leads to the value on top of the stack
    below: tuple[str, ...] = ()  # and to the one below it
    for instruction in dis.get_instructions(code):
        name, argument = instruction.opname, instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            below, path = path, ("global", argument)
        elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            below, path = path, ("variable", argument)
        elif name.startswith("LOAD_FAST") and not inner:
            # Two names where an instruction loads two.
            last = argument[-1] if isinstance(argument, tuple) else argument
            below, path = path, ("variable", last)
        elif name == "LOAD_SUPER_ATTR":
            path = ("super", argument)
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and path:
            path = (*path, argument)
        elif name in ("CALL", "CALL_FUNCTION") and argument == 0 and path[-1:] == ("super",):
            path = ("super",)
            continue
        elif name in ("CALL", "CALL_FUNCTION") and argument == 1 and below == ("global", "type"):
            path = (*path, "__class__")
        elif name in ("PRECALL", "PUSH_NULL", "CACHE"):
            continue
        else:
            path = below = ()
            continue
        if len(path) > 1:
            yield path
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _loads(constant, inner=True)
