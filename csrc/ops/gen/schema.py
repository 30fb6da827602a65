"""Parses the schema line of an op row: `(Tensor self, int dim=-1, *, Scalar alpha=1) -> Tensor`."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

# Schema type -> (C++ parameter type, type unboxed from a Value, type a node stores).
CPP_TYPES = {
    "Tensor": ("const Tensor&", "Tensor", "SavedTensor"),
    "Tensor?": ("const Tensor&", "Tensor", "SavedTensor"),
    "Tensor!": ("const Tensor&", "Tensor", "SavedTensor"),
    "Tensor|Scalar": ("const Tensor&", "Tensor", "SavedTensor"),
    "Tensor|Scalar?": ("const Tensor&", "Tensor", "SavedTensor"),
    "Tensor[]": ("TensorSpan", "TensorSpan", "SavedTensors"),
    "Tensor?[]": ("TensorSpan", "TensorSpan", "SavedTensors"),
    "Tensor![]": ("TensorSpan", "TensorSpan", "SavedTensors"),
    "Scalar": ("const Scalar&", "Scalar", "Scalar"),
    "Scalar?": ("std::optional<Scalar>", "std::optional<Scalar>", "std::optional<Scalar>"),
    "Scalar[]": ("std::span<const Scalar>", "std::span<const Scalar>", "std::vector<Scalar>"),
    "int": ("int64_t", "int64_t", "int64_t"),
    "int?": ("std::optional<int64_t>", "std::optional<int64_t>", "std::optional<int64_t>"),
    "float": ("double", "double", "double"),
    "float?": ("std::optional<double>", "std::optional<double>", "std::optional<double>"),
    "bool": ("bool", "bool", "bool"),
    "bool?": ("std::optional<bool>", "std::optional<bool>", "std::optional<bool>"),
    "int[]": ("IntSpan", "IntSpan", "Dims"),
    "int[]?": ("std::optional<IntSpan>", "std::optional<IntSpan>", "std::optional<Dims>"),
    "float[]": ("std::span<const double>", "std::span<const double>", "std::vector<double>"),
    "dtype": ("DType", "DType", "DType"),
    "dtype?": ("std::optional<DType>", "std::optional<DType>", "std::optional<DType>"),
    "device": ("Device", "Device", "Device"),
    "device?": ("std::optional<Device>", "std::optional<Device>", "std::optional<Device>"),
    "Generator?": ("const Generator&", "Generator", "Generator"),
    "foreign": (
        "const Ref<ForeignFunction>&",
        "Ref<ForeignFunction>",
        "Ref<ForeignFunction>",
    ),
    "str": ("std::string_view", "std::string_view", "std::string"),
    "str?": (
        "std::optional<std::string_view>",
        "std::optional<std::string_view>",
        "std::optional<std::string>",
    ),
    "memory_format?": (
        "std::optional<MemoryFormat>",
        "std::optional<MemoryFormat>",
        "std::optional<MemoryFormat>",
    ),
}
TENSOR_TYPES = {"Tensor", "Tensor?", "Tensor!", "Tensor|Scalar", "Tensor|Scalar?"}
LIST_TYPES = {"Tensor[]", "Tensor?[]", "Tensor![]"}


class SchemaError(ValueError):
    """A row's schema cannot be understood; the message names the op."""


@dataclass(frozen=True)
class Arg:
    """One argument; `default` is the source text of its default or None."""

    type: str
    name: str
    default: str | None
    kwonly: bool
    repeat: int = 0  # N of int[N]

    @property
    def cpp(self) -> str:
        return CPP_TYPES[self.type][0]

    @property
    def boxed(self) -> str:
        return CPP_TYPES[self.type][1]

    @property
    def saved(self) -> str:
        return CPP_TYPES[self.type][2]

    @property
    def is_tensor(self) -> bool:
        return self.type in TENSOR_TYPES

    @property
    def is_list(self) -> bool:
        return self.type in LIST_TYPES

    @property
    def mutated(self) -> bool:
        return "!" in self.type


