"""Dictionaries that count their changes: what a module registers, and its hooks.

A captured step relies on what the modules held when it was recorded. With these it need not look
at them again as long as the count of the process (`_C._note_change`) stands still.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
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
