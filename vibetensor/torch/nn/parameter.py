"""Parameter and Buffer: tensors that a Module registers when they become its attributes."""

from __future__ import annotations

from typing import Any

import vibetensor.torch as torch
from vibetensor._C import Tensor
from vibetensor.torch._tensor import copied_leaf


class Parameter(Tensor):
    """A tensor that is learned: assigned to a Module it joins ``parameters()``.

    Shares the memory of ``data`` and is a leaf, whatever history ``data`` had. Without ``data`` it
    is an empty tensor. Raises RuntimeError if ``requires_grad`` and the dtype is not floating.
    """

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Parameter:
        if data is None:
            data = torch.empty(0)
        elif not isinstance(data, Tensor):
            raise TypeError(f"Parameter expects a Tensor, got {type(data).__name__}")
        return Tensor._make_subclass(cls, data.detach(), requires_grad)

    def __init__(self, data: Any = None, requires_grad: bool = True) -> None:
        """All is done in __new__."""

    def __deepcopy__(self, memo: dict[Any, Any]) -> Parameter:
        """A parameter with a copy of the memory, without ``.grad`` and Python attributes."""
        return copied_leaf(self, memo)  # type: ignore[return-value]

    def __repr__(self, **options: Any) -> str:
        return "Parameter containing:\n" + super().__repr__(**options)

    __str__ = __repr__


class Buffer(Tensor):
    """A tensor that is state but not learned: assigned to a Module it joins ``buffers()``.

    Shares the memory of ``data``. ``persistent`` says whether it is part of ``state_dict()``.
    """

    persistent: bool = True

    def __new__(
        cls, data: Any = None, requires_grad: bool = False, *, persistent: bool = True
    ) -> Buffer:
        if data is None:
            data = torch.empty(0)
        buffer = Tensor._make_subclass(cls, data.detach(), data.requires_grad or requires_grad)
        buffer.persistent = persistent
        return buffer

    def __init__(
        self, data: Any = None, requires_grad: bool = False, *, persistent: bool = True
    ) -> None:
        """All is done in __new__."""
