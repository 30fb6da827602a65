"""The two updates of loss scaling, made of ordinary ops: nothing waits for the device.

They keep torch's contracts, so a backend may offer fused ones under torch's names.
"""

from __future__ import annotations

from typing import Any

import vibetensor.torch as torch


def unscale_and_check_(grads: list[Any], found_inf: Any, inv_scale: Any) -> None:
    """Multiplies ``grads`` by ``inv_scale`` in place; sets ``found_inf`` to 1 where any is not
    finite. ``found_inf`` and ``inv_scale`` are float32, 0-d, on the gradients' device."""
    fused = getattr(torch, "_amp_foreach_non_finite_check_and_unscale_", None)
    if fused is not None:
        fused(grads, found_inf, inv_scale)
        return
    for grad in grads:
        bad = torch.isfinite(grad).all().logical_not()
        found_inf.copy_(torch.maximum(found_inf, bad.to(torch.float32)))
        grad.mul_(inv_scale)


def update_scale_(
    scale: Any,
    growth_tracker: Any,
    found_inf: Any,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
) -> None:
    """Backs off where ``found_inf`` is not 0; grows after ``growth_interval`` clean steps.

    ``scale`` (float32) and ``growth_tracker`` (int32) are 0-d and updated in place. A growth that
    would overflow float32 is not made, but counts.
    """
    fused = getattr(torch, "_amp_update_scale_", None)
    if fused is not None:
        fused(scale, growth_tracker, found_inf, growth_factor, backoff_factor, growth_interval)
        return
    with torch.no_grad():
        bad = found_inf != 0
        clean_steps = growth_tracker + 1
        due = clean_steps == growth_interval
        grown = scale * growth_factor
        grown = torch.where(due & torch.isfinite(grown), grown, scale)
        scale.copy_(torch.where(bad, scale * backoff_factor, grown))
        restart = (bad | due).to(growth_tracker.dtype)
        growth_tracker.copy_(clean_steps * (1 - restart))
