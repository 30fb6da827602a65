"""Batches from samples: one recursion over mappings, sequences, tensors, arrays and numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import vibetensor.torch as torch


def _is_numpy(value: Any) -> bool:
    """Without importing numpy: its values come from its own module."""
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def _is_text_array(value: Any) -> bool:
    return value.dtype.kind in "SUOV"


def _rebuild_mapping(like: Any, items: dict[Any, Any]) -> Any:
    """A mapping of the type of ``like``; a plain dict where that cannot be made."""
    try:
        if isinstance(like, MutableMapping):
            clone = copy.copy(like)  # keeps extra state, such as a defaultdict's factory
            clone.update(items)
            return clone
        return type(like)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def _rebuild_sequence(like: Any, items: list[Any]) -> Any:
    try:
        if isinstance(like, MutableSequence):
            clone = copy.copy(like)
            clone[:] = items
            return clone
        return type(like)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def default_convert(data: Any) -> Any:
    """Turns NumPy arrays and numbers inside ``data`` into tensors and leaves the rest as it is,
    NumPy's strings and arrays of strings or objects among it."""
    # NumPy's strings are Python's too, and are left before they are taken for numbers.
    if isinstance(data, (torch.Tensor, str, bytes)):
        return data
    if _is_numpy(data):
        is_record = data.dtype.kind == "V" and data.ndim == 0
        if _is_text_array(data) and not is_record:
            return data
        return torch.as_tensor(_array(data))
    if isinstance(data, Mapping):
        return _rebuild_mapping(data, {key: default_convert(data[key]) for key in data})
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*map(default_convert, data))
    if isinstance(data, tuple):
        return [default_convert(item) for item in data]
    if isinstance(data, Sequence):
        return _rebuild_sequence(data, [default_convert(item) for item in data])
    return data


def collate(batch: Sequence[Any], *, collate_fn_map: dict[Any, Callable] | None = None) -> Any:
    """Like :func:`default_collate`, with further types: ``{type: fn(batch, collate_fn_map=)}``."""
    first = batch[0]
    if collate_fn_map:
        fn = collate_fn_map.get(type(first))
        if fn is None:
            fn = next((f for t, f in collate_fn_map.items() if isinstance(first, t)), None)
        if fn is not None:
            return fn(batch, collate_fn_map=collate_fn_map)

    def again(column: Any) -> Any:
        return collate(column, collate_fn_map=collate_fn_map)

    if isinstance(first, torch.Tensor):
        return torch.stack(list(batch), 0)
    if isinstance(first, (str, bytes)):  # NumPy's too
        return batch
    if _is_numpy(first):
        if first.ndim == 0 and not _is_text_array(first):
            return torch.as_tensor(list(batch))  # of the dtype that holds them all
        if _is_text_array(first):
            raise TypeError(_unsupported(first.dtype))
        return torch.stack([torch.as_tensor(_array(value)) for value in batch], 0)
    if isinstance(first, float):
        return torch.tensor(batch, dtype=torch.float64)
    if isinstance(first, int):
        return torch.tensor(batch)
    if isinstance(first, Mapping):
        columns = {key: again([sample[key] for sample in batch]) for key in first}
        return _rebuild_mapping(first, columns)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(again(column) for column in zip(*batch, strict=True)))
    if isinstance(first, Sequence):
        if any(len(sample) != len(first) for sample in batch):
            raise RuntimeError("each element in list of batch should be of equal size")
        columns = [again(column) for column in zip(*batch, strict=True)]
        return columns if isinstance(first, tuple) else _rebuild_sequence(first, columns)
    raise TypeError(_unsupported(type(first)))


def _array(value: Any) -> Any:
    """An array of its own for a NumPy scalar, whose memory cannot be shared."""
    return value.__array__()


def _unsupported(kind: Any) -> str:
    return (
        "default_collate: batch must contain tensors, numpy arrays, numbers, dicts or lists; "
        f"found {kind}"
    )


def default_collate(batch: Sequence[Any]) -> Any:
    """One batch from a list of samples.

    Tensors and arrays are stacked along a new first dimension, numbers become a 1-d tensor
    (floats float64, integers int64), strings stay a list, and mappings, named tuples and sequences
    are collated by field. Raises TypeError for anything else and RuntimeError for sequences of
    different lengths.
    """
    return collate(batch)
