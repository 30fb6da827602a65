"""torch.backends.cuda: TF32 and attention switches."""

from __future__ import annotations

from typing import Any

from vibetensor import _C
from vibetensor.torch.cuda import _backend


class _Matmul:
    """Switches of matrix products."""

    allow_fp16_reduced_precision_reduction = True
    allow_bf16_reduced_precision_reduction = True

    @property
    def allow_tf32(self) -> bool:
        """Whether float32 products may round their inputs to TF32. Off by default."""
        return _C._kernel_switch("matmul_tf32")

    @allow_tf32.setter
    def allow_tf32(self, allow: bool) -> None:
        _C._set_kernel_switch("matmul_tf32", bool(allow))


matmul: Any = _Matmul()

# What scaled_dot_product_attention may run on. Our own kernels take what cuDNN does not, so only
# its switch has an effect; the others keep what scripts set.
_attention = {"flash": True, "mem_efficient": True, "math": True}


def enable_cudnn_sdp(enabled: bool) -> None:
    """Whether attention may run in cuDNN's fused kernels. On at start."""
    _C._set_kernel_switch("cudnn_attention", bool(enabled))


def cudnn_sdp_enabled() -> bool:
    """Whether attention may run in cuDNN's fused kernels."""
    return _C._kernel_switch("cudnn_attention")


def enable_flash_sdp(enabled: bool) -> None:
    """Kept for scripts that set it; our own fused kernels are always there."""
    _attention["flash"] = bool(enabled)


def flash_sdp_enabled() -> bool:
    """What enable_flash_sdp last set."""
    return _attention["flash"]


def enable_mem_efficient_sdp(enabled: bool) -> None:
    """Kept for scripts that set it; our own fused kernels are always there."""
    _attention["mem_efficient"] = bool(enabled)


def mem_efficient_sdp_enabled() -> bool:
    """What enable_mem_efficient_sdp last set."""
    return _attention["mem_efficient"]


def enable_math_sdp(enabled: bool) -> None:
    """Kept for scripts that set it; our own fused kernels are always there."""
    _attention["math"] = bool(enabled)


def math_sdp_enabled() -> bool:
    """What enable_math_sdp last set."""
    return _attention["math"]


def is_built() -> bool:
    """Whether this build has a CUDA backend."""
    return _backend.native() is not None
