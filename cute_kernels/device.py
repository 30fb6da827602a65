"""Launches one variant on device tensors, by names: what measuring and testing need.

Ops never come this way: they call through the C++ launch table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .registry import load


def launch(kernel: str, variant: str, **arguments: Any) -> None:
    """Launches `variant` of `kernel` once; see `prepared`."""
    prepared(kernel, variant, **arguments)()


def prepared(kernel: str, variant: str, **arguments: Any) -> Callable[[], None]:
    """A function that launches `variant` of `kernel` on the current stream of its tensors' device.

    Arguments are the contract's tensors (an optional one may be left out; a bool tensor stands for
    bytes) and numbers. Extents are taken from the tensors' shapes. Raises TypeError for names that
    the kernel does not have or shapes that contradict each other; the function raises ValueError for
    what breaks the contract.
    """
    from vibetensor import _cuda

    found = load()[kernel]
    chosen = next((v for v in found.variants if v.name == variant), None)
    if chosen is None:
        raise ValueError(f"{kernel} has no variant '{variant}'")
    contract = found.contract(chosen)
    extents: dict[str, int] = {}
    places: dict[str, tuple[int, str, list[int]]] = {}
    device = 0
    for t in contract.tensors:
        tensor = arguments.pop(t.name, None)
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) != len(t.shape):
            raise TypeError(f"{kernel}: {t.name} has {len(shape)} dimensions, not {len(t.shape)}")
        for name, size in zip(t.shape, shape):
            if extents.setdefault(name, size) != size:
                raise TypeError(f"{kernel}: {t.name} has {name} = {size}, not {extents[name]}")
        if shape[-1] > 1 and tensor.stride(-1) != 1:
            raise TypeError(f"{kernel}: the last dimension of {t.name} is not dense")
        dtype = str(tensor.dtype).rpartition(".")[2].replace("bool", "uint8")
        places[t.name] = (tensor.data_ptr(), dtype, [int(n) for n in tensor.stride()[:-1]])
        device = tensor.device.index or 0
    numbers = {s.name: arguments.pop(s.name) for s in contract.scalars if s.name in arguments}
    for e in contract.extents:
        # An extent that only absent tensors have.
        extents.setdefault(e.name, arguments.pop(e.name, e.minimum))
    if arguments:
        raise TypeError(f"{kernel} has no argument {sorted(arguments)}")
    given = (kernel, variant, extents, places, numbers, device)
    return lambda: _cuda.cute_launch(*given)
