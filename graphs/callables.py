"""``make_graphed_callables``: forwards and backwards captured beforehand, for one shape each."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.arguments import CaptureError, modes
from vibetensor.graphs.capture import itself, qualified_name
from vibetensor.graphs.graph import pool_handle
from vibetensor.graphs.joint import Joint, Pools, Refused, Trains
from vibetensor.graphs.structure import flatten, unflatten


def make_graphed_callables(
    callables: Any,
    sample_args: tuple[Any, ...],
    num_warmup_iters: int = 3,
    allow_unused_input: bool = False,
    pool: Any = None,
) -> Any:
    """Versions of functions or modules that replay their forward and their backward.

    callables: a function, a Module, or a tuple of them. A Module is returned itself, with its
    forward replaced: it replays while `training` is as it was here and runs as it is otherwise.
    Copies and pickles of it have the forward it had before. So do calls in other modes than now
    (autocast, inference mode, the default dtype, switches of ``torch.backends``) run as they are.

    sample_args: a tuple of tensors (or nested containers of them) for one callable, a tuple of such
    tuples for several. Later calls must have the same shapes, dtypes and requires_grad; their values
    are copied.

    num_warmup_iters: accepted for torch's sake; nothing needs to be warm, and the recording runs
    nothing: parameters, buffers and random numbers are as before.

    pool: a handle of a memory pool on the device (``graph_pool_handle()``, another graph's
    ``pool()``), for intermediates; without one the callables share a new one. Not used on the CPU.

    allow_unused_input: False raises if an input or parameter that requires grad has no part in the
    results.

    A call whose history somebody may still go back through keeps its values: a second forward
    before its backward runs as it is. Raises CaptureError for a callable that cannot be captured,
    with the reason, RuntimeError for modules with hooks or buffers that require grad.
    """
    del num_warmup_iters
    if _C.graphs.recording() is not None:
        raise RuntimeError("make_graphed_callables inside a recording: captured steps do not nest")
    single = not isinstance(callables, tuple)
    functions = (callables,) if single else callables
    samples = (sample_args,) if single else sample_args
    if len(functions) != len(samples):
        raise ValueError(
            f"make_graphed_callables: {len(functions)} callables and {len(samples)} sample_args"
        )
    pools = Pools(pool_handle(pool) or (0, 0))
    made = [
        _graphed(f, s, allow_unused_input, pools) for f, s in zip(functions, samples, strict=True)
    ]
    return made[0] if single else tuple(made)


def _check_module(module: vt.nn.Module) -> None:
    if module._backward_hooks or module._forward_hooks or module._forward_pre_hooks:
        raise RuntimeError(
            "Modules must not have hooks registered at the time they are passed. However, "
            "registering hooks on modules after passing them through make_graphed_callables is "
            "allowed."
        )
    if any(buffer.requires_grad for buffer in module.buffers()):
        raise RuntimeError(
            "In any :class:`~torch.nn.Module` passed to :func:`~make_graphed_callables`, only "
            "parameters may be trainable. All buffers must have ``requires_grad=False``."
        )


def _graphed(function: Callable[..., Any], sample: Any, allow_unused: bool, pools: Pools) -> Any:
    if not isinstance(sample, tuple):
        raise TypeError(f"sample_args holds a tuple for each callable, got {type(sample).__name__}")
    if isinstance(function, vt.nn.Module):
        _check_module(function)
        forward = function.forward
        graphed = _Graphed(forward, sample, allow_unused, function, pools)
        function.forward = _Forward(graphed, forward, function)  # type: ignore[method-assign]
        return function
    return _Graphed(function, sample, allow_unused, None, pools)


class _Forward:
    """A module's forward that replays while `training` is as it was. Copies and pickles of the module
    have the forward it had before: a capture is of one module's tensors."""

    def __init__(self, graphed: _Graphed, forward: Callable[..., Any], module: Any) -> None:
        functools.update_wrapper(self, forward)
        self._graphed = graphed
        self._forward = forward
        self._module = module
        self._training = module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._module.training == self._training:
            return self._graphed(*args, **kwargs)
        return self._forward(*args, **kwargs)

    @property
    def captured_forward(self) -> Callable[..., Any]:
        """What it runs, for copies of the module."""
        return self._forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> Any:
        return itself, (self._forward,)


