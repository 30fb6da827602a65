"""The long way through Module.__call__, taken only where hooks are registered.

Order of a call: forward pre-hooks, the input boundary of the backward hooks, ``forward``, forward
hooks, the output boundary. Global hooks run before the module's own, each in order of
registration.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor
from vibetensor.torch.autograd.function import Function
from vibetensor.torch.utils.hooks import RemovableHandle
from vibetensor.torch.utils.registry import HookTable

# Hooks of every module. `any_global` keeps the straight path at one truth test; registration sets
# it.
global_forward_pre_hooks: OrderedDict[int, Callable[..., Any]] = HookTable()
global_forward_hooks: OrderedDict[int, Callable[..., Any]] = HookTable()
global_forward_hooks_always_called: OrderedDict[int, bool] = OrderedDict()
global_backward_pre_hooks: OrderedDict[int, Callable[..., Any]] = HookTable()
global_backward_hooks: OrderedDict[int, Callable[..., Any]] = HookTable()
CALL_HOOKS_OF_ALL = (
    global_forward_pre_hooks,
    global_forward_hooks,
    global_backward_pre_hooks,
    global_backward_hooks,
)
any_global: list[bool] = []
# See observed_calls; no hooks, so that nobody takes them for the program's.
_call_observers: tuple[Callable[[Any], None], ...] = ()
_registering = threading.Lock()


class _HandleOfAll(RemovableHandle):
    """Of a hook of all modules; with the last one gone they take the straight path again."""

    def remove(self) -> None:
        super().remove()
        with _registering:
            _settle()


def _settle() -> None:
    if not _call_observers and not any(CALL_HOOKS_OF_ALL):
        any_global.clear()


def _register(hooks: OrderedDict[int, Any], hook: Callable[..., Any], **extra: Any) -> Any:
    handle = _HandleOfAll(hooks, **extra)
    with _registering:
        hooks[handle.id] = hook
        any_global[:] = [True]
    return handle


def register_module_forward_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Calls ``hook(module, args)`` before the forward of every module."""
    return _register(global_forward_pre_hooks, hook)


def register_module_forward_hook(
    hook: Callable[..., Any], *, always_call: bool = False
) -> RemovableHandle:
    """Calls ``hook(module, args, output)`` after the forward of every module.

    With ``always_call`` it is also called when that forward raised (with output None).
    """
    handle = _register(global_forward_hooks, hook, extra_dict=global_forward_hooks_always_called)
    if always_call:
        global_forward_hooks_always_called[handle.id] = True
    return handle


def register_module_full_backward_pre_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Calls ``hook(module, grad_output)`` before the backward of every module."""
    return _register(global_backward_pre_hooks, hook)


def register_module_full_backward_hook(hook: Callable[..., Any]) -> RemovableHandle:
    """Calls ``hook(module, grad_input, grad_output)`` after the backward of every module."""
    return _register(global_backward_hooks, hook)


@contextlib.contextmanager
def observed_calls(observe: Callable[[Any], None]) -> Iterator[None]:
    """Meanwhile calls ``observe(module)`` before the forward of every module."""
    global _call_observers
    with _registering:
        _call_observers = (*_call_observers, observe)
        any_global[:] = [True]
    try:
        yield
    finally:
        with _registering:
            _call_observers = tuple(o for o in _call_observers if o is not observe)
            _settle()


def call_with_hooks(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``module.forward(*args, **kwargs)`` with everything registered on it around it."""
    for observe in _call_observers:
        observe(module)
    for hook in list(global_forward_pre_hooks.values()):
        args = _new_args(hook(module, args), args)
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, kwargs)
            if result is None:
                continue
            if not isinstance(result, tuple) or len(result) != 2:
                raise RuntimeError(
                    "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                    f"but got {result}."
                )
            args, kwargs = result
        else:
            args = _new_args(hook(module, args), args)

    boundary = None
    if (
        module._backward_hooks
        or module._backward_pre_hooks
        or global_backward_hooks
        or global_backward_pre_hooks
    ):
        boundary = _BackwardBoundary(module)
        args = boundary.wrap_inputs(args)

    done: set[int] = set()
    try:
        result = module.forward(*args, **kwargs)
        for key, hook in list(global_forward_hooks.items()):
            done.add(key)
            result = _replaced(hook(module, args, result), result)
        for key, hook in list(module._forward_hooks.items()):
            done.add(key)
            if key in module._forward_hooks_with_kwargs:
                result = _replaced(hook(module, args, kwargs, result), result)
            else:
                result = _replaced(hook(module, args, result), result)
        return result if boundary is None else boundary.wrap_outputs(result)
    except Exception:
        _call_after_error(module, args, kwargs, done)
        raise


