"""autograd.Function: ops with forward and backward written in Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vibetensor import _C


class FunctionCtx:
    """What forward hands to backward."""

    def __init__(self) -> None:
        self.to_save: tuple[Any, ...] | None = None
        self.dirty_tensors: tuple[Any, ...] | None = None
        self.non_differentiable: tuple[Any, ...] | None = None
        self.materialize_grads = True
        self.needs_input_grad: tuple[bool, ...] = ()
        self._node: int | None = None

    def save_for_backward(self, *tensors: Any) -> None:
        """Keeps tensors for backward, where `saved_tensors` gives them back. Call it once, in forward."""
        self.to_save = tensors

    def mark_dirty(self, *args: Any) -> None:
        """Names inputs that forward changed in place."""
        _check_tensors("mark_dirty", args)
        self.dirty_tensors = args

    def mark_non_differentiable(self, *args: Any) -> None:
        """Names outputs that have no gradient."""
        _check_tensors("mark_non_differentiable", args)
        self.non_differentiable = args

    def set_materialize_grads(self, value: bool) -> None:
        """Whether missing output gradients arrive as zeros (default) or None."""
        self.materialize_grads = value

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What save_for_backward kept. Raises RuntimeError after the graph was freed."""
        if self._node is None:
            return self.to_save or ()
        return _C._function_saved(self._node)


def _check_tensors(method: str, args: tuple[Any, ...]) -> None:
    for i, arg in enumerate(args):
        if not isinstance(arg, _C.Tensor):
            raise RuntimeError(
                f"{method} takes tensors, but argument {i} is of type {type(arg).__name__}"
            )


class Function:
    """Subclass it with static methods `forward(ctx, *args)` (or `forward(*args)` and
    `setup_context(ctx, inputs, output)`) and `backward(ctx, *grad_outputs)`, and call `apply`."""

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Computes the result. Ops inside are not recorded."""
        raise NotImplementedError(
            "You must implement the forward function for custom autograd.Function."
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """Fills ctx when forward does not take it."""
        raise NotImplementedError("setup_context is not implemented.")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """One gradient (or None) per argument of forward."""
        raise NotImplementedError(
            "You must implement either the backward or vjp method for your custom autograd.Function."
        )

    vjp: Any = None
    # Outputs that are inputs, or views of them, must not be changed in place: that would go past
    # backward. Unless who calls the Function sees to it.
    _looks_after_changes = False

    @classmethod
    def _call_forward(cls, ctx: FunctionCtx, args: tuple[Any, ...]) -> Any:
        if cls.setup_context is Function.setup_context:
            return cls.forward(ctx, *args)
        output = cls.forward(*args)
        cls.setup_context(ctx, args, output)
        return output

    @classmethod
    def _call_backward(cls, ctx: FunctionCtx, grads: tuple[Any, ...]) -> Any:
        function = cls.vjp if cls.vjp is not None else cls.backward
        return function(ctx, *grads)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Runs forward and records the call."""
        return _C._apply_function(cls, FunctionCtx(), args)


def once_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that cannot itself be differentiated: using its result in backward is an error."""

    @functools.wraps(function)
    def wrapper(ctx: Any, *args: Any) -> Any:
        before = _C.is_grad_enabled()
        _C._set_grad_enabled(False)
        try:
            outputs = function(ctx, *args)
        finally:
            _C._set_grad_enabled(before)
        needed = before and any(isinstance(a, _C.Tensor) and a.requires_grad for a in args)
        if not needed:
            return outputs
        items = outputs if isinstance(outputs, tuple) else (outputs,)
        wrapped = tuple(_Refuse.apply(*args, o) if isinstance(o, _C.Tensor) else o for o in items)
        return wrapped if isinstance(outputs, tuple) else wrapped[0]

    return wrapper


class _Refuse(Function):
    """Passes its last argument through and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return args[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(
            "trying to differentiate twice a function that was marked with @once_differentiable"
        )
