"""Activation checkpointing: memory for time (Chen et al. 2016, "sublinear memory cost").

A checkpointed region keeps its inputs instead of what its ops saved for backward, and runs again
when backward needs that. Two ways:

- non-reentrant (the default): saved-tensor hooks replace each saved tensor by a placeholder; the
  first one that is unpacked runs the region again under hooks that collect the tensors. Works with
  ``torch.autograd.grad``, keyword arguments, nesting, and outputs of any structure;
  not with ``create_graph=True`` from outside the region, which raises RuntimeError.
- reentrant: the region runs without a graph, and its backward runs it with one.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import vibetensor.torch as torch

__all__ = ["CheckpointError", "checkpoint", "checkpoint_sequential", "noop_context_fn"]


class CheckpointError(RuntimeError):
    """The second run of a region saved other tensors than the first."""


def noop_context_fn() -> tuple[Any, Any]:
    """The default ``context_fn``: nothing around either run."""
    return contextlib.nullcontext(), contextlib.nullcontext()


def checkpoint(
    function: Callable,
    *args: Any,
    use_reentrant: bool | None = False,
    context_fn: Callable[[], tuple[Any, Any]] = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    **kwargs: Any,
) -> Any:
    """``function(*args, **kwargs)``, whose activations are computed again for backward.

    Both runs see the same random numbers (``preserve_rng_state=True``) and autocast state.
    ``context_fn`` gives one context manager for each run. ``determinism_check="default"``
    compares shapes, dtypes and devices of what both runs save and raises CheckpointError where
    they differ (``debug=True`` lists them all); ``"none"`` does not. With ``early_stop`` the
    second run ends once it has what backward needs.
    """
    preserve_rng_state = kwargs.pop("preserve_rng_state", True)
    if determinism_check not in ("default", "none"):
        raise ValueError(
            f"determinism_check should be one of ['default', 'none'], but got {determinism_check}"
        )
    if use_reentrant:
        if kwargs:
            raise ValueError("Unexpected keyword arguments: " + ",".join(kwargs))
        if context_fn is not noop_context_fn or debug:
            raise ValueError(
                "Passing `context_fn` or `debug` is only supported when use_reentrant=False."
            )
        return _reentrant_function().apply(function, preserve_rng_state, *args)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    forward_context, recompute_context = context_fn()
    region = _Region(
        function, args, kwargs, _Surroundings(preserve_rng_state), recompute_context,
        check=determinism_check == "default", verbose=debug, early_stop=early_stop,
    )  # fmt: skip
    with forward_context, region.recording():
        return function(*args, **kwargs)


def checkpoint_sequential(
    functions: Any, segments: int, input: Any, use_reentrant: bool | None = False, **kwargs: Any
) -> Any:
    """Runs a Sequential (or a list of modules) in ``segments`` checkpointed parts.

    The last part is not checkpointed: backward needs it at once.
    """
    preserve_rng_state = kwargs.pop("preserve_rng_state", True)
    if kwargs:
        raise ValueError("Unexpected keyword arguments: " + ",".join(kwargs))
    layers = list(functions.children()) if hasattr(functions, "children") else list(functions)

    def run(start: int, end: int) -> Callable:
        def part(value: Any) -> Any:
            for layer in layers[start:end]:
                value = layer(value)
            return value

        return part

    size = len(layers) // segments
    start = 0
    for _ in range(segments - 1):
        input = checkpoint(
            run(start, start + size),
            input,
            use_reentrant=use_reentrant,
            preserve_rng_state=preserve_rng_state,
        )
        start += size
    return run(start, len(layers))(input)


class _Surroundings:
    """Random state and autocast of the first run, put back around the second."""

    def __init__(self, preserve_rng_state: bool) -> None:
        self._rng = torch.random._states() if preserve_rng_state else None
        mode = torch.amp.autocast_mode
        self._autocast = [
            (kind, mode.is_autocast_enabled(kind), mode.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._rng is not None:
                stack.callback(torch.random._set_states, torch.random._states())
                torch.random._set_states(self._rng)
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.amp.autocast(kind, dtype=dtype, enabled=enabled))
            yield


class _Placeholder:
    """Stands in the graph for the ``index``-th tensor that a region saved.

    Holds the tensor only while the first run lasts: a gradient taken inside the region then needs
    no second run.
    """

    __slots__ = ("__weakref__", "index", "region", "requires_grad", "tensor", "version")

    def __init__(self, region: _Region, index: int, tensor: Any) -> None:
        self.region = region
        self.index = index
        self.tensor = tensor
        self.version = tensor._version
        self.requires_grad = tensor.requires_grad


class _EnoughError(Exception):
    """Ends a second run that has saved all that is needed."""

    def __init__(self, region: _Region) -> None:
        super().__init__()
        self.region = region


class _Recording(threading.local):
    """The innermost region that records, or collects, on this thread."""

    pack: Callable[[Any], Any] | None = None


_recording = _Recording()


def _describe(tensor: Any) -> tuple[tuple[int, ...], str, str]:
    return tuple(tensor.shape), str(tensor.dtype), str(tensor.device)


def _check_version(what: str, tensor: Any, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"{what} a checkpointed region has been modified by an inplace operation: shape "
            f"{list(tensor.shape)}, {tensor.dtype}, version {tensor._version}, expected version "
            f"{version}. It is needed for backward."
        )


class _Input:
    """A tensor argument, kept for the second run.

    Inside another region it is handed to that one's hook, as an op would: else the inner regions
    would hold all that the outer one wants to forget.
    """

    def __init__(self, tensor: Any) -> None:
        self.version = tensor._version
        self.requires_grad = tensor.requires_grad
        pack = _recording.pack
        self.held = tensor if pack is None else pack(tensor)

    def get(self) -> Any:
        if isinstance(self.held, _Placeholder):
            tensor = self.held.region.unpack(self.held)
            return tensor.detach().requires_grad_(self.requires_grad)
        _check_version("an input of", self.held, self.version)
        return self.held


class _Region:
    """One checkpointed call."""

    def __init__(
        self,
        function: Callable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        surroundings: _Surroundings,
        recompute_context: Any,
        *,
        check: bool,
        verbose: bool,
        early_stop: bool,
    ) -> None:
        self.function = function
        self.args = [_keep(value) for value in args]
        self.kwargs = {key: _keep(value) for key, value in kwargs.items()}
        self.surroundings = surroundings
        self.recompute_context = recompute_context
        self.check = check
        self.verbose = verbose
        self.early_stop = early_stop
        self.placeholders: list[weakref.ref[_Placeholder]] = []
        self.saved: list[tuple[tuple[int, ...], str, str]] = []  # what they stand for
        self.collected: dict[int, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        outer = _recording.pack
        _recording.pack = self.pack
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            _recording.pack = outer
            for ref in self.placeholders:
                placeholder = ref()
                if placeholder is not None:
                    placeholder.tensor = None

    def pack(self, tensor: Any) -> _Placeholder:
        placeholder = _Placeholder(self, len(self.saved), tensor)
        self.placeholders.append(weakref.ref(placeholder))
        self.saved.append(_describe(tensor))
        return placeholder

    def unpack(self, placeholder: _Placeholder) -> Any:
        if placeholder.tensor is not None:
            _check_version("a tensor saved in", placeholder.tensor, placeholder.version)
            return placeholder.tensor
        if placeholder.requires_grad and torch.is_grad_enabled():
            # What saved-tensor hooks unpack has no history: the second gradient would lose terms.
            raise RuntimeError(
                "checkpoint: a backward with create_graph=True cannot go through a checkpointed "
                "region; call the function itself where second gradients are needed"
            )
        # Taken out, not looked up: each tensor goes as soon as its node has used it, and a second
        # backward through a retained graph runs the region once more.
        if placeholder.index not in self.collected:
            self._run_again()
        return self.collected.pop(placeholder.index)

    def _run_again(self) -> None:
        collected: dict[int, Any] = {}
        seen: list[tuple[tuple[int, ...], str, str]] = []

        def collect(tensor: Any) -> Any:
            index = len(seen)
            seen.append(_describe(tensor))
            if index >= len(self.saved):
                if self.early_stop:
                    raise _EnoughError(self)
            elif self.placeholders[index]() is not None:
                collected[index] = tensor.detach()
            if self.early_stop and len(seen) == len(self.saved):
                raise _EnoughError(self)
            return tensor

        outer = _recording.pack
        args = [_given(value) for value in self.args]
        kwargs = {key: _given(value) for key, value in self.kwargs.items()}
        _recording.pack = collect
        try:
            with (
                torch.enable_grad(),
                self.surroundings.again(),
                self.recompute_context,
                torch.autograd.graph.saved_tensors_hooks(collect, _as_it_is),
            ):
                self.function(*args, **kwargs)
        except _EnoughError as enough:
            if enough.region is not self:
                raise
        finally:
            _recording.pack = outer
        self._compare(seen)
        self.collected = collected

    def _compare(self, seen: list[tuple[tuple[int, ...], str, str]]) -> None:
        if not self.check:
            return
        message = None
        if len(seen) != len(self.saved):
            message = (
                "A different number of tensors was saved during the original forward and "
                f"recomputation: {len(self.saved)} and {len(seen)}"
            )
        else:
            for i, (first, second) in enumerate(zip(self.saved, seen, strict=True)):
                if first != second:
                    message = (
                        f"Recomputed tensor {i} has different metadata: shape {list(second[0])}, "
                        f"{second[1]} on {second[2]}; in forward shape {list(first[0])}, "
                        f"{first[1]} on {first[2]}"
                    )
                    break
        if message is None:
            return
        if self.verbose:
            message += f"\nforward:       {self.saved}\nrecomputation: {seen}"
        else:
            message += ". Pass debug=True to checkpoint() to list them all"
        raise CheckpointError(f"checkpoint: {message}")


def _as_it_is(tensor: Any) -> Any:
    """Unpacks for a backward inside the region: the only one that uses the second run's graph."""
    return tensor


