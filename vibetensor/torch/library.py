"""Ops of one's own (`custom_op`, as in torch), and overrides: replace an op, or see every op in a block.

def traced(original, name, args):
    print(name)
    return original()

handle = override("mul", traced)   # process-wide, until handle.remove()
with Mode(traced): ...             # every op on this thread
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vibetensor import _C
from vibetensor.torch._custom_op import CustomOpDef as CustomOpDef
from vibetensor.torch._custom_op import custom_op as custom_op
from vibetensor.torch._custom_op import register_autograd as register_autograd
from vibetensor.torch._custom_op import register_fake as register_fake
from vibetensor.torch._custom_op import register_kernel as register_kernel

Override = Callable[[Callable[[], Any], str, tuple[Any, ...]], Any]


class _Overrides:
    """What captured steps look at: `token` is another object after every change of the overrides."""

    def __init__(self) -> None:
        self.token = object()

    def set(self, op: str, function: Override | None) -> None:
        _C._set_override(op, function)
        self.token = object()


overrides = _Overrides()


class OverrideHandle:
    """Undoes override() on remove() or at the end of a `with` block."""

    def __init__(self, op: str) -> None:
        self._op = op

    def remove(self) -> None:
        """Restores the original op."""
        overrides.set(self._op, None)

    def __enter__(self) -> OverrideHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def override(op: str, function: Override) -> OverrideHandle:
    """Calls `function(original, name, args)` instead of op `op` (a name of the op table, e.g. "sum.dim").

    `original()` runs the op with the arguments it was given; inside the function the op itself is
    not overridden. Raises ValueError for a name that is not in the table.
    """
    overrides.set(op, function)
    return OverrideHandle(op)


class Mode:
    """Calls `function(original, name, args)` for every op that runs on this thread in the block."""

    def __init__(self, function: Override) -> None:
        self._function = function

    def __enter__(self) -> Mode:
        _C._push_mode(self._function)
        return self

    def __exit__(self, *exc: object) -> None:
        _C._pop_mode()


def infer_schema(
    prototype_function: Callable[..., Any], /, *, mutates_args: Iterable[str] = ()
) -> str:
    """The schema that `custom_op` reads off a function's annotations."""
    from vibetensor.torch._custom_op_schema import infer

    return str(infer(prototype_function, tuple(mutates_args)))


def ops() -> list[tuple[str, str]]:
    """Every op of the table with its capture class."""
    return _C._op_names()
