"""The base of every optimizer: parameter groups, per-parameter state, hooks, state dicts."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch import _recording
from vibetensor.torch.optim.step_plan import Bucket, StepPlan
from vibetensor.torch.utils.hooks import RemovableHandle
from vibetensor.torch.utils.registry import Registry, StateTable

_global_pre_hooks: OrderedDict[int, Callable] = OrderedDict()
_global_post_hooks: OrderedDict[int, Callable] = OrderedDict()
# See observed_steps; no hooks, so that nobody takes them for the program's.
_step_observers: tuple[tuple[Callable, Callable], ...] = ()
_observing = threading.Lock()


class _Required:
    """Marks a default that every parameter group must give."""

    def __repr__(self) -> str:
        return "<required parameter>"


required = _Required()


def register_optimizer_step_pre_hook(hook: Callable) -> RemovableHandle:
    """Runs ``hook(optimizer, args, kwargs)`` before ``step`` of every optimizer."""
    return _register(_global_pre_hooks, hook)


def register_optimizer_step_post_hook(hook: Callable) -> RemovableHandle:
    """Runs ``hook(optimizer, args, kwargs)`` after ``step`` of every optimizer."""
    return _register(_global_post_hooks, hook)


@contextlib.contextmanager
def observed_steps(before: Callable, after: Callable) -> Iterator[None]:
    """Meanwhile calls ``before(optimizer, args, kwargs)`` and ``after`` around every step."""
    global _step_observers
    observer = (before, after)
    with _observing:
        _step_observers = (*_step_observers, observer)
    try:
        yield
    finally:
        with _observing:
            _step_observers = tuple(o for o in _step_observers if o is not observer)


def _register(hooks: OrderedDict, hook: Callable, prepend: bool = False) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    if prepend:
        hooks.move_to_end(handle.id, last=False)
    return handle


def _with_step_hooks(step: Callable) -> Callable:
    """Wraps a class's ``step`` so that hooks run around it; without hooks it costs one test."""

    @functools.wraps(step)
    def hooked(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        pre, post = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        observers = _step_observers
        if not (pre or post or _global_pre_hooks or _global_post_hooks or observers):
            return step(self, *args, **kwargs)
        if getattr(type(self), "step", None) is not hooked:
            return step(self, *args, **kwargs)  # a subclass's super().step(): hooks run once
        args = (self, *args)  # as hooks get and give them
        before = [before for before, _ in observers]
        for hook in chain(_global_pre_hooks.values(), before, pre.values()):
            result = hook(self, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(
                        f"{step} must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {result}."
                    )
                args, kwargs = result
        out = step(*args, **kwargs)
        after = [after for _, after in observers]
        for hook in chain(post.values(), after, _global_post_hooks.values()):
            hook(self, args, kwargs)
        return out

    hooked.hooked = True  # type: ignore[attr-defined]
    return hooked


def _type_name(value: Any) -> str:
    return value.type() if isinstance(value, torch.Tensor) else type(value).__name__


@contextlib.contextmanager
def unless_found(found_inf: Any, tensors: list[Any]) -> Iterator[None]:
    """Takes back what the body changes of ``tensors`` where found_inf (0-d) is not zero, without a
    look at it on the host."""
    kept = [t.detach().clone() for t in tensors]
    yield
    with torch.no_grad():
        skip = found_inf != 0
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(torch.where(skip.to(tensor.device), before, tensor))


class Optimizer:
    """Base class of optimizers.

    ``params`` is an iterable of tensors, of ``(name, tensor)`` pairs, or of dicts with a
    ``"params"`` entry and options of their own; ``defaults`` are the options of groups that do
    not give them. A subclass writes ``step``; it may build it on ``_buckets``, which sorts the
    parameters that have gradients by device and dtype and keeps the result between steps, or make
    it ``_update_all``, which calls ``_update`` for each of those.
    """

    # In a class whose own ``step`` knows of recordings: it takes ``group["lr"]`` as a 0-d tensor as
    # well, and skips by ``found_inf`` on the device.
    _knows_recordings = False

    def _steps_knowingly(self) -> bool:
        """Whether the class that defines ``step`` knows of recordings; a subclass may not."""
        steps = next(c for c in type(self).__mro__ if "step" in c.__dict__)
        return bool(steps.__dict__.get("_knows_recordings"))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            cls.step = _with_step_hooks(cls.__dict__["step"])  # type: ignore[method-assign]

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self._init_hooks()
        if isinstance(params, torch.Tensor):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or "
                f"dicts, but got {_type_name(params)}"
            )
        self.state: defaultdict[Any, Any] = StateTable()
        self.param_groups: list[dict[str, Any]] = []
        groups = list(params)
        if not groups:
            raise ValueError("optimizer got an empty parameter list")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def _init_hooks(self) -> None:
        self._plans: dict[int, StepPlan] = {}
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable] = OrderedDict()
        self._optimizer_state_dict_pre_hooks: OrderedDict[int, Callable] = OrderedDict()
        self._optimizer_state_dict_post_hooks: OrderedDict[int, Callable] = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks: OrderedDict[int, Callable] = OrderedDict()
        self._optimizer_load_state_dict_post_hooks: OrderedDict[int, Callable] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if type(self.state) is not StateTable:
            self.state = StateTable(self.state)
        if "_optimizer_step_pre_hooks" not in self.__dict__:
            self._init_hooks()
        self._plans = {}
        self.defaults.setdefault("differentiable", False)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}" if i == 0 else f"\nParameter Group {i}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])

    # Parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options that it leaves out come from ``defaults``.

        Raises TypeError for things that are not leaf tensors in an ordered collection and
        ValueError for a parameter that another group already holds.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        elif isinstance(params, set):
            raise TypeError(
                "optimizer parameters need to be organized in ordered collections, but the "
                "ordering of tensors in sets will change between runs. Please use a list instead."
            )
        params = list(params)
        named = [isinstance(p, tuple) for p in params]
        if any(named):
            if not all(named):
                raise ValueError(
                    "all optimizer params should be with/without names. "
                    "Some param names are missing"
                )
            param_group["param_names"] = [name for name, _ in params]
            params = [param for _, param in params]
        param_group["params"] = params

        differentiable = self.defaults.get("differentiable", None)
        for param in params:
            if not isinstance(param, torch.Tensor):
                raise TypeError(
                    "optimizer can only optimize Tensors, but one of the params is "
                    f"{_type_name(param)}"
                )
            if not differentiable and not (param.is_leaf or param.retains_grad):
                raise ValueError("can't optimize a non-leaf Tensor")
        for name, default in self.defaults.items():
            if default is required and name not in param_group:
                raise ValueError(
                    "parameter group didn't specify a value of required optimization "
                    f"parameter {name}"
                )
            param_group.setdefault(name, default)

        if len({id(p) for p in params}) != len(params):
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters: each copy is "
                "updated once, and this may become an error",
                stacklevel=3,
            )
        taken = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in taken for p in params):
            raise ValueError("some parameters appear in more than one parameter group")
        if self.param_groups and ("param_names" in self.param_groups[0]) != (
            "param_names" in param_group
        ):
            raise ValueError(
                "all optimizer param groups should be with/without names. "
                f"cannot add param group with names {param_group.get('param_names')} to the "
                "optimizer"
            )
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of all parameters, or with ``set_to_none=False`` zeroes them."""
        for group in self.param_groups:
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    if p.grad.grad_fn is not None:
                        p.grad.detach_()
                    else:
                        p.grad.requires_grad_(False)
                    p.grad.zero_()

    # Steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters once; ``closure`` recomputes the loss and its gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not implement step()")

    def _update_all(self, closure: Callable[[], Any] | None) -> Any:
        """A step by `_update`: of every group's buckets, after the closure, whose loss it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            for index, group in enumerate(self.param_groups):
                for bucket, grads in self._buckets(index, group):
                    self._update(group, bucket, grads)
        return loss

    def _update(self, group: dict[str, Any], bucket: Bucket, grads: list[Any]) -> None:
        """Updates the bucket's parameters by `grads`, where ``step`` is `_update_all`."""
        raise NotImplementedError

    def _init_state(self, group: dict[str, Any], param: Any) -> None:
        """Fills ``self.state[param]`` at the first step of a parameter."""

    def _make_state(self, group: dict[str, Any], param: Any) -> None:
        """`_init_state`, whose values a dry recording needs for real."""
        if _recording.recording() != "dry":
            self._init_state(group, param)
            return
        state = self.state
        empty = state.get(param)
        _recording.undo_with(lambda: state.pop(param, None) if empty is None else empty.clear())
        with _recording.outside():
            self._init_state(group, param)

    def _buckets(self, index: int, group: dict[str, Any]) -> list[tuple[Bucket, list[Any]]]:
        """The group's parameters that have gradients, by device and dtype, with the gradients."""
        params = group["params"]
        grads = [p.grad for p in params]
        plan = self._plans.get(index)
        if plan is None or not plan.still_holds(params, grads, self.state):
            for p, grad in zip(params, grads, strict=True):
                if grad is not None and not self.state.get(p):
                    self._make_state(group, p)
            plan = self._plans[index] = StepPlan(params, grads, self.state)
        return plan.with_grads(grads)

    def _bring_steps(self, bucket: Bucket) -> None:
        """Step counts to where the parameters are: a recording of one device counts there."""
        for param, state in zip(bucket.params, bucket.states, strict=True):
            step = state["step"]
            if step.device != param.device:
                with _recording.outside():
                    state["step"] = step.to(param.device)
                _recording.undo_with(lambda s=state, step=step: s.update(step=step))

    def _run_plain(
        self, grads: list[Any], changed: list[Any], update: Callable[[list[Any]], Any]
    ) -> Any:
        """``update(grads)``, with the part of a GradScaler that fused updates do themselves:
        unscaled gradients, and nothing where an overflow skips the step.

        changed: the tensors that the update writes. A recording cannot read found_inf: there the
        update runs, and those tensors go back to what they were where it says so.
        """
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if found_inf is not None and not _recording.recording() and float(found_inf):
            return None
        if grad_scale is not None:
            grads = [grad / grad_scale for grad in grads]
        if found_inf is None or not _recording.recording():
            return update(grads)
        with unless_found(found_inf, changed):
            return update(grads)

    def register_step_pre_hook(self, hook: Callable) -> RemovableHandle:
        """``hook(optimizer, args, kwargs)`` runs before each step; it may return new ones."""
        return _register(self._optimizer_step_pre_hooks, hook)

    def register_step_post_hook(self, hook: Callable) -> RemovableHandle:
        """``hook(optimizer, args, kwargs)`` runs after each step."""
        return _register(self._optimizer_step_post_hooks, hook)

    # State dicts

    def register_state_dict_pre_hook(self, hook: Callable, prepend: bool = False):
        """``hook(optimizer)`` runs before ``state_dict``."""
        return _register(self._optimizer_state_dict_pre_hooks, hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable, prepend: bool = False):
        """``hook(optimizer, state_dict)`` runs after ``state_dict``; it may return another."""
        return _register(self._optimizer_state_dict_post_hooks, hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable, prepend: bool = False):
        """``hook(optimizer, state_dict)`` runs before loading; it may return another."""
        return _register(self._optimizer_load_state_dict_pre_hooks, hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable, prepend: bool = False):
        """``hook(optimizer)`` runs after loading."""
        return _register(self._optimizer_load_state_dict_post_hooks, hook, prepend)

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {index: state}, "param_groups": [...]}``, parameters as running indices.

        The tensors inside are the optimizer's own, not copies.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        index: dict[int, int] = {}
        packed_groups = []
        for group in self.param_groups:
            for p in group["params"]:
                index.setdefault(id(p), len(index))
            packed = {key: value for key, value in group.items() if key != "params"}
            packed["params"] = [index[id(p)] for p in group["params"]]
            packed_groups.append(packed)
        state = {
            # Plain dictionaries: what is saved must not depend on this library.
            index[id(key)] if isinstance(key, torch.Tensor) else key: (
                dict(value) if type(value) is Registry else value
            )
            for key, value in self.state.items()
        }
        result = {"state": state, "param_groups": packed_groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, result)
            if replaced is not None:
                result = replaced
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a ``state_dict``.

        State tensors are moved to their parameter's device and, for floating-point parameters,
        cast to its dtype; ``step`` stays float32 where it is (it moves along for ``capturable``
        and ``fused`` groups). Raises ValueError when the groups do not match.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of "
                    "optimizer's group"
                )
        owner = {}
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            owner.update(
                (k, (p, saved)) for k, p in zip(saved["params"], group["params"], strict=True)
            )
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])

        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, value in state_dict["state"].items():
            if key in owner:
                param, saved = owner[key]
                state[param] = _cast_state(value, param, saved)
            else:
                state[key] = value
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def _cast_state(value: Any, param: Any, group: dict[str, Any], key: Any = None) -> Any:
    if isinstance(value, torch.Tensor):
        if key == "step":
            if group.get("capturable") or group.get("fused"):
                return value.to(dtype=torch.float32, device=param.device)
            return value
        if param.is_floating_point():
            return value.to(dtype=param.dtype, device=param.device)
        return value.to(device=param.device)
    if isinstance(value, dict):
        return {k: _cast_state(v, param, group, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast_state(v, param, group) for v in value)
    return value
