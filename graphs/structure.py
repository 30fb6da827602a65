"""Nested tuples, lists and dicts as a list of leaves and the structure around them.

A structure is `LEAF`, (type, children), or for a dict ((type, default factory), (key, child) pairs);
csrc/python/structure.h reads it too.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import vibetensor.torch as vt

LEAF = object()


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Leaves of nested tuples, lists and dicts, and the structure without them."""
    leaves: list[Any] = []
    return leaves, _structure(value, leaves)


def _structure(node: Any, leaves: list[Any]) -> Any:
    # No closure: one that calls itself is a cycle, and would keep tensors until it is collected.
    if isinstance(node, tuple) or type(node) is list:
        return (type(node), tuple([_structure(item, leaves) for item in node]))
    if type(node) in (dict, OrderedDict, defaultdict):
        made = (type(node), node.default_factory if type(node) is defaultdict else None)
        return (made, tuple([(key, _structure(item, leaves)) for key, item in node.items()]))
    leaves.append(node)
    return LEAF


def unflatten(spec: Any, leaves: list[Any]) -> Any:
    """The containers again, with these leaves in them."""
    return _built(spec, iter(leaves))


def _built(node: Any, leaves: Iterator[Any]) -> Any:
    if node is LEAF:
        return next(leaves)
    kind, items = node
    if isinstance(kind, tuple):
        kind, factory = kind
        pairs = [(key, _built(item, leaves)) for key, item in items]
        return defaultdict(factory, pairs) if kind is defaultdict else kind(pairs)
    values = [_built(item, leaves) for item in items]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def called(
    function: Callable[..., Any], spec: Any, leaves: list[Any]
) -> tuple[list[Any], Any, str]:
    """Calls a function with the arguments (positional, named) that these are. Returns the leaves of its
    result, their structure, and what it did to the containers it was given: "more" where items came or
    are others, "less" where some are gone, empty for nothing."""
    given = unflatten(spec, leaves)
    positional, named = given
    results, structure = flatten(function(*positional, **named))
    return results, structure, _alteration(spec, iter(leaves), given)


def _alteration(node: Any, leaves: Iterator[Any], value: Any) -> str:
    if node is LEAF:
        return "" if value is next(leaves) else "more"
    kind, items = node
    mapping = isinstance(kind, tuple)
    same_kind = type(value) is (kind[0] if mapping else kind)
    if not same_kind or (not mapping and len(value) != len(items)):
        _built(node, leaves)  # passes over what was in it
        return "less" if same_kind and len(value) < len(items) else "more"
    found = [""]
    if not mapping:
        found += [_alteration(item, leaves, part) for item, part in zip(items, value)]
    else:
        found += ["more"] * (value.keys() - {key for key, _ in items} != set())
        for key, item in items:
            if key in value:
                found.append(_alteration(item, leaves, value[key]))
            else:
                _built(item, leaves)
                found.append("less")
    return max(found)  # in this order: nothing, less, more


def from_array(array: Any) -> Any:
    """An array among the leaves as a tensor on its memory; a flipped one (negative strides) is copied."""
    array = np.asarray(array)
    return vt.from_numpy(array.copy() if min(array.strides, default=0) < 0 else array)
