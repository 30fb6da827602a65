"""What captured and compiled methods keep with the objects that they are methods of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

_FIELD = "_captured_methods"


class _Methods:
    """Those of one object, by the method of its class. Copies of the object, pickled ones too, start
    anew."""

    def __init__(self, instance: Any = None) -> None:
        self.instance = (lambda: None) if instance is None else weakref.ref(instance)
        self.known: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return _Methods, ()


class Method:
    """Of a wrapper of a function: as a method, each object has one of its own, which the object keeps, so
    that both can go. A table elsewhere would hold the object by its method."""

    _name: str
    _function: Callable[..., Any]

    def _method(self, function: Callable[..., Any]) -> Any:
        """The wrapper of a method of one object."""
        raise NotImplementedError

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        fields = getattr(instance, "__dict__", None)
        if fields is None:
            raise TypeError(
                f"{self._name}: a captured method needs objects with a __dict__, for captures of "
                f"their own; {type(instance).__name__} has none"
            )
        methods = fields.get(_FIELD)
        if methods is None or methods.instance() is not instance:
            methods = fields[_FIELD] = _Methods(instance)
        if self not in methods.known:
            methods.known[self] = self._method(self._function.__get__(instance, owner))
        return methods.known[self]
