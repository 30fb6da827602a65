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


def is_built() -> bool:
    """Whether this build has a CUDA backend."""
    return _backend.native() is not None
