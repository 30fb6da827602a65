"""torch.backends.cuda: TF32 and attention switches."""

from __future__ import annotations

from typing import Any

from vibetensor.torch.cuda import _backend


class _Matmul:
    """Switches of matrix products."""

    allow_fp16_reduced_precision_reduction = True
    allow_bf16_reduced_precision_reduction = True

    def __init__(self) -> None:
        object.__setattr__(self, "_tf32", False)

    @property
    def allow_tf32(self) -> bool:
        """Whether float32 products may round their inputs to TF32. Off by default."""
        native = _backend.native()
        return self._tf32 if native is None else native.allow_tf32()

    @allow_tf32.setter
    def allow_tf32(self, allow: bool) -> None:
        self._tf32 = bool(allow)
        native = _backend.native()
        if native is not None:
            native.set_allow_tf32(bool(allow))


matmul: Any = _Matmul()

# What scaled_dot_product_attention may run on. Our own kernels take what cuDNN does not, so only
# its switch has an effect; the others keep what scripts set.
_attention = {"flash": True, "mem_efficient": True, "math": True, "cudnn": True}


def _enable_attention(kind: str, enabled: bool) -> None:
    _attention[kind] = bool(enabled)
    native = _backend.native()
    if kind == "cudnn" and native is not None:
        native.set_cudnn_flag("attention", bool(enabled))


def enable_cudnn_sdp(enabled: bool) -> None:
    """Whether attention may run in cuDNN's fused kernels. On at start."""
    _enable_attention("cudnn", enabled)


def cudnn_sdp_enabled() -> bool:
    """Whether attention may run in cuDNN's fused kernels."""
    return _attention["cudnn"]


def enable_flash_sdp(enabled: bool) -> None:
    """Kept for scripts that set it; our own fused kernels are always there."""
    _enable_attention("flash", enabled)


def flash_sdp_enabled() -> bool:
    """What enable_flash_sdp last set."""
    return _attention["flash"]


def enable_mem_efficient_sdp(enabled: bool) -> None:
    """Kept for scripts that set it; our own fused kernels are always there."""
    _enable_attention("mem_efficient", enabled)


def mem_efficient_sdp_enabled() -> bool:
    """What enable_mem_efficient_sdp last set."""
    return _attention["mem_efficient"]


def enable_math_sdp(enabled: bool) -> None:
    """Kept for scripts that set it; our own fused kernels are always there."""
    _enable_attention("math", enabled)


def math_sdp_enabled() -> bool:
    """What enable_math_sdp last set."""
    return _attention["math"]


def is_built() -> bool:
    """Whether this build has a CUDA backend."""
    return _backend.native() is not None
