"""What tests of captures ask of the default device, whatever it is (`pytest --device`)."""

from __future__ import annotations

from typing import Any

import vibetensor.torch as vt
from vibetensor import _C


def kind() -> str:
    """Its type, for autocast and GradScaler too: cpu or cuda."""
    return vt.get_default_device().type


def random_state() -> Any:
    """Where its random numbers are."""
    return _C._default_generator(vt.get_default_device()).get_state()


def set_random_state(state: Any) -> None:
    """Its random numbers go on from there."""
    _C._default_generator(vt.get_default_device()).set_state(state)
