"""Context managers and decorators that switch recording on and off for the current thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vibetensor import _C


class _Decorates:
    """Makes a context manager usable as a decorator, of generators too."""

    def _clone(self) -> Any:
        return self.__class__()

    def __enter__(self) -> Any:
        raise NotImplementedError

    def __exit__(self, *exc: object) -> None:
        raise NotImplementedError

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import inspect

        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generator(*args: Any, **kwargs: Any) -> Any:
                running = function(*args, **kwargs)
                try:
                    with self._clone():
                        item = next(running)
                    while True:
                        try:
                            request = yield item
                        except GeneratorExit:
                            with self._clone():
                                running.close()
                            raise
                        except BaseException as error:
                            with self._clone():
                                item = running.throw(error)
                        else:
                            with self._clone():
                                item = running.send(request)
                except StopIteration as stop:
                    return stop.value

            return generator

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._clone():
                return function(*args, **kwargs)

        return wrapped


class no_grad(_Decorates):
    """Ops in the block are not recorded; their results do not require grad."""

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        self = super().__new__(cls)
        return self if function is None else self(function)

    def __enter__(self) -> None:
        self._before = _C.is_grad_enabled()
        _C._set_grad_enabled(False)

    def __exit__(self, *exc: object) -> None:
        _C._set_grad_enabled(self._before)


class enable_grad(_Decorates):
    """Ops in the block are recorded, also inside no_grad."""

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        self = super().__new__(cls)
        return self if function is None else self(function)

    def __enter__(self) -> None:
        self._before = _C.is_grad_enabled()
        _C._set_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        _C._set_grad_enabled(self._before)


class set_grad_enabled(_Decorates):
    """Switches recording at once; as a context manager, for the block only."""

    def __init__(self, mode: bool) -> None:
        self._before = _C.is_grad_enabled()
        self.mode = mode
        _C._set_grad_enabled(mode)

    def _clone(self) -> Any:
        return self.__class__(self.mode)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        _C._set_grad_enabled(self._before)
        return super().__call__(function)

    def __enter__(self) -> None:
        _C._set_grad_enabled(self.mode)

    def __exit__(self, *exc: object) -> None:
        _C._set_grad_enabled(self._before)


class inference_mode(_Decorates):
    """no_grad whose results can never be used in autograd again, and which skips its bookkeeping."""

    def __new__(cls, mode: Any = True) -> Any:
        self = super().__new__(cls)
        if callable(mode):
            self.mode = True
            return self(mode)
        self.mode = bool(mode)
        return self

    def _clone(self) -> Any:
        return self.__class__(self.mode)

    def __enter__(self) -> None:
        self._before = (_C.is_inference_mode_enabled(), _C.is_grad_enabled())
        _C._set_inference_mode(self.mode)
        _C._set_grad_enabled(not self.mode)

    def __exit__(self, *exc: object) -> None:
        _C._set_inference_mode(self._before[0])
        _C._set_grad_enabled(self._before[1])
