"""Dictionaries that count their changes: what a module registers, its hooks, an optimizer's state.

A captured step relies on what they held when it was recorded. With these it need not look
at them again as long as the count of the process (`_C._note_change`) stands still.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from vibetensor._C import _note_change as note_change

_MISSING = object()


def _counted(change: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which is counted even if it fails half way."""

    @functools.wraps(change)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return change(self, *args, **kwargs)
        finally:
            note_change()

    return method


_CHANGES = (
    "__setitem__",
    "__delitem__",
    "__ior__",
    "clear",
    "move_to_end",
    "pop",
    "popitem",
    "setdefault",
    "update",
)


def _counts_changes(kind: type) -> type:
    """The class, with every inherited method that changes a dictionary counted."""
    for name in _CHANGES:
        if name not in vars(kind) and hasattr(kind, name):
            setattr(kind, name, _counted(getattr(kind, name)))
    return kind


@_counts_changes
class Registry(dict):
    """A dict that counts its changes; an item set to what it is already changes nothing."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        same = self.get(key, _MISSING) is value
        dict.__setitem__(self, key, value)
        if not same:
            note_change()


@_counts_changes
class StateTable(defaultdict):
    """An optimizer's state by parameter: counts its changes, as the dictionaries it makes do."""

    def __init__(self, state: Mapping[Any, Any] | None = None) -> None:
        super().__init__(Registry)
        for key, value in (state or {}).items():
            self[key] = Registry(value) if type(value) is dict else value

    def __reduce__(self) -> Any:
        return type(self), (), None, None, iter(self.items())

    def __copy__(self) -> Any:
        return type(self)(self)

    copy = __copy__


@_counts_changes
class HookTable(OrderedDict):
    """Hooks in their order, counting changes."""
