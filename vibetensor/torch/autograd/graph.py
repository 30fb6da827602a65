"""Access to the recorded graph: nodes, saved-tensor hooks."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any

from vibetensor import _C

Node = _C.Node
GradientEdge = namedtuple("GradientEdge", ["node", "output_nr"])


def get_gradient_edge(tensor: _C.Tensor) -> GradientEdge:
    """Where `tensor`'s gradient goes: its node (or leaf accumulator) and the node's input number."""
    return GradientEdge(*_C._gradient_edge(tensor))


def increment_version(tensor: _C.Tensor | Iterable[_C.Tensor]) -> None:
    """Tells autograd that a tensor, or each of several, was changed in place by other means than ops."""
    for one in (tensor,) if isinstance(tensor, _C.Tensor) else tensor:
        _C._increment_version(one)


class saved_tensors_hooks:
    """Packs every tensor saved for backward in the block with `pack_hook(tensor)`; backward calls
    `unpack_hook(packed)` to get it back."""

    def __init__(
        self, pack_hook: Callable[[_C.Tensor], Any], unpack_hook: Callable[[Any], _C.Tensor]
    ) -> None:
        self.pack_hook = pack_hook
        self.unpack_hook = unpack_hook

    def __enter__(self) -> None:
        _C._push_saved_hooks(self.pack_hook, self.unpack_hook)

    def __exit__(self, *exc: object) -> None:
        _C._pop_saved_hooks()


class save_on_cpu(saved_tensors_hooks):
    """Keeps saved tensors in CPU memory until backward needs them."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        del pin_memory, device_type

        def pack(tensor: _C.Tensor) -> tuple[Any, _C.Tensor]:
            return tensor.device, tensor.cpu() if tensor.is_cuda else tensor

        def unpack(packed: tuple[Any, _C.Tensor]) -> _C.Tensor:
            device, tensor = packed
            return tensor.to(device)

        super().__init__(pack, unpack)
