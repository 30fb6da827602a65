"""What captured and compiled methods keep with the objects that they are methods of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

_FIELD = "_captured_methods"
_T = TypeVar("_T")


class _Methods:
    """Those of one object, by the method of its class. Copies of the object, pickled ones too, start
    anew."""

    def __init__(self, instance: Any = None) -> None:
        self.instance = (lambda: None) if instance is None else weakref.ref(instance)
        self.known: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return _Methods, ()


def bound_to(instance: Any, method: Any, name: str, make: Callable[[], _T]) -> _T:
    """What `make` has made of `method` for this object, which keeps it: so both can go. A table
    elsewhere would hold the object by its method. Raises TypeError where the object can keep nothing."""
    fields = getattr(instance, "__dict__", None)
    if fields is None:
        raise TypeError(
            f"{name}: a captured method needs objects with a __dict__, for captures of "
            f"their own; {type(instance).__name__} has none"
        )
    methods = fields.get(_FIELD)
    if methods is None or methods.instance() is not instance:
        methods = fields[_FIELD] = _Methods(instance)
    if method not in methods.known:
        methods.known[method] = make()
    return methods.known[method]
