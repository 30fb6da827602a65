"""The base of schedules: who owns the step count, how rates are written, the order of calls."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch._recording import outside
from vibetensor.torch.optim.optimizer import Optimizer


def group_values(optimizer: Optimizer, key: str) -> list[Any]:
    """``group[key]`` of every group; tensors are copied, so that no caller aliases a rate."""
    return [_copied(group[key]) for group in optimizer.param_groups]


def set_group_value(group: dict[str, Any], key: str, value: Any) -> None:
    """Writes ``group[key]``; a tensor there is filled in place, as a captured step reads it."""
    if isinstance(group[key], torch.Tensor):
        if isinstance(value, torch.Tensor):
            group[key].copy_(value.reshape(group[key].shape))
        else:
            group[key].fill_(value)
    else:
        group[key] = value


def per_group(name: str, optimizer: Optimizer, value: Any) -> list[Any]:
    """One value a group from a single one or a list of the right length; tensors are copied, as a
    schedule fills those of the groups in place."""
    if isinstance(value, (list, tuple)):
        if len(value) != len(optimizer.param_groups):
            raise ValueError(
                f"{name} must have the same length as optimizer.param_groups. {name} has "
                f"{len(value)} values, param_groups has {len(optimizer.param_groups)}."
            )
        return [_copied(v) for v in value]
    return [_copied(value) for _ in optimizer.param_groups]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


# Called with (scheduler, arguments) as a scheduler steps: capture mode repeats the step in replays.
step_observers: list[Callable[[Any, tuple[Any, ...]], None]] = []


def _observed(step: Callable[..., None]) -> Callable[..., None]:
    """Tells the observers of the outermost step; a schedule made of others steps them inside."""

    @functools.wraps(step)
    def observed(self: Any, *args: Any, **kwargs: Any) -> None:
        if not step_observers or _stepping.depth:
            return step(self, *args, **kwargs)
        for observe in tuple(step_observers):
            observe(self, (*args, *kwargs.values()))
        _stepping.depth += 1
        try:
            # Rates are set on the host, those in tensors too: replays have the whole step repeated.
            with outside():
                return step(self, *args, **kwargs)
        finally:
            _stepping.depth -= 1

    return observed


class _Stepping(threading.local):
    depth = 0


_stepping = _Stepping()


class LRScheduler:
    """Base class: a subclass gives ``get_lr()``, the rates for ``self.last_epoch``, one a group.

    Most rates are computed from the current ``group["lr"]``, so that schedules chain and a rate
    changed by hand is respected; ``_get_closed_form_lr()``, where a schedule has it, computes
    them from ``base_lrs`` alone and serves ``step(epoch)``. With ``last_epoch >= 0`` the groups
    must already hold ``initial_lr`` (a resumed optimizer does).
    """

    _get_lr_called_within_step = False
    _is_initial = False  # while the constructor takes step 0

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        if last_epoch == -1:
            for group, lr in zip(
                optimizer.param_groups, group_values(optimizer, "lr"), strict=True
            ):
                group.setdefault("initial_lr", lr)
        else:
            for i, group in enumerate(optimizer.param_groups):
                if "initial_lr" not in group:
                    raise KeyError(
                        f"param 'initial_lr' is not specified in param_groups[{i}] when resuming "
                        "scheduler with last_epoch >= 0: load the optimizer's state first, or "
                        "leave last_epoch at -1 for a fresh run"
                    )
        self.base_lrs = group_values(optimizer, "initial_lr")
        self.last_epoch = last_epoch
        _note_optimizer_steps(optimizer)
        self._initial_step()

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as plain values."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave."""
        self.__dict__.update(state_dict)

    def get_last_lr(self) -> list[Any]:
        """The rates that this schedule wrote last, one a group."""
        return self._last_lr

    def get_lr(self) -> list[Any]:
        """The rates for ``self.last_epoch``; call ``get_last_lr`` to look at the current ones."""
        raise NotImplementedError

    def _check_within_step(self) -> None:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use "
                "`get_last_lr()`.",
                UserWarning,
                stacklevel=3,
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            cls.step = _observed(cls.__dict__["step"])  # type: ignore[method-assign]

    @_observed
    def step(self, epoch: int | None = None) -> None:
        """Moves to the next epoch (or, deprecated, to ``epoch``) and writes its rates."""
        if self._step_count == 1:
            if not hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
                warnings.warn(
                    "`optimizer.step` was replaced after this scheduler was made, so the order "
                    "of calls cannot be checked: call `optimizer.step()` before "
                    "`lr_scheduler.step()`.",
                    UserWarning,
                    stacklevel=2,
                )
            elif not getattr(self.optimizer, "_opt_called", False):
                warnings.warn(
                    "Detected call of `lr_scheduler.step()` before `optimizer.step()`: call "
                    "`optimizer.step()` first, or the first value of the learning rate schedule "
                    "is skipped.",
                    UserWarning,
                    stacklevel=2,
                )
        self._step_count += 1
        if epoch is not None:
            warnings.warn(
                "The epoch argument of `scheduler.step()` is deprecated: call it without one.",
                UserWarning,
                stacklevel=2,
            )
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        compute = self.get_lr
        if epoch is None:
            self.last_epoch += 1
        else:
            self.last_epoch = epoch
            compute = getattr(self, "_get_closed_form_lr", compute)
        self._write(compute)

    def _write(self, compute: Any) -> None:
        self._get_lr_called_within_step = True
        try:
            values = compute()
        finally:
            self._get_lr_called_within_step = False
        for group, lr in zip(self.optimizer.param_groups, values, strict=True):
            set_group_value(group, "lr", lr)
        self._last_lr = group_values(self.optimizer, "lr")

    # What many schedules are made of.

    def _unchanged(self) -> list[Any]:
        return group_values(self.optimizer, "lr")

    def _scaled(self, factor: float) -> list[Any]:
        return [group["lr"] * factor for group in self.optimizer.param_groups]


def _note_optimizer_steps(optimizer: Optimizer) -> None:
    """Lets the optimizer remember that it stepped, to warn about the wrong order of calls."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    step = optimizer.step.__func__
    ref = weakref.ref(optimizer)  # the wrapper lives on the instance: no cycle

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        self = ref()
        assert self is not None
        self._opt_called = True  # type: ignore[attr-defined]
        return step(self, *args, **kwargs)

    noted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = noted  # type: ignore[method-assign]
