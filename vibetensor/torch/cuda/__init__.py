"""torch.cuda where there is no CUDA backend: queries answer, everything else explains."""

from __future__ import annotations

from typing import Any


def is_available() -> bool:
    """Whether a CUDA device can be used."""
    return False


def device_count() -> int:
    """The number of CUDA devices."""
    return 0


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Whether the current device computes in bfloat16."""
    del including_emulation
    return False


def is_initialized() -> bool:
    """Whether the CUDA backend has been started."""
    return False


def manual_seed(seed: int) -> None:
    """Seeds the CUDA generator; kept so that scripts can seed before a device exists."""
    manual_seed_all(seed)


def manual_seed_all(seed: int) -> None:
    """Seeds every CUDA generator; a no-op without devices (torch.manual_seed covers them)."""
    int(seed)


def empty_cache() -> None:
    """Releases cached device memory; there is none without a device."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"vibetensor.cuda.{name} is not available: this build has no CUDA backend (`vibetensor info` lists the backends)"
    )
