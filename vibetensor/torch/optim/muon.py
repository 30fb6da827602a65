"""Muon (Jordan et al. 2024): momentum whose update is made orthogonal by Newton-Schulz steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch._recording import recording
from vibetensor.torch.optim.optimizer import Optimizer
from vibetensor.torch.optim.scaled import add_scaled

# bfloat16 elements that are orthogonalised at a time: a batch and its products are temporary.
_BATCH_ELEMENTS = 1 << 25


class Muon(Optimizer):
    """Muon with torch's options, state layout and numbers, for the matrices of hidden layers; give
    biases, norms and embeddings to another optimizer. Parameters that are not 2-D are a ValueError.

    ``buf += (1 - momentum) * (grad - buf)``; with ``nesterov`` the update is ``grad`` moved towards
    ``buf`` by ``momentum``, else ``buf``. Its singular values are brought near 1 in bfloat16, by
    ``ns_steps`` rounds of the polynomial ``a x + b x^3 + c x^5``. The weight then shrinks by
    ``lr * weight_decay`` and moves against the update by ``lr`` times ``sqrt(max(1, rows / columns))``
    (``adjust_lr_fn`` None or ``"original"``) or ``0.2 * sqrt(max(rows, columns))``
    (``"match_rms_adamw"``).

    Weights of one shape are orthogonalised as one batch of matrix products. ``lr`` may be a tensor
    of one element; one on a GPU is not read by the host. State of a parameter:
    ``momentum_buffer``, like the gradient.
    """

    _knows_recordings = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
        if not momentum >= 0.0:
            raise ValueError(f"momentum should be >= 0 but is: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight decay should be >= 0 but is: {weight_decay}")
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        super().__init__(
            params,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_coefficients=ns_coefficients,
                eps=eps,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            ),
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        "Muon only supports 2D parameters whereas we found a parameter with size: "
                        f"{p.size()}"
                    )

    def _init_state(self, group: dict[str, Any], param: Any) -> None:
        self.state[param]["momentum_buffer"] = torch.zeros_like(param.grad)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have gradients; returns the closure's loss, if any."""
        return self._update_all(closure)

    def _update(self, group: dict[str, Any], bucket: Any, grads: list[Any]) -> None:
        buffers = bucket.column("momentum_buffer")
        self._run_plain(
            grads,
            [*bucket.params, *buffers],
            lambda grads: _muon(bucket.params, grads, buffers, group),
        )


def _muon(params: list[Any], grads: list[Any], buffers: list[Any], group: dict[str, Any]) -> None:
    lr, momentum = group["lr"], group["momentum"]
    if isinstance(lr, torch.Tensor):
        # A number on the host is as good as its tensor; one on a device stays there.
        stays = recording() is not None or lr.device.type != "cpu"
        lr = lr.double().reshape(()) if stays else float(lr)
    updates = []
    for grad, buffer in zip(grads, buffers, strict=True):
        if grad.ndim != 2:
            raise ValueError("Param gradient must be a 2D matrix")
        _in_float32(buffer, lambda b, grad=grad: b.lerp_(grad.to(b.dtype), 1 - momentum))
        if group["nesterov"]:
            update = grad.clone()
            _in_float32(update, lambda u, buffer=buffer: u.lerp_(buffer.to(u.dtype), momentum))
            updates.append(update)
        else:
            updates.append(buffer)
    keep = 1 - lr * group["weight_decay"]
    for indices in _batches(updates):
        directions = zeropower(
            [updates[i] for i in indices],
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        )
        for i, direction in zip(indices, directions, strict=True):
            rate = lr * _rate_factor(group["adjust_lr_fn"], *params[i].shape)
            _in_float32(params[i], lambda p: p.mul_(keep))
            add_scaled(params[i], direction.to(params[i].dtype), -rate)


def _in_float32(tensor: Any, update: Callable[[Any], Any]) -> None:
    """``update(tensor)``, in place. One of 16 bits would round the numbers beside it to 16 bits too,
    and 1 - lr * weight_decay to 1: it is changed in float32 and rounded once."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor.copy_(update(tensor.float()))
    else:
        update(tensor)


def _batches(updates: list[Any]) -> list[list[int]]:
    """Which updates are orthogonalised together: those of one shape, as many as memory allows."""
    open_batches: dict[tuple[int, ...], list[int]] = {}
    batches = []
    for i, update in enumerate(updates):
        shape = tuple(update.shape)
        batch = open_batches.get(shape)
        if batch is None or (len(batch) + 1) * update.numel() > _BATCH_ELEMENTS:
            batch = open_batches[shape] = []
            batches.append(batch)
        batch.append(i)
    return batches


def _rate_factor(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        # An empty matrix has nothing to move.
        return math.sqrt(max(1, rows / max(columns, 1)))
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return 1.0


def zeropower(
    matrices: list[Any], ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> list[Any]:
    """``U V^T`` of each matrix ``U S V^T``, nearly: bfloat16, with singular values around 1.

    ``matrices`` have one shape. Raises ValueError unless there are three coefficients and fewer
    than 100 steps.
    """
    if ns_steps >= 100:
        raise ValueError("Number of steps must be less than 100 for computational efficiency")
    if len(ns_coefficients) != 3:
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    a, b, c = ns_coefficients
    tall = matrices[0].size(0) > matrices[0].size(1)
    x = torch.stack([m.bfloat16().mT if tall else m.bfloat16() for m in matrices])
    # With a Frobenius norm of at most 1 no singular value is larger than 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(ns_steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return [m.mT if tall else m for m in x.unbind(0)]
