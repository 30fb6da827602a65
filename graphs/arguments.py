"""What a captured function is called with: which capture a call belongs to, and the tensors that stand
for its inputs in replays."""

from __future__ import annotations

import functools
import types
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.structure import flatten, from_array

# An object to call among the arguments may hold others so deep; more of them would be a cycle.
_DEEPEST = 8


class CaptureError(RuntimeError):
    """A step that cannot be captured, with the reason and the way out."""


class Fixed:
    """What is compared by identity and yet means the same each time."""


def key_of(name: str, leaves: list[Any], spec: Any) -> Any:
    """What tells calls apart that need captures of their own: structure, modes, and of each leaf what
    a capture is bound to. name: of the function, for errors. Raises CaptureError for an argument that
    may change unseen."""
    parts: list[Any] = [spec, modes()]
    places: dict[int, int] = {}
    copies: dict[tuple[Any, ...], int] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, vt.Tensor):
            # Which arguments share memory, and which are one tensor, belongs to the course too;
            # where they lie in it does not, as each has its copy.
            place = leaf._storage_key()
            parts.append(places.setdefault(place, index))
            if is_state(leaf):
                parts.append(id(leaf))
            else:
                parts.append(copies.setdefault((place, *geometry(leaf)), index))
                parts.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, str(leaf.device)))
        elif is_array(leaf):
            parts.append((leaf.shape, leaf.dtype.str))
        else:
            parts.append(_constant(name, leaf))
    key = tuple(parts)
    try:
        hash(key)
    except TypeError as error:
        raise CaptureError(
            f"{name}: every argument of a captured function is a tensor, an array, a "
            f"hashable constant or a tuple, list or dict of those ({error})"
        ) from None
    return key


def _constant(name: str, value: Any, depth: int = 0) -> Any:
    """The part of a key that an argument is which is no tensor and no array."""
    if isinstance(value, float):
        return type(value), value.hex()  # 0.0 and -0.0 are equal, and not the same
    if value is None or type(value).__hash__ is not object.__hash__ or _is_fixed(value):
        return type(value), value
    attributes = attributes_of(value) if depth < _DEEPEST else None
    if attributes is None or any(
        isinstance(x, vt.Tensor) or is_array(x) for x in attributes.values()
    ):
        raise CaptureError(
            f"{name}: an argument of type {type(value).__name__} is compared by "
            "identity, so a capture would not see what changes in it; pass its tensors"
        )
    return value, *((key, _constant(name, x, depth + 1)) for key, x in attributes.items())


def modes() -> tuple[Any, ...]:
    """The modes that ops run in."""
    return (
        vt.is_grad_enabled(),
        vt.is_inference_mode_enabled(),
        vt.are_deterministic_algorithms_enabled(),
        _C._get_autocast("cpu"),
        _C._get_autocast("cuda"),
        vt.get_default_dtype(),
        str(vt.get_default_device()),
        _C._kernel_switches(),
    )


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, vt.Tensor)


def is_array(value: Any) -> bool:
    """Whether it is a NumPy array, or anything with the array interface."""
    return not isinstance(value, vt.Tensor) and hasattr(value, "__array_interface__")


def is_state(tensor: Any) -> bool:
    """Whether it is used as it is, and not copied: what is trained."""
    return tensor.requires_grad


_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    type,
    functools.partial,
    type(functools.lru_cache(flatten)),
)
# What changes in the former two is noticed.
_FIXED = (vt.nn.Module, vt.optim.Optimizer, vt.dtype, Fixed, *_FUNCTIONS)


def _is_fixed(value: Any) -> bool:
    """Whether it is compared by identity and yet means the same each time; a function is itself."""
    return isinstance(value, _FIXED)


def attributes_of(value: Any) -> dict[str, Any] | None:
    """What an object to call has besides its code, a loss function with options say; None for other
    arguments."""
    if not callable(value) or _is_fixed(value) or type(value).__hash__ is not object.__hash__:
        return None
    names = [*getattr(value, "__dict__", ())]
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def stage(leaves: list[Any]) -> list[Any]:
    """The tensors that stand for inputs in replays; None for what is used as it is."""
    made: dict[tuple[Any, ...], Any] = {}
    staged = []
    for value in leaves:
        if is_array(value):
            staged.append(from_array(value).clone())
        elif not is_tensor(value) or is_state(value):
            staged.append(None)
        else:
            place = (value._storage_key(), *geometry(value))
            if place not in made:
                made[place] = value.detach().clone()
            staged.append(made[place])
    return staged


def copies_apart(leaves: list[Any], staged: list[Any]) -> list[tuple[Any, Any]]:
    """Arguments that share memory, and whose copies do not: right while none of them is written."""
    copies: dict[int, dict[int, tuple[Any, Any]]] = {}
    for leaf, place in zip(leaves, staged):
        if place is not None and is_tensor(leaf):
            copies.setdefault(leaf._storage_key(), {})[id(place)] = (leaf, place)
    return [pair for found in copies.values() if len(found) > 1 for pair in found.values()]


def given(value: Any, place: Any) -> Any:
    """What the function gets for an argument: an array comes on the default device."""
    return place.to(vt.get_default_device()) if is_array(value) else place


def geometry(tensor: Any) -> tuple[Any, ...]:
    """Where it lies in its storage: offset in bytes, dtype, shape, strides."""
    return (
        tensor.storage_offset() * tensor.dtype.itemsize,
        tensor.dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )
