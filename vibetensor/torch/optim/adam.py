"""Adam (Kingma & Ba 2015), with AMSGrad (Reddi et al. 2018) and decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch._recording import live_momentum, recording
from vibetensor.torch.optim.optimizer import Optimizer
from vibetensor.torch.optim.scaled import add_scaled, as_number, bias_corrections, flat


class Adam(Optimizer):
    """Adam with torch's options, state layout and numbers.

    A step is one native call per group, device and dtype. ``fused=False`` or ``foreach=False``
    asks for the plain form, one parameter at a time from ordinary ops, which is also what
    ``differentiable=True`` (autograd through the step) and tensor betas take. ``capturable`` is
    accepted: the plain form then keeps the bias corrections on the tensors' device. Captures need
    it not: there every form does.

    State of a parameter: ``step`` (float32, 0-d, on the CPU unless ``fused`` or ``capturable``),
    ``exp_avg``, ``exp_avg_sq`` and with ``amsgrad`` ``max_exp_avg_sq``, like the parameter.
    """

    _knows_recordings = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Any = 1e-3,
        betas: tuple[float | Any, float | Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        if isinstance(lr, torch.Tensor):
            if foreach and not capturable:
                raise ValueError(
                    "lr as a Tensor is not supported for capturable=False and foreach=True"
                )
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        tensor_betas = [isinstance(beta, torch.Tensor) for beta in betas]
        if any(tensor_betas) and not all(tensor_betas):
            raise ValueError("betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                amsgrad=amsgrad,
                maximize=maximize,
                foreach=foreach,
                capturable=capturable,
                differentiable=differentiable,
                fused=fused,
                decoupled_weight_decay=decoupled_weight_decay,
            ),
        )
        if fused:
            # GradScaler then leaves unscaling and the inf check to the update itself.
            self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("capturable", False)
            group.setdefault("differentiable", False)
            group.setdefault("decoupled_weight_decay", False)
            fused = group.setdefault("fused", None)
            for p in group["params"]:
                p_state = self.state.get(p)
                if p_state and not isinstance(p_state["step"], torch.Tensor):
                    on_device = group["capturable"] or fused
                    p_state["step"] = torch.tensor(
                        float(p_state["step"]),
                        dtype=torch.float32,
                        device=p.device if on_device else "cpu",
                    )

    def _init_state(self, group: dict[str, Any], param: Any) -> None:
        # A recording counts where the parameters are: see _bring_steps.
        there = group["capturable"] or group["fused"] or recording() is not None
        device = param.device if there else "cpu"
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(param)
        # All or nothing: without memory for one, the next step makes them again.
        self.state[param].update(state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have gradients; returns the closure's loss, if any."""
        return self._update_all(closure)

    def _update(self, group: dict[str, Any], bucket: Any, grads: list[Any]) -> None:
        amsgrad = group["amsgrad"]
        if recording() is not None:
            self._bring_steps(bucket)
        exp_avgs = bucket.column("exp_avg")
        exp_avg_sqs = bucket.column("exp_avg_sq")
        max_exp_avg_sqs = bucket.column("max_exp_avg_sq") if amsgrad else []
        steps = bucket.column("step")
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        rounded = (
            group.get("stochastic_rounding", False)
            and group["decoupled_weight_decay"]
            and bucket.params[0].dtype == torch.bfloat16
        )
        if (
            group["fused"] is False
            or group["foreach"] is False
            or group["differentiable"]
            or not bucket.uniform
            or isinstance(beta1, torch.Tensor)
        ):
            if rounded:
                raise ValueError(
                    "stochastic_rounding is part of the fused step, which takes neither "
                    "foreach=False, fused=False, differentiable=True nor tensor betas, and wants "
                    "gradients in the dtype of their parameters"
                )
            self._run_plain(
                grads,
                [*bucket.params, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs, *steps],
                lambda grads: _adam_plain(
                    bucket.params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
                    lr=lr, beta1=beta1, beta2=beta2, group=group,
                ),
            )  # fmt: skip
            return
        found_inf = getattr(self, "found_inf", None)
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        if rounded:
            update = torch._fused_adamw_stochastic_
        torch._foreach_add_(steps, 1)
        update(
            bucket.params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
            lr=lr, beta1=live_momentum(group, "betas"), beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=amsgrad,
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None), found_inf=found_inf,
        )  # fmt: skip
        if found_inf is not None:
            # The update did nothing where a gradient overflowed: the step does not count either.
            torch._foreach_add_(steps, found_inf.to(steps[0].device), alpha=-1)


def _adam_plain(
    params: list[Any],
    grads: list[Any],
    exp_avgs: list[Any],
    exp_avg_sqs: list[Any],
    max_exp_avg_sqs: list[Any],
    steps: list[Any],
    *,
    lr: float | Any,
    beta1: float | Any,
    beta2: float | Any,
    group: dict[str, Any],
) -> None:
    """One parameter at a time, from ordinary ops: the reference of the fused update."""
    eps, weight_decay = group["eps"], group["weight_decay"]
    # Bias corrections as tensors, so that autograd or capture can follow the step count.
    on_tensors = group["capturable"] or group["differentiable"]
    # A recording reads no number: it has the float64 arithmetic of the host as ops.
    recorded = recording() is not None and not on_tensors
    if isinstance(lr, torch.Tensor) and not on_tensors:
        lr = lr.double().reshape(()) if recorded else float(lr)
    number = recorded or getattr(lr, "stands_for_number", False)
    for i, param in enumerate(params):
        grad = -grads[i] if group["maximize"] else grads[i]
        exp_avg, exp_avg_sq, step = exp_avgs[i], exp_avg_sqs[i], steps[i]
        step += 1
        if weight_decay != 0:
            if group["decoupled_weight_decay"]:
                (flat(param) if number else param).mul_(1 - lr * weight_decay)
            else:
                grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        if group["differentiable"] or isinstance(beta2, torch.Tensor):
            exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
        else:
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if recorded:
            correction1, root2 = bias_corrections(beta1, beta2, step)
        else:
            # Copies, as autograd may need what later steps change.
            count = step.clone() if on_tensors else float(step)
            correction1 = 1 - beta1**count
            correction2 = 1 - beta2**count
            root2 = math.sqrt(correction2) if type(correction2) is float else correction2**0.5
        second = exp_avg_sq
        if group["amsgrad"]:
            second = max_exp_avg_sqs[i]
            if group["differentiable"]:
                second.copy_(torch.maximum(second.clone(), exp_avg_sq))
            else:
                torch.maximum(second, exp_avg_sq, out=second)
        root = second.sqrt()
        if recorded and not isinstance(beta1, torch.Tensor):
            root = flat(root)
        denom = (root / root2).add_(eps)
        if on_tensors:
            mean = exp_avg.clone() if group["differentiable"] else exp_avg
            param.add_(mean / denom * (-as_number(lr, correction1) / correction1))
        elif recorded:
            rate = lr.to(correction1.dtype) if isinstance(lr, torch.Tensor) else lr
            add_scaled(param, exp_avg, -(rate / correction1), divisor=denom)
        else:
            param.addcdiv_(exp_avg, denom, value=-(lr / correction1))
