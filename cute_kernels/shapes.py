"""How tensors stand for the arguments of a contract: extents from shapes, dimensions put together.

A tensor with more dimensions than its contract has has its leading ones taken as one, where they
lie in memory as one does. Addresses are not looked at: the launch checks those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .contract import Contract, Tensor


class Unfit(Exception):
    """Why tensors cannot be a contract's arguments."""


def dtype_name(tensor: Any) -> str:
    """The contract's name of a tensor's dtype; a bool stands for a byte."""
    return str(tensor.dtype).rpartition(".")[2].replace("bool", "uint8")


def rows_of(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]):
    """For each of the contract's dimensions the tensor's dimensions in it, and the strides of all
    but the last. Raises Unfit."""
    extra = len(shape) - len(t.shape)
    if extra < 0:
        raise Unfit(f"{t.name} has {len(shape)} dimensions, not {len(t.shape)} or more")
    if 0 in shape:
        raise Unfit(f"{t.name} has no elements")
    dims = [shape[: extra + 1], *((n,) for n in shape[extra + 1 :])]
    # From the fastest of the dimensions put together: each step is as long as what lies inside.
    step, inner = None, 1
    for n, stride in reversed(list(zip(dims[0], strides[: extra + 1]))):
        if n == 1:
            continue
        if step is None:
            step = stride
        elif stride != step * inner:
            raise Unfit(f"{t.name}: its leading dimensions {tuple(dims[0])} do not lie as one")
        inner *= n
    steps = [step or 0]
    steps += [s if n > 1 else 0 for n, s in zip(shape[extra + 1 :], strides[extra + 1 :])]
    if _count(dims[-1]) > 1 and steps[-1] != 1:
        raise Unfit(f"{t.name}: its last dimension is not dense")
    return dims, steps[:-1]


def _count(dims: tuple[int, ...]) -> int:
    count = 1
    for n in dims:
        count *= n
    return count


def match(contract: Contract, tensors: Mapping[str, Any]):
    """The extents and, by name, the strides of tensors that stand for a contract's (one that is
    absent is None). Raises Unfit. The contract's limits are not looked at."""
    extents: dict[str, tuple[int, ...]] = {}
    strides: dict[str, list[int]] = {}
    for t in contract.tensors:
        tensor = tensors[t.name]
        if tensor is None:
            continue
        dims, strides[t.name] = rows_of(t, tuple(tensor.shape), tuple(tensor.stride()))
        for name, sizes in zip(t.shape, dims):
            if extents.setdefault(name, tuple(sizes)) != tuple(sizes):
                raise Unfit(f"{t.name} has {name} = {tuple(sizes)}, another tensor {extents[name]}")
    # An extent that only absent tensors have.
    return [_count(extents.get(e.name, (e.minimum,))) for e in contract.extents], strides


def check_limits(contract: Contract, tensors: Mapping[str, Any], extents: list[int],
                 strides: Mapping[str, list[int]]) -> None:  # fmt: skip
    """Raises Unfit for what breaks the contract, wherever the tensors lie."""
    for e, value in zip(contract.extents, extents):
        if not e.minimum <= value <= e.maximum:
            raise Unfit(f"{e.name} = {value} is not from {e.minimum} to {e.maximum}")
        if value % e.divisible_by:
            raise Unfit(f"{e.name} = {value} is not a multiple of {e.divisible_by}")
    for t in contract.tensors:
        tensor = tensors[t.name]
        if tensor is None:
            if not t.optional:
                raise Unfit(f"{t.name} is missing")
            continue
        if dtype_name(tensor) != t.dtype:
            raise Unfit(f"{t.name} is {dtype_name(tensor)}, not {t.dtype}")
        if any(step < 0 or step % t.stride_divisible_by for step in strides[t.name]):
            raise Unfit(
                f"{t.name} has rows that are {strides[t.name][0]} elements apart: not a multiple of "
                f"{t.stride_divisible_by}"
            )
