"""Schedules given as a function of the epoch."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from vibetensor.torch.optim.lr_scheduler.base import LRScheduler
from vibetensor.torch.optim.optimizer import Optimizer


class _FunctionLR(LRScheduler):
    """One function a group. Callable objects are saved by their attributes, functions not."""

    def __init__(self, optimizer: Optimizer, lr_lambda: Any, last_epoch: int = -1) -> None:
        groups = len(optimizer.param_groups)
        if not isinstance(lr_lambda, (list, tuple)):
            lr_lambda = [lr_lambda] * groups
        if len(lr_lambda) != groups:
            raise ValueError(f"Expected {groups} lr_lambdas, but got {len(lr_lambda)}")
        for fn in lr_lambda:
            if not callable(fn):
                raise TypeError(f"lr_lambda should be a function, but got {type(fn).__name__}")
        self.lr_lambdas: list[Callable[[int], float]] = list(lr_lambda)
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["lr_lambdas"] = [
            None if isinstance(fn, types.FunctionType) else fn.__dict__.copy()
            for fn in self.lr_lambdas
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = dict(state_dict)
        attributes = saved.pop("lr_lambdas")
        super().load_state_dict(saved)
        for fn, values in zip(self.lr_lambdas, attributes, strict=True):
            if values is not None:
                fn.__dict__.update(values)


class LambdaLR(_FunctionLR):
    """The rate is the initial one times ``lr_lambda(epoch)``."""

    def get_lr(self) -> list[Any]:
        self._check_within_step()
        return [
            base * fn(self.last_epoch)
            for fn, base in zip(self.lr_lambdas, self.base_lrs, strict=True)
        ]


class MultiplicativeLR(_FunctionLR):
    """Each epoch multiplies the rate by ``lr_lambda(epoch)``."""

    def get_lr(self) -> list[Any]:
        self._check_within_step()
        if self._is_initial:
            return self._unchanged()
        groups = self.optimizer.param_groups
        return [
            group["lr"] * fn(self.last_epoch)
            for fn, group in zip(self.lr_lambdas, groups, strict=True)
        ]