@dataclass(frozen=True)
class Schema:
    args: tuple[Arg, ...]
    returns: tuple[tuple[str, str], ...]  # (type, name); names may be empty

    @property
    def returns_self(self) -> bool:
        return len(self.returns) == 1 and self.returns[0][0] == "Tensor!"

    @property
    def cpp_return(self) -> str:
        kinds = [kind for kind, _ in self.returns]
        if not kinds:
            return "void"
        mapped = {
            "Tensor": "Tensor",
            "Tensor!": "Tensor",
            "Tensor[]": "std::vector<Tensor>",
            "bool": "bool",
            "int": "int64_t",
            "float": "double",
            "Scalar": "Scalar",
            "dtype": "DType",
        }
        if len(kinds) == 1:
            return mapped[kinds[0]]
        return "std::tuple<" + ", ".join(mapped[k] for k in kinds) + ">"

    def params(self) -> str:
        return ", ".join(f"{a.cpp} {a.name}" for a in self.args)

    def call_args(self) -> str:
        return ", ".join(a.name for a in self.args)


CPP_KEYWORDS = {
    "and",
    "or",
    "not",
    "xor",
    "bool",
    "int",
    "float",
    "double",
    "new",
    "delete",
    "class",
    "default",
    "do",
    "if",
    "else",
    "for",
    "while",
    "return",
    "switch",
    "case",
    "this",
    "template",
    "union",
    "register",
    "char",
    "short",
    "long",
    "signed",
    "unsigned",
    "void",
    "operator",
    "using",
    "namespace",
}


def _split(text: str) -> list[str]:
    """Splits on commas that are outside brackets and quotes."""
    parts, depth, quote, current = [], 0, "", ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[(":
            depth += 1
        elif c in "])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        current += c
    if current.strip():
        parts.append(current.strip())
    return parts


def parse_arg(op: str, text: str, kwonly: bool) -> Arg:
    head, _, default = text.partition("=")
    words = head.split()
    if len(words) != 2:
        raise SchemaError(
            f"{op}: cannot read argument '{text}'; expected 'type name' or 'type name=default'"
        )
    kind, name = words
    repeat = 0
    match = re.fullmatch(r"int\[(\d+)\](\??)", kind)
    if match:
        repeat = int(match.group(1))
        kind = "int[]" + match.group(2)
    if kind not in CPP_TYPES:
        raise SchemaError(
            f"{op}: argument '{name}' has unknown type '{kind}'; known: {', '.join(CPP_TYPES)}"
        )
    if name in CPP_KEYWORDS:
        raise SchemaError(f"{op}: argument name '{name}' is a C++ keyword")
    default = default.strip()
    if default:
        try:
            value = ast.literal_eval(default)
        except (ValueError, SyntaxError) as error:
            raise SchemaError(
                f"{op}: argument '{name}' has a default that is not a literal: '{default}'"
            ) from error
        if value is None and not kind.endswith("?"):
            raise SchemaError(f"{op}: argument '{name}' of type '{kind}' cannot default to None")
    return Arg(kind, name, default or None, kwonly, repeat)


def parse(op: str, text: str) -> Schema:
    """Parses a schema; errors name `op`."""
    match = re.fullmatch(r"\s*\((.*)\)\s*->\s*(.+?)\s*", text, re.S)
    if not match:
        raise SchemaError(f"{op}: schema must read '(args) -> returns', got '{text}'")
    args: list[Arg] = []
    kwonly = False
    for part in _split(match.group(1)):
        if part == "*":
            kwonly = True
            continue
        args.append(parse_arg(op, part, kwonly))
    names = [a.name for a in args]
    if len(set(names)) != len(names):
        raise SchemaError(f"{op}: duplicate argument names in '{text}'")
    tail = match.group(2)
    if tail == "()":
        returns: list[tuple[str, str]] = []
    elif tail.startswith("("):
        returns = []
        for part in _split(tail[1:-1]):
            kind, _, name = part.partition(" ")
            returns.append((kind, name.strip()))
    else:
        returns = [(tail, "")]
    for kind, _ in returns:
        if kind not in {"Tensor", "Tensor!", "Tensor[]", "bool", "int", "float", "Scalar", "dtype"}:
            raise SchemaError(f"{op}: unknown return type '{kind}'")
    return Schema(tuple(args), tuple(returns))
