"""torch.cuda's older names for mixed precision, and others that programs ask for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt

torch = pytest.importorskip("torch")

CALLS: dict[str, Callable[[Any], Any]] = {
    "autocast": lambda amp: amp.autocast(enabled=False),
    "GradScaler": lambda amp: amp.GradScaler(enabled=False),
    "custom_fwd": lambda amp: amp.custom_fwd(lambda ctx, x: x),
    "custom_bwd": lambda amp: amp.custom_bwd(lambda ctx, x: x),
}


@pytest.mark.parametrize("name", CALLS)
def test_older_names_warn_as_in_torch(name: str) -> None:
    said = []
    for module in (vt, torch):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = CALLS[name](module.cuda.amp)
        said.append([(w.category, str(w.message).partition(" is ")[0]) for w in caught])
        assert caught[0].filename == __file__
        assert made is not None
    assert said[0] == said[1]


def test_older_names_are_the_newer_ones() -> None:
    with pytest.warns(FutureWarning):
        scaler = vt.cuda.amp.GradScaler(enabled=False)
    with pytest.warns(FutureWarning):
        region = vt.cuda.amp.autocast(enabled=False)
    assert isinstance(scaler, vt.amp.GradScaler) and isinstance(region, vt.amp.autocast)
    with region:
        assert (vt.ones(2, 2) @ vt.ones(2, 2)).dtype == vt.float32


def test_architectures_and_shared_memory() -> None:
    found = vt.cuda.get_arch_list()
    assert all(arch.startswith(("sm_", "compute_")) for arch in found)
    assert vt.cuda.is_available() <= bool(found)
    assert vt.cuda.ipc_collect() is None
