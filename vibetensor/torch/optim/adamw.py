"""AdamW (Loshchilov & Hutter 2019): Adam whose weight decay stays out of the moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch.optim.adam import Adam


class AdamW(Adam):
    """Adam with decoupled weight decay: ``p -= lr * weight_decay * p`` before the update.

    Options, state and the ways a step runs are :class:`Adam`'s.

    ``stochastic_rounding=True``, which torch does not have, is for training in bfloat16 without a
    float32 copy of the weights. Bfloat16 parameters and their moments are computed in float32, as
    ever, and stored rounded up or down at random, so that they are right on average: to the
    nearest, a weight loses every update below 0.2 to 0.4 percent of it, and the second moment never
    shrinks. The numbers come from the default generator of the parameters' device, so a seed
    repeats them and replays draw on. Parameters of other dtypes are updated as without it. A group
    may choose for itself. Raises ValueError with ``foreach=False``, ``fused=False``,
    ``differentiable`` or tensor betas, whose steps are made of plain ops.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Any = 1e-3,
        betas: tuple[float | Any, float | Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        if stochastic_rounding and (
            foreach is False
            or fused is False
            or differentiable
            or any(isinstance(beta, torch.Tensor) for beta in betas)
        ):
            raise ValueError(
                "stochastic_rounding is part of the fused step, which takes neither foreach=False, "
                "fused=False, differentiable=True nor tensor betas"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )
        if stochastic_rounding:
            self.defaults["stochastic_rounding"] = True
            # The device skips an overflow's step, in a recording or not: both draw the same numbers.
            self._step_supports_amp_scaling = True
            for group in self.param_groups:
                group.setdefault("stochastic_rounding", True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
