"""Schemas of custom ops: from text or a function's annotations, and binding calls to them."""

from __future__ import annotations

import collections.abc
import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vibetensor import _C

#: What numbers are made of, NumPy's too, and what functions get: as in torch a bool is also an int.
_NUMBERS: dict[str, tuple[tuple[type, ...], Callable[[Any], Any]]] = {
    "int": ((numbers.Integral, np.bool_), int),
    "float": ((numbers.Real, np.bool_), float),
    "bool": ((numbers.Real, np.bool_), bool),
}
#: The types an argument may have, as schemas write them; "?" marks one that may be None.
_ARGUMENT_TYPES = ("Tensor", "int", "float", "bool", "str", "int[]", "float[]", "dtype", "device")
_ANNOTATIONS: dict[Any, str] = {
    _C.Tensor: "Tensor",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    _C.dtype: "dtype",
    _C.device: "device",
}
MISSING: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One argument: its type, whether it may be None, is changed in place, or is keyword-only."""

    name: str
    type: str
    optional: bool = False
    mutated: bool = False
    keyword_only: bool = False
    default: Any = MISSING

    @property
    def is_tensor(self) -> bool:
        return self.type == "Tensor"

    def __str__(self) -> str:
        mark = "!" if self.mutated else ""
        default = "" if self.default is MISSING else f"={self.default!r}"
        return f"{self.type}{mark}{'?' if self.optional else ''} {self.name}{default}"

    def check(self, op: str, value: Any) -> Any:
        """The value as the op's functions get it. Raises TypeError for one of another type."""
        if value is None and self.optional:
            return None
        if self.is_tensor:
            fits = isinstance(value, _C.Tensor)
        elif self.type in _NUMBERS:
            kinds, made = _NUMBERS[self.type]
            if fits := isinstance(value, kinds):
                value = made(value)
        elif self.type.endswith("[]"):
            kinds, made = _NUMBERS[self.type[:-2]]
            items = value if isinstance(value, list | tuple) else (None,)
            if fits := all(isinstance(v, kinds) for v in items):
                value = [made(v) for v in items]
        elif self.type == "str":
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, _C.dtype if self.type == "dtype" else _C.device | str)
        if not fits:
            wanted = f"{self.type}{' or None' if self.optional else ''}"
            raise TypeError(
                f"{op}(): argument '{self.name}' must be {wanted}, not {type(value).__name__}"
            )
        return value


