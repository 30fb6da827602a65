"""Handles of registered hooks, shared by tensors, modules and optimizers."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any


class RemovableHandle:
    """Takes a hook out again: ``handle.remove()``, or at the end of ``with handle:``.

    Holds the hook dictionaries weakly, so that a handle never keeps its owner alive. ``id`` is
    the hook's key in ``hooks_dict``; keys grow, so hooks run in the order they came.
    """

    next_id = 0

    def __init__(self, hooks_dict: MutableMapping[int, Any], *, extra_dict: Any = None) -> None:
        self.id = RemovableHandle.next_id
        RemovableHandle.next_id += 1
        self.hooks_dict_ref = weakref.ref(hooks_dict)
        extra = () if extra_dict is None else extra_dict
        if not isinstance(extra, (list, tuple)):
            extra = (extra,)
        self.extra_dict_ref = tuple(weakref.ref(d) for d in extra)

    def remove(self) -> None:
        """Removes the hook; a second call, or one after the owner died, does nothing."""
        for ref in (self.hooks_dict_ref, *self.extra_dict_ref):
            hooks = ref()
            if hooks is not None:
                hooks.pop(self.id, None)

    def __getstate__(self) -> tuple[Any, int]:
        return self.hooks_dict_ref(), self.id

    def __setstate__(self, state: tuple[Any, int]) -> None:
        from collections import OrderedDict

        hooks, self.id = state
        # A pickled handle may outlive its owner; it then points at a dictionary of its own.
        self.hooks_dict_ref = weakref.ref(OrderedDict() if hooks is None else hooks)
        self.extra_dict_ref = ()
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.id + 1)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()
