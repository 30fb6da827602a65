"""Dynamic loss scaling for float16 training (Micikevicius et al. 2018)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch import _recording
from vibetensor.torch.optim.optimizer import unless_found

# Where an optimizer stands between two updates of the scale.
READY, UNSCALED, STEPPED = "ready", "unscaled", "stepped"


def _fresh_state() -> dict[str, Any]:
    return {"stage": READY, "found_inf_per_device": {}}


def _state_tensors(optimizer: Any) -> dict[tuple[Any, str], Any]:
    """The tensors of an optimizer's state, by parameter and key."""
    return {
        (p, key): value
        for p, state in optimizer.state.items()
        if isinstance(state, dict)
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


class GradScaler:
    """Scales the loss so that small float16 gradients survive, and skips steps that overflow.

    ``scaler.scale(loss).backward()``, optionally ``scaler.unscale_(optimizer)`` to clip, then
    ``scaler.step(optimizer)`` and ``scaler.update()``. The scale (float32, 0-d, on the device of
    the losses) is multiplied by ``backoff_factor`` after an overflow and by ``growth_factor``
    after ``growth_interval`` steps without one. With ``enabled=False`` every method is a no-op.

    In a capture no number is read: the device skips the step where a gradient overflowed. Other
    factors, another interval or another ``enabled`` lead to another capture.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        self._device = device
        self._enabled = enabled
        if device == "cuda" and enabled and not torch.cuda.is_available():
            warnings.warn(
                "GradScaler is enabled for cuda, but CUDA is not available. Disabling.",
                stacklevel=2,
            )
            self._enabled = False
        if not self._enabled:
            return
        if growth_factor <= 1.0:
            raise AssertionError("The growth factor must be > 1.0.")
        if backoff_factor >= 1.0:
            raise AssertionError("The backoff factor must be < 1.0.")
        self._init_scale = init_scale
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._init_growth_tracker = 0
        # Made with the first scaled loss, on its device.
        self._scale: Any = None
        self._growth_tracker: Any = None
        self._per_optimizer_states: dict[int, dict[str, Any]] = defaultdict(_fresh_state)

    # Before backward

    def scale(self, outputs: Any) -> Any:
        """Multiplies a tensor, or each tensor of nested iterables, by the scale."""
        self._note_enabled()
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            if self._scale is None:
                self._make_scale(outputs.device)
            assert self._scale is not None
            return outputs * self._scale.to(outputs.device)
        if isinstance(outputs, Iterable) and not isinstance(outputs, str):
            scaled = map(self.scale, outputs)
            if isinstance(outputs, (list, tuple)):
                return type(outputs)(scaled)
            return scaled
        raise ValueError("outputs must be a Tensor or an iterable of Tensors")

    def _make_scale(self, device: Any) -> None:
        with _recording.outside():  # a replay goes on from the scale, it does not make it
            scale = torch.full((), self._init_scale, dtype=torch.float32, device=device)
            tracker = torch.full((), self._init_growth_tracker, dtype=torch.int32, device=device)
        self._scale, self._growth_tracker = scale, tracker
        _recording.undo_with(self._forget_scale)

    def _forget_scale(self) -> None:
        self._scale = self._growth_tracker = None

    def _require_scale(self, method: str) -> None:
        if self._scale is None:
            raise AssertionError(
                f"Attempted {method} but no loss was scaled yet: call `scaler.scale(loss)` (and "
                "`backward` on the result) first."
            )

    # After backward

    def unscale_(self, optimizer: Any) -> None:
        """Divides the optimizer's gradients by the scale, once between two updates."""
        self._note_enabled()
        if not self._enabled:
            return
        self._require_scale("unscale_")
        state = self._state_of(optimizer)
        if state["stage"] is UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        if state["stage"] is STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        inv_scale = self._scale.double().reciprocal().float()
        state["found_inf_per_device"] = self._unscale_grads(optimizer, inv_scale)
        state["stage"] = UNSCALED

    def _unscale_grads(
        self, optimizer: Any, inv_scale: Any, allow_fp16: bool = False
    ) -> dict[Any, Any]:
        """Multiplies gradients in place; returns found_inf (float32, 0-d) of each device."""
        by_device: dict[Any, list[Any]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.dtype == torch.float16 and not allow_fp16:
                    raise ValueError("Attempting to unscale FP16 gradients.")
                by_device.setdefault(p.grad.device, []).append(p.grad)
        found = {}
        with torch.no_grad():
            for device, grads in by_device.items():
                found[device] = torch.zeros((), dtype=torch.float32, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(
                    grads, found[device], inv_scale.to(device)
                )
        return found

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)``, unless a gradient is infinite or NaN.

        Optimizers made with ``fused=True`` unscale and check inside their update, with no wait
        for the device. Where no parameter has a gradient, others raise AssertionError.
        """
        self._note_enabled()
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._require_scale("step")
        state = self._state_of(optimizer)
        if state["stage"] is STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if _recording.recording():
            return self._step_recorded(optimizer, state, args, kwargs)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return self._step_inside(optimizer, state, args, kwargs)
        if state["stage"] is READY:
            self.unscale_(optimizer)
        found = state["found_inf_per_device"]
        if not found:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        result = None
        if not sum(float(value) for value in found.values()):
            result = optimizer.step(*args, **kwargs)
        state["stage"] = STEPPED
        return result

    def _note_enabled(self) -> None:
        _recording.rely_on(self, ("_enabled",))

    def _state_of(self, optimizer: Any) -> dict[str, Any]:
        self._note_states()
        return self._per_optimizer_states[id(optimizer)]

    def _note_states(self) -> None:
        """Where optimizers stand is as before if a recording fails."""
        if not _recording.recording():
            return
        states = self._per_optimizer_states
        kept = {key: dict(state) for key, state in states.items()}

        def put_back() -> None:
            states.clear()
            states.update(kept)
            self._per_optimizer_states = states

        _recording.undo_with(put_back)

    def _step_recorded(self, optimizer: Any, state: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """The step with the skip left to the device: the updates of vibetensor's optimizers look at
        found_inf, what others change is taken back where it says so."""
        unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
        if state["stage"] is READY and not unscales:
            self.unscale_(optimizer)
        before = _state_tensors(optimizer)
        if unscales or optimizer._steps_knowingly():
            result = self._step_inside(optimizer, state, args, kwargs)
        else:
            if not state["found_inf_per_device"]:
                raise AssertionError("No inf checks were recorded for this optimizer.")
            params = [p for group in optimizer.param_groups for p in group["params"]]
            found_inf = self._combined([state])
            with unless_found(found_inf, [*params, *before.values()]):
                result = optimizer.step(*args, **kwargs)
            state["stage"] = STEPPED
        made = _state_tensors(optimizer).keys() - before.keys()
        if made and not unscales and _recording.recording() == "running":
            # State that this step made: it would not be there if the step had been skipped.
            _recording.mark_unsteady()
            with _recording.outside():
                if float(self._combined([state])):
                    _recording.mark_taken_back()
                    for p, key in made:
                        del optimizer.state[p][key]
                    for p in {p for p, _ in made}:
                        if not optimizer.state[p]:
                            del optimizer.state[p]
        return result

    def _step_inside(self, optimizer: Any, state: dict[str, Any], args: Any, kwargs: Any) -> Any:
        grad_scale = None
        if state["stage"] is READY:
            one = torch.ones((), dtype=torch.float32, device=self._scale.device)
            state["found_inf_per_device"] = self._unscale_grads(optimizer, one, allow_fp16=True)
            grad_scale = self._scale
        if state["found_inf_per_device"]:
            found_inf = self._combined([state])
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            # Without gradients its step has nothing to do, which is no error.
            found_inf = torch.zeros((), dtype=torch.float32, device=self._scale.device)
        else:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        optimizer.grad_scale = grad_scale
        optimizer.found_inf = found_inf
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        state["stage"] = STEPPED
        return result

    def _combined(self, states: Iterable[dict[str, Any]]) -> Any:
        device = self._scale.device
        found = [
            value.to(device) for state in states for value in state["found_inf_per_device"].values()
        ]
        if not found:
            raise AssertionError("No inf checks were recorded prior to update.")
        total = found[0]
        for value in found[1:]:
            total = total + value
        return total

    def update(self, new_scale: Any = None) -> None:
        """Ends the iteration: adapts the scale, or sets it to ``new_scale``."""
        self._note_enabled()
        if not self._enabled:
            return
        self._require_scale("update")
        if new_scale is None:
            _recording.rely_on(self, ("_growth_factor", "_backoff_factor", "_growth_interval"))
            found = self._combined(self._per_optimizer_states.values())
            torch._amp_update_scale_(
                self._scale, self._growth_tracker, found,
                self._growth_factor, self._backoff_factor, self._growth_interval,
            )  # fmt: skip
        elif isinstance(new_scale, torch.Tensor):
            if new_scale.numel() != 1 or new_scale.requires_grad:
                raise AssertionError(
                    "new_scale should be a float or a one-element float32 Tensor that does not "
                    "require grad"
                )
            self._scale.copy_(new_scale.reshape(()))
        else:
            self._scale.fill_(new_scale)
        self._note_states()
        self._per_optimizer_states = defaultdict(_fresh_state)

    # Settings and state

    def get_scale(self) -> float:
        """The scale as a number (waits for the device); 1.0 when disabled."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else self._scale.item()

    def get_growth_factor(self) -> float:
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        self._growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        self._backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        self._growth_interval = new_interval

    def _get_growth_tracker(self) -> int:
        if not self._enabled:
            return 0
        if self._growth_tracker is None:
            return self._init_growth_tracker
        return self._growth_tracker.item()

    def is_enabled(self) -> bool:
        return self._enabled

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers under torch's keys; empty when disabled. Call it after ``update``."""
        if not self._enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._get_growth_tracker(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave; RuntimeError for that of a disabled scaler."""
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError(
                "The source state dict is empty, possibly because it was saved from a disabled "
                "instance of GradScaler."
            )
        self._init_scale = state_dict["scale"]
        self._growth_factor = state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
        self._init_growth_tracker = state_dict["_growth_tracker"]
        if self._scale is not None:
            self._scale.fill_(self._init_scale)
            self._growth_tracker.fill_(self._init_growth_tracker)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._enabled:
            if self._per_optimizer_states:
                raise AssertionError(
                    "A GradScaler instance may only be pickled at the beginning of an iteration, "
                    "or at the end after scaler.update()."
                )
            state["_init_scale"] = self.get_scale()
            state["_init_growth_tracker"] = self._get_growth_tracker()
            state["_scale"] = state["_growth_tracker"] = None
        return state
