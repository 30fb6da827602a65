"""torch.nn.attention: which kernels scaled_dot_product_attention may use."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vibetensor import _C
from vibetensor.torch.backends import cuda
from vibetensor.torch.nn.attention import varlen as varlen

_SMALL = "cudnn_small_attention"


class SDPBackend(enum.Enum):
    """Kernels of attention. Those of this library (any but cuDNN's) take every case."""

    ERROR = -1
    MATH = 0
    FLASH_ATTENTION = 1
    EFFICIENT_ATTENTION = 2
    CUDNN_ATTENTION = 3
    OVERRIDEABLE = 4


@contextmanager
def sdpa_kernel(
    backends: SDPBackend | Sequence[SDPBackend], set_priority: bool = False
) -> Iterator[None]:
    """Within the block, cuDNN's attention is used only if it is among ``backends``; if it is the
    only one, also for small problems, which our own kernels do as fast.

    Where it does not apply, our own kernels run, whatever the list says.
    """
    del set_priority
    chosen = [backends] if isinstance(backends, SDPBackend) else list(backends)
    if not chosen or not all(isinstance(backend, SDPBackend) for backend in chosen):
        raise TypeError("sdpa_kernel takes one SDPBackend or a non-empty list of them")
    former = cuda.cudnn_sdp_enabled()
    former_small = _C._kernel_switch(_SMALL)
    cuda.enable_cudnn_sdp(SDPBackend.CUDNN_ATTENTION in chosen)
    _C._set_kernel_switch(_SMALL, set(chosen) == {SDPBackend.CUDNN_ATTENTION})
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(former)
        _C._set_kernel_switch(_SMALL, former_small)
