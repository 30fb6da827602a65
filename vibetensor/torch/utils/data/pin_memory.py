"""Moves the tensors of a batch into page-locked memory, from which copies to a device overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import vibetensor.torch as torch


def pin_memory(data: Any) -> Any:
    """``data`` with its tensors pinned; objects with a ``pin_memory`` method pin themselves."""
    if isinstance(data, torch.Tensor) or callable(getattr(data, "pin_memory", None)):
        return data.pin_memory()
    if isinstance(data, Mapping):
        items = {key: pin_memory(value) for key, value in data.items()}
        try:
            return type(data)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*map(pin_memory, data))
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        items_list = [pin_memory(item) for item in data]
        try:
            return type(data)(items_list)  # type: ignore[call-arg]
        except TypeError:
            return items_list
    return data