@dataclass(frozen=True)
class Schema:
    """The arguments of an op and its results, all of them tensors ("" where one has no name)."""

    arguments: tuple[Argument, ...]
    results: tuple[str, ...]
    single: bool  # one tensor, not a tuple of one

    def __str__(self) -> str:
        parts: list[str] = []
        for a in self.arguments:
            if a.keyword_only and "*" not in parts:
                parts.append("*")
            parts.append(str(a))
        results = ", ".join(f"Tensor {name}".strip() for name in self.results)
        return f"({', '.join(parts)}) -> {results if self.single else f'({results})'}"

    @property
    def mutates(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.arguments if a.mutated)

    def bind(self, op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The value of every argument, in order. Raises TypeError as Python does for functions."""
        positional = [a for a in self.arguments if not a.keyword_only]
        if len(args) > len(positional):
            raise TypeError(
                f"{op}() takes {len(positional)} positional arguments but {len(args)} were given; "
                f"its schema is {self}"
            )
        values: list[Any] = []
        for i, a in enumerate(self.arguments):
            if i < len(args) and not a.keyword_only:
                if a.name in kwargs:
                    raise TypeError(f"{op}() got multiple values for argument '{a.name}'")
                value = args[i]
            elif a.name in kwargs:
                value = kwargs[a.name]
            elif a.default is not MISSING:
                value = a.default
            else:
                raise TypeError(f"{op}() missing argument '{a.name}'; its schema is {self}")
            values.append(a.check(op, value))
        known = {a.name for a in self.arguments}
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError(f"{op}() got an unexpected keyword argument '{unknown[0]}'")
        return values


def parse(text: str) -> Schema:
    """`(Tensor x, Tensor!? y, *, float scale=1.0) -> (Tensor, Tensor rest)`. Raises ValueError."""
    match = re.fullmatch(r"\s*\((?P<arguments>.*?)\)\s*->\s*(?P<results>.+?)\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"schema '{text}': expected '(ARGUMENTS) -> RESULTS'")
    arguments: list[Argument] = []
    keyword_only = False
    for part in filter(None, (p.strip() for p in _split(match["arguments"]))):
        if part == "*":
            keyword_only = True
            continue
        # torch writes Tensor(a!) for what is here Tensor!.
        found = re.fullmatch(
            r"(\w+(?:\[\])?)(!|\(\w+!\))?(\?)?(!|\(\w+!\))?\s+(\w+)(?:\s*=\s*(.+))?", part
        )
        if found is None or found[1] not in _ARGUMENT_TYPES:
            raise ValueError(
                f"schema '{text}': '{part}' is no argument; the types are "
                f"{', '.join(_ARGUMENT_TYPES)}, with '?' if it may be None, '!' if it is changed"
            )
        default = MISSING if found[6] is None else _literal(text, found[6])
        arguments.append(
            Argument(found[5], found[1], bool(found[3]), bool(found[2] or found[4]),
                     keyword_only, default)
        )  # fmt: skip
    results = match["results"]
    several = results.startswith("(")
    names = []
    for part in filter(None, (p.strip() for p in results.strip("()").split(","))):
        found = re.fullmatch(r"Tensor(?:\s+(\w+))?", part)
        if found is None:
            raise ValueError(f"schema '{text}': the results are tensors, not '{part}'")
        names.append(found[1] or "")
    return checked(Schema(tuple(arguments), tuple(names), not several), f"schema '{text}'")


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _literal(schema: str, text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise ValueError(f"schema '{schema}': '{text}' is no default value") from None


def checked(schema: Schema, where: str) -> Schema:
    """The schema, if it is one. Raises ValueError."""
    names = [a.name for a in schema.arguments] + [r for r in schema.results if r]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{where}: named twice: {', '.join(twice)}")
    if not any(a.is_tensor for a in schema.arguments):
        raise ValueError(f"{where}: an op takes at least one tensor")
    for a in schema.arguments:
        if a.mutated and not a.is_tensor:
            raise ValueError(f"{where}: only tensors are changed in place, not '{a.name}'")
    if not schema.results and not schema.mutates:
        raise ValueError(f"{where}: an op has results or changes an argument")
    return schema


def infer(function: Callable[..., Any], mutates: Sequence[str]) -> Schema:
    """From a function's annotations, as torch.library.infer_schema. Raises ValueError."""
    where = f"infer_schema({getattr(function, '__name__', 'function')})"
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise ValueError(f"{where}: an annotation cannot be resolved: {error}") from None
    arguments = []
    for name, p in inspect.signature(function).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(f"{where}: *args and **kwargs are not supported")
        if name not in hints:
            raise ValueError(f"{where}: parameter '{name}' needs a type annotation")
        kind, optional = _type_of(hints[name], where, name)
        arguments.append(
            Argument(name, kind, optional, name in mutates, p.kind is p.KEYWORD_ONLY, p.default)
        )
    if unknown := set(mutates) - {a.name for a in arguments}:
        raise ValueError(f"{where}: mutates_args names {sorted(unknown)}, which is no parameter")
    if "return" not in hints:
        raise ValueError(f"{where}: the return value needs a type annotation")
    count, single = _results_of(hints["return"], where)
    return checked(Schema(tuple(arguments), ("",) * count, single), where)


def _type_of(hint: Any, where: str, name: str) -> tuple[str, bool]:
    if hint in _ANNOTATIONS:
        return _ANNOTATIONS[hint], False
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = [a for a in inner if a is not type(None)]
        if len(rest) == 1 and len(inner) == 2:
            return _type_of(rest[0], where, name)[0], True
    if origin in (list, collections.abc.Sequence) and inner[0] in (int, float):
        return f"{_ANNOTATIONS[inner[0]]}[]", False
    raise ValueError(
        f"{where}: parameter '{name}' has the type {hint}, which no op takes; use Tensor, "
        "int, float, bool, str, Sequence[int], Sequence[float], dtype, device or Optional of one"
    )


def _results_of(hint: Any, where: str) -> tuple[int, bool]:
    if hint is type(None):
        return 0, False
    if hint is _C.Tensor:
        return 1, True
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and inner and all(i is _C.Tensor for i in inner):
        return len(inner), False
    raise ValueError(f"{where}: the return type must be Tensor, a tuple of Tensors or None")
