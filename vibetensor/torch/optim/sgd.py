"""Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch import _recording
from vibetensor.torch.optim.optimizer import Optimizer
from vibetensor.torch.optim.scaled import add_scaled
from vibetensor.torch.optim.step_plan import Bucket


class SGD(Optimizer):
    """SGD with torch's options and numbers: ``buf = momentum * buf + (1 - dampening) * grad``,
    ``p -= lr * buf``, where the first ``buf`` is the gradient itself.

    A step is one native call per group, device and dtype; ``fused=False`` or ``foreach=False``
    asks for the plain form, as ``differentiable=True`` does. State of a parameter:
    ``momentum_buffer``, like the parameter, when ``momentum`` is not zero.
    """

    _knows_recordings = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Any = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Any = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if momentum < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
                foreach=foreach,
                differentiable=differentiable,
                fused=fused,
            ),
        )
        if fused:
            self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)

    def _init_state(self, group: dict[str, Any], param: Any) -> None:
        if group["momentum"] != 0:
            self.state[param]  # an empty entry; the first update makes the buffer

    def _buckets(self, index: int, group: dict[str, Any]) -> list[tuple[Bucket, list[Any]]]:
        plan = self._plans.get(index)
        if plan is not None and plan.stateless and group["momentum"] != 0:
            del self._plans[index]  # momentum was switched on after it was made
        return super()._buckets(index, group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have gradients; returns the closure's loss, if any."""
        return self._update_all(closure)

    def _update(self, group: dict[str, Any], bucket: Any, grads: list[Any]) -> None:
        params, states = bucket.params, bucket.states
        plain = (
            group["fused"] is False
            or group["foreach"] is False
            or group["differentiable"]
            or not bucket.uniform
            or isinstance(group["weight_decay"], torch.Tensor)
        )
        if group["momentum"] == 0:
            if plain:
                none = [None] * len(params)
                self._run_plain(grads, params, lambda g: _sgd_plain(params, g, none, group))
            else:
                self._fused(params, grads, [], group, first=False)
            return
        if _recording.recording() == "dry":
            self._make_buffers(params, states, group)
        if plain:
            buffers = [state.get("momentum_buffer") for state in states]
            changed = [*params, *(b for b in buffers if b is not None)]
            made = self._run_plain(grads, changed, lambda g: _sgd_plain(params, g, buffers, group))
            if made is not None:
                for state, buffer in zip(states, made, strict=True):
                    state["momentum_buffer"] = buffer
            return
        new = [i for i, state in enumerate(states) if state.get("momentum_buffer") is None]
        if not new:
            self._fused(params, grads, bucket.column("momentum_buffer"), group, first=False)
            return
        for i in new:
            states[i]["momentum_buffer"] = torch.zeros_like(params[i])
        old = sorted(set(range(len(params))).difference(new))
        for indices, first in ((new, True), (old, False)):
            if indices:
                self._fused(
                    [params[i] for i in indices],
                    [grads[i] for i in indices],
                    [states[i]["momentum_buffer"] for i in indices],
                    group,
                    first=first,
                )

    def _make_buffers(
        self, params: list[Any], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """Buffers for a step that is recorded and repeated: it cannot be the first one."""
        for param, state in zip(params, states, strict=True):
            if state.get("momentum_buffer") is not None:
                continue
            if group["dampening"] != 0:
                raise RuntimeError(
                    "SGD with momentum and dampening has another first step than later ones, and a "
                    "graph repeats one: run a step before the capture (a warm-up)"
                )
            with _recording.outside():
                state["momentum_buffer"] = torch.zeros_like(param)
            _recording.undo_with(lambda state=state: state.pop("momentum_buffer", None))

    def _fused(
        self, params: list[Any], grads: list[Any], buffers: list[Any], group: dict, *, first: bool
    ) -> None:
        torch._fused_sgd_(
            params, grads, buffers,
            weight_decay=group["weight_decay"],
            momentum=_recording.live_momentum(group, "momentum") if buffers else 0.0,
            lr=group["lr"], dampening=group["dampening"], nesterov=group["nesterov"],
            maximize=group["maximize"], is_first_step=first,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )  # fmt: skip


def _sgd_plain(
    params: list[Any], grads: list[Any], buffers: list[Any], group: dict[str, Any]
) -> list[Any]:
    """One parameter at a time, from ordinary ops: the reference of the fused update.

    Returns the momentum buffers, made where they were None.
    """
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    recorded = _recording.recording() is not None and not group["differentiable"]
    if isinstance(lr, torch.Tensor) and not group["differentiable"]:
        lr = lr.double().reshape(()) if recorded else float(lr)
    result = []
    for param, grad, buffer in zip(params, grads, buffers, strict=True):
        if group["maximize"]:
            grad = -grad
        if isinstance(weight_decay, torch.Tensor):
            # A copy, as autograd may need what the update changes.
            grad = grad + (param.clone() if group["differentiable"] else param) * weight_decay
        elif weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        if momentum != 0:
            if buffer is None:
                buffer = grad.detach().clone()
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
            grad = grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if recorded and isinstance(lr, torch.Tensor):
            add_scaled(param, grad, -lr)
        elif isinstance(lr, torch.Tensor):
            param.add_(grad * -lr)
        else:
            param.add_(grad, alpha=-lr)
        result.append(buffer)
    return result