def _new_args(result: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a pre-hook returned, as arguments: None keeps them, a single value is the only one."""
    if result is None:
        return args
    return result if isinstance(result, tuple) else (result,)


def _replaced(result: Any, before: Any) -> Any:
    return before if result is None else result


def _call_after_error(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], done: set[int]
) -> None:
    """Runs the always_call hooks that have not run; their own errors become warnings."""
    pending = [
        (hook, False)
        for key, hook in global_forward_hooks.items()
        if key in global_forward_hooks_always_called and key not in done
    ] + [
        (hook, key in module._forward_hooks_with_kwargs)
        for key, hook in module._forward_hooks.items()
        if key in module._forward_hooks_always_called and key not in done
    ]
    for hook, with_kwargs in pending:
        try:
            hook(module, args, kwargs, None) if with_kwargs else hook(module, args, None)
        except Exception as error:
            warnings.warn(
                "module forward hook with ``always_call=True`` raised an exception that was "
                f"silenced as another error was raised in forward: {error}",
                stacklevel=4,
            )


class _Boundary(Function):
    """Identity on some tensors; its backward shows their gradients to `visit`, which may replace
    them."""

    _looks_after_changes = True

    @staticmethod
    def forward(ctx: Any, visit: Callable[[tuple[Any, ...]], Any], *tensors: Any) -> Any:
        ctx.visit = visit
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in tensors if not t.is_floating_point()))
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, *ctx.visit(grads))


class _BackwardBoundary:
    """The two ends of one module call: gradients of its outputs come in, of its inputs go out.

    The tape holds this object; it holds the module, and nothing points back.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.pre_hooks = [*global_backward_pre_hooks.values(), *module._backward_pre_hooks.values()]
        self.hooks = [*global_backward_hooks.values(), *module._backward_hooks.values()]
        self.grad_output: tuple[Any, ...] | None = None
        self.inputs: list[int] | None = None
        self.input_count = 0
        # Inputs that need a gradient, as given, with their versions before forward.
        self.originals: list[tuple[int, Any, int]] = []
        self.outputs: list[int] = []
        self.output_count = 0

    def wrap_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Puts the boundary before the tensors of ``args``, if a gradient can reach any."""
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        self.input_count = len(args)
        if not _C.is_grad_enabled() or not any(args[i].requires_grad for i in places):
            return args
        self.inputs = places
        self.originals = [(i, args[i], args[i]._version) for i in places if args[i].requires_grad]
        wrapped = _Boundary.apply(self.visit_inputs, *(args[i] for i in places))
        return _put(args, places, wrapped)

    def wrap_outputs(self, result: Any) -> Any:
        """Puts the boundary behind the tensors of a forward's result: one, or a tuple's.

        Raises RuntimeError if forward changed an input in place.
        """
        self.refuse_changed_inputs()
        if not isinstance(result, (Tensor, tuple)):
            warnings.warn(
                "For backward hooks to be called, module output should be a Tensor or a tuple of "
                f"Tensors but received {type(result)}",
                stacklevel=4,
            )
            return result
        items = result if isinstance(result, tuple) else (result,)
        places = [i for i, a in enumerate(items) if isinstance(a, Tensor) and a.requires_grad]
        if not places:
            return result
        self.outputs, self.output_count = places, len(items)
        wrapped = _put(
            items, places, _Boundary.apply(self.visit_outputs, *(items[i] for i in places))
        )
        if not isinstance(result, tuple):
            return wrapped[0]
        # A named tuple keeps its type.
        return type(result)(*wrapped) if hasattr(result, "_fields") else wrapped

    def refuse_changed_inputs(self) -> None:
        """Forward had an alias of each input, behind the boundary: a change in place has written
        the caller's tensor, but is no part of that tensor's history."""
        originals, self.originals = self.originals, []
        for place, tensor, version in originals:
            if tensor._version != version:
                raise RuntimeError(
                    f"{type(self.module).__name__} changed its input {place} in place, which is not "
                    "possible under a full backward hook: gradients of that input would be wrong. "
                    "Use the module without inplace=True, or give it a clone of the input."
                )

    def visit_outputs(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gradients of the outputs have arrived: the pre-hooks see them, in a full-length tuple."""
        full = _put((None,) * self.output_count, self.outputs, grads)
        for hook in self.pre_hooks:
            full = _checked(hook(self.module, full), full, "backward_pre_hook")
        self.grad_output = full
        if self.inputs is None:
            # No input needs a gradient, so no other boundary will be crossed.
            if self.hooks:
                warnings.warn(
                    f"Full backward hook is firing with the gradients of the outputs alone: no "
                    f"input of {type(self.module).__name__} requires grad.",
                    stacklevel=2,
                )
            nothing = (None,) * self.input_count
            for hook in self.hooks:
                if _replaced(hook(self.module, nothing, full), nothing) is not nothing:
                    raise RuntimeError(
                        "Backward hook for Modules where no input requires gradient should always "
                        "return None or None for all gradients."
                    )
        return tuple(full[i] for i in self.outputs)

    def visit_inputs(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gradients of the inputs are ready: the hooks see both ends and may replace these."""
        assert self.inputs is not None
        full = _put((None,) * self.input_count, self.inputs, grads)
        if self.grad_output is None:
            raise RuntimeError(
                f"Module backward hook for {type(self.module).__name__} is called before the "
                "grad_output one. This happens because the gradient in your forward flows to the "
                "Module's input without passing by the Module's output. Make sure that the output "
                "depends on the input and that the loss is computed based on the output."
            )
        grad_output, self.grad_output = self.grad_output, None
        for hook in self.hooks:
            full = _checked(hook(self.module, full, grad_output), full, "backward_hook")
        return tuple(full[i] for i in self.inputs)


def _put(items: tuple[Any, ...], places: list[int], values: Any) -> tuple[Any, ...]:
    out = list(items)
    for place, value in zip(places, values):
        out[place] = value
    return tuple(out)


def _checked(result: Any, before: tuple[Any, ...], kind: str) -> tuple[Any, ...]:
    """A hook's replacement gradients as a tuple of the right length."""
    if result is None:
        return before
    if not isinstance(result, tuple):
        result = (result,)
    if len(result) != len(before):
        raise RuntimeError(
            f"{kind}: got an incorrect number of gradients: {len(result)}, expected {len(before)}"
        )
    return result