def _keep(value: Any) -> Any:
    return _Input(value) if isinstance(value, torch.Tensor) else value


def _given(value: Any) -> Any:
    return value.get() if isinstance(value, _Input) else value


_Reentrant: Any = None


def _reentrant_function() -> Any:
    """The autograd.Function of the reentrant way, made when it is first used."""
    global _Reentrant
    if _Reentrant is not None:
        return _Reentrant

    class CheckpointFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
            ctx.function = function
            ctx.surroundings = _Surroundings(preserve_rng_state)
            ctx.others = [None if isinstance(a, torch.Tensor) else a for a in args]
            ctx.is_tensor = [isinstance(a, torch.Tensor) for a in args]
            ctx.save_for_backward(*(a for a in args if isinstance(a, torch.Tensor)))
            with torch.no_grad():
                return function(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch._C._in_backward_for_inputs():
                raise RuntimeError(
                    "checkpoint(..., use_reentrant=True) is incompatible with .grad() and with the "
                    "`inputs` of .backward(): it would add to the .grad of all that the function "
                    "uses. Pass use_reentrant=False"
                )
            tensors = iter(ctx.saved_tensors)
            args = []
            for other, is_tensor in zip(ctx.others, ctx.is_tensor, strict=True):
                if not is_tensor:
                    args.append(other)
                    continue
                tensor = next(tensors)
                args.append(tensor.detach().requires_grad_(tensor.requires_grad))
            with torch.enable_grad(), ctx.surroundings.again():
                outputs = ctx.function(*args)
            if isinstance(outputs, torch.Tensor):
                outputs = (outputs,)
            pairs = [
                (out, grad)
                for out, grad in zip(outputs, grads, strict=True)
                if isinstance(out, torch.Tensor) and out.requires_grad
            ]
            if not pairs:
                raise RuntimeError(
                    "none of output has requires_grad=True, this checkpoint() is not necessary"
                )
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
            return (
                None,
                None,
                *(a.grad if isinstance(a, torch.Tensor) else None for a in args),
            )

    _Reentrant = CheckpointFunction
    return CheckpointFunction
