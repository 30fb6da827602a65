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


class Registry(dict):
    """A dict that counts its changes; an item set to what it is already changes nothing."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        same = self.get(key, _MISSING) is value
        dict.__setitem__(self, key, value)
        if not same:
            note_change()

    __delitem__ = _counted(dict.__delitem__)
    __ior__ = _counted(dict.__ior__)
    clear = _counted(dict.clear)
    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)
    setdefault = _counted(dict.setdefault)
    update = _counted(dict.update)


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
    __setitem__ = _counted(defaultdict.__setitem__)
    __delitem__ = _counted(defaultdict.__delitem__)
    __ior__ = _counted(defaultdict.__ior__)
    clear = _counted(defaultdict.clear)
    pop = _counted(defaultdict.pop)
    popitem = _counted(defaultdict.popitem)
    setdefault = _counted(defaultdict.setdefault)
    update = _counted(defaultdict.update)


class HookTable(OrderedDict):
    """Hooks in their order, counting changes."""

    __setitem__ = _counted(OrderedDict.__setitem__)
    __delitem__ = _counted(OrderedDict.__delitem__)
    __ior__ = _counted(OrderedDict.__ior__)
    clear = _counted(OrderedDict.clear)
    move_to_end = _counted(OrderedDict.move_to_end)
    pop = _counted(OrderedDict.pop)
    popitem = _counted(OrderedDict.popitem)
    setdefault = _counted(OrderedDict.setdefault)
    update = _counted(OrderedDict.update)