class _Graphed:
    """One callable with its programs. Copies and pickles are the callable itself."""

    def __init__(
        self,
        function: Callable[..., Any],
        sample: tuple[Any, ...],
        allow_unused: bool,
        module: Any,
        pools: Pools,
    ) -> None:
        if module is None:
            functools.update_wrapper(self, function)
        self._pools = pools
        self._function = function
        self._captured_modes = modes()[1:]  # gradients are recorded in any case
        self._name = type(module).__name__ if module else getattr(function, "__name__", "callable")
        self._lock = threading.RLock()
        inputs, self._spec = flatten((sample, {}))
        for value in inputs:
            if not isinstance(value, vt.Tensor):
                raise TypeError(
                    "In the current version of make_graphed_callables, sample_args must be tensors, "
                    f"got {type(value).__name__}"
                )
        self._kinds = _kinds(inputs)
        self._module = module
        self._joint = self._record(inputs)
        if not allow_unused:
            self._check_used(inputs, module)

    def _record(self, inputs: list[Any]) -> Joint:
        structure: list[Any] = []

        def run(values: list[Any]) -> list[Any]:
            args, kwargs = unflatten(self._spec, values)
            results, made = flatten(self._function(*args, **kwargs))
            structure[:] = [made]
            return results

        try:
            with vt.enable_grad():
                joint = Joint(
                    run,
                    inputs,
                    optimize=True,
                    names_of=self._function,
                    outer=self._module,
                    pools=self._pools,
                )
        except (Refused, Trains) as error:
            reason = str(error) or "it runs backward or an optimizer itself: capture the whole step"
            raise CaptureError(f"make_graphed_callables: {self._name}: {reason}") from None
        joint.spec = structure[0]
        return joint

    def _check_used(self, inputs: list[Any], module: Any) -> None:
        used = self._joint.used(inputs)
        parameters = () if module is None else module.parameters()
        for tensor in (*inputs, *parameters):
            if tensor.requires_grad and id(tensor) not in used:
                raise RuntimeError(
                    "One of the differentiated Tensors appears to not have been used in the graph. "
                    "Set allow_unused_input=True if this is the desired behavior."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._function, memo)

    def __reduce__(self) -> Any:
        return qualified_name(self) or (itself, (self._function,))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _C.graphs.recording() is not None or _C.graphs.saved_hooks() or kwargs:
            return self._function(*args, **kwargs)
        if modes()[1:] != self._captured_modes:
            return self._function(*args, **kwargs)
        if not (vt.is_grad_enabled() or not self._joint.differentiable):
            return self._function(*args)
        inputs, spec = flatten((args, {}))
        if spec != self._spec or _kinds(inputs) != self._kinds:
            raise ValueError(
                f"{self._name} was captured for other arguments: "
                f"{_shown(self._kinds)}, called with {_shown(_kinds(inputs))}"
            )
        if not self._lock.acquire(blocking=False):
            return self._function(*args)
        try:
            joint = self._joint
            if not joint.holds() or joint.broken:
                try:
                    joint = self._joint = self._record(inputs)
                except Exception:  # the function's own error, if it is one, comes again
                    return self._function(*args)
            if not (joint.same_course() and joint.free()):
                return self._function(*args)
            return unflatten(joint.spec, joint(inputs))
        finally:
            self._lock.release()


def _kinds(values: list[Any]) -> list[Any]:
    """What a capture is for: shapes and the like, and which arguments are one tensor."""
    first: dict[int, int] = {}
    return [
        (
            (tuple(v.shape), v.dtype, v.device, v.requires_grad, first.setdefault(id(v), at))
            if isinstance(v, vt.Tensor)
            else type(v)
        )
        for at, v in enumerate(values)
    ]


def _shown(kinds: list[Any]) -> str:
    return str([f"{k[1]}{list(k[0])}" if isinstance(k, tuple) else k.__name__ for k in kinds])
