"""Writes `vibetensor/_ops.pyi`: the types of every op, for editors and type checkers."""

from __future__ import annotations

import keyword

from emit_python import EXTRA_FACTORY, Binding, collect, takes_out, varargs_position
from schema import Arg
from table import Op

HEADER = '''\
# Generated from csrc/ops/table by csrc/ops/gen. Do not edit.
"""The ops of the table: functions of vibetensor.torch, and the methods of its Tensor."""

import builtins
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, overload

import numpy

Number: TypeAlias = builtins.int | builtins.float | builtins.bool
_Operand: TypeAlias = "Tensor | Number | numpy.ndarray[Any, Any] | numpy.generic"
_dtype: TypeAlias = Any
_device: TypeAlias = Any
_generator: TypeAlias = Any
_memory_format: TypeAlias = Any

'''

# The operators of csrc/python/tensor_type.cpp.
_OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]
_OPERATORS += ["and", "or", "xor", "lshift", "rshift"]
_BOTH_WAYS = [f"__{side}{name}__" for name in _OPERATORS for side in ("", "r", "i")]
_BINARY = [*_BOTH_WAYS, "__matmul__", "__rmatmul__", "__lt__", "__le__", "__gt__", "__ge__"]
_COMPARE = "def {}(self, other: Any) -> Tensor: ...  # type: ignore[override]"
TENSOR_PROTOCOL = [
    *(f"def {name}(self, other: _Operand) -> Tensor: ..." for name in _BINARY),
    _COMPARE.format("__eq__"),
    _COMPARE.format("__ne__"),
    "def __hash__(self) -> builtins.int: ...",
    *(f"def {name}(self) -> Tensor: ..." for name in ("__neg__", "__pos__", "__abs__")),
    "def __invert__(self) -> Tensor: ...",
    "def __bool__(self) -> builtins.bool: ...",
    "def __int__(self) -> builtins.int: ...",
    "def __index__(self) -> builtins.int: ...",
    "def __float__(self) -> builtins.float: ...",
    "def __len__(self) -> builtins.int: ...",
    "def __iter__(self) -> Iterator[Tensor]: ...",
    "def __contains__(self, element: Tensor | Number) -> builtins.bool: ...",
    "def __getitem__(self, index: Any) -> Tensor: ...",
    "def __setitem__(self, index: Any, value: Any) -> None: ...",
    "def __reversed__(self) -> Tensor: ...",
    "def __array__(self, dtype: Any = None, copy: Any = None) -> numpy.ndarray[Any, Any]: ...",
    "def __dlpack__(self, **options: Any) -> Any: ...",
    "def __dlpack_device__(self) -> tuple[builtins.int, builtins.int]: ...",
]

TYPES = {
    "Tensor": "Tensor",
    "Tensor!": "Tensor",
    "Tensor|Scalar": "Tensor | Number",
    "Tensor[]": "Sequence[Tensor]",
    "Tensor?[]": "Sequence[Tensor | None]",
    "Tensor![]": "Sequence[Tensor]",
    "Scalar": "Number",
    "Scalar[]": "Sequence[Number]",
    "int": "builtins.int",
    "float": "builtins.float",
    "bool": "builtins.bool",
    "int[]": "Sequence[builtins.int]",
    "float[]": "Sequence[builtins.float]",
    "dtype": "_dtype",
    "device": "_device",
    "Generator": "_generator",
    "foreign": "Any",
    "str": "builtins.str",
    "memory_format": "_memory_format",
}
RETURNS = {**TYPES, "Tensor[]": "tuple[Tensor, ...]", "Scalar": "Number"}


def annotation(a: Arg) -> str:
    kind = a.type
    nullable = kind.endswith("?") or a.default == "None"
    text = TYPES[kind.removesuffix("?")]
    if kind.startswith("int[]"):
        text += " | builtins.int"  # one number stands for a list of one, or for each of several
    return f"{text} | None" if nullable else text


def named_tuple(op: Op) -> str:
    return f"_{(op.python_name or op.id).strip('_')}_result"


def returns(op: Op, suffix: str) -> str:
    kinds = op.schema.returns
    if suffix or op.schema.returns_self:
        return "Tensor"
    if not kinds:
        return "None"
    if len(kinds) == 1:
        return RETURNS[kinds[0][0]]
    if all(name for _, name in kinds):
        return named_tuple(op)
    return f"tuple[{', '.join(RETURNS[kind] for kind, _ in kinds)}]"


def signatures(op: Op, suffix: str, method: bool) -> list[str]:
    """The parameter lists under which the op can be called: with a list of sizes, and spread."""
    varargs = varargs_position(op)
    forms = [False, True] if varargs is not None else [False]
    out = []
    for spread in forms:
        parts, star = [], False
        for i, a in enumerate(op.schema.args):
            if method and i == 0:
                parts.append("self")
                continue
            name = "input" if a.name == "self" and not method else a.name
            name += "_" if keyword.iskeyword(name) else ""
            if a.kwonly and not star:
                if not spread:
                    parts.append("*")
                star = True
            if spread and i == varargs:
                parts.append(f"*{name}: builtins.int")
                star = True
                continue
            default = f" = {a.default}" if a.default is not None else ""
            if a.default == "[]":
                default = " = ()"
            parts.append(f"{name}: {annotation(a)}{default}")
        extras = []
        if op.is_factory:
            extras += [n for n in EXTRA_FACTORY if n not in {a.name for a in op.schema.args}]
        if takes_out(op, suffix) and not method:
            extras.append("out")
        if extras and not star:
            parts.append("*")
        parts += [f"{name}: Any = None" for name in extras]
        out.append(f"({', '.join(parts)}) -> {returns(op, suffix)}: ...")
    return out


def definitions(binding: Binding, method: bool) -> list[str]:
    lines = []
    for op, suffix in binding.overloads:
        # Where self is not first, the method is written by hand.
        names = [a.name for a in op.schema.args]
        if method and ("self" in names[1:] or not op.schema.args[0].is_tensor):
            continue
        lines += signatures(op, suffix, method)
    lines = list(dict.fromkeys(lines))
    decorate = "@overload\n" if len(lines) > 1 else ""
    return [f"{decorate}def {binding.name}{line}" for line in lines]


def stub(ops: list[Op]) -> str:
    """The text of `_ops.pyi`."""
    bindings = collect(ops)
    public = sorted(
        (b for b in bindings if not b.name.startswith("_")), key=lambda binding: binding.name
    )
    out = [HEADER]
    shown = {id(op) for binding in public for op, _ in binding.overloads}
    for op in sorted((op for op in ops if id(op) in shown), key=named_tuple):
        if len(op.schema.returns) > 1 and all(name for _, name in op.schema.returns):
            fields = "".join(f"    {name}: Tensor\n" for _, name in op.schema.returns)
            text = f"class {named_tuple(op)}(NamedTuple):\n{fields}\n"
            if text not in out:
                out.append(text)
    out.append("class Tensor:\n")
    out += [f"    {line}\n" for line in TENSOR_PROTOCOL]
    for binding in public:
        if not binding.method:
            continue
        for text in definitions(binding, True):
            out.append("".join(f"    {line}\n" for line in text.split("\n")))
    out.append("    # What is written by hand is not described here.\n")
    out.append("    def __getattr__(self, name: builtins.str) -> Any: ...\n\n")
    for binding in public:
        if binding.function:
            out += [text + "\n" for text in definitions(binding, False)]
    return "".join(out)
