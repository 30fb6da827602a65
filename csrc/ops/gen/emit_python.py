"""Writes the Python bindings of every op: argument tables, overload dispatch, conversions. The
runtime that reads the tables is csrc/python/arguments.h."""

from __future__ import annotations

import ast
from collections import OrderedDict

from emit_front import BANNER
from schema import Arg
from table import Op

KINDS = {
    "Tensor": "Tensor",
    "Tensor?": "Tensor",
    "Tensor!": "Tensor",
    "Tensor|Scalar": "TensorOrScalar",
    "Tensor|Scalar?": "TensorOrScalar",
    "Tensor[]": "TensorList",
    "Tensor?[]": "OptionalTensorList",
    "Tensor![]": "TensorList",
    "Scalar": "Scalar",
    "Scalar?": "Scalar",
    "Scalar[]": "ScalarList",
    "int": "Int",
    "int?": "Int",
    "float": "Float",
    "float?": "Float",
    "bool": "Bool",
    "bool?": "Bool",
    "int[]": "IntList",
    "int[]?": "IntList",
    "float[]": "FloatList",
    "dtype": "DType",
    "dtype?": "DType",
    "device": "Device",
    "device?": "Device",
    "Generator?": "Generator",
    "foreign": "Foreign",
    "str": "Str",
    "str?": "Str",
    "memory_format?": "MemoryFormat",
}


class Binding:
    """One Python name with its overloads. `suffix` is "_" for in-place forms."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.overloads: list[tuple[Op, str]] = []
        self.function = False
        self.method = False


def collect(ops: list[Op]) -> list[Binding]:
    """Groups the table's ops by Python name, aliases included."""
    bindings: OrderedDict[str, Binding] = OrderedDict()

    def add(name: str, op: Op, suffix: str, function: bool, method: bool) -> None:
        binding = bindings.setdefault(name, Binding(name))
        if (op, suffix) not in binding.overloads:
            binding.overloads.append((op, suffix))
        binding.function |= function
        binding.method |= method

    for op in ops:
        public = op.python_name
        name = public if public is not None else op.name.split(".")[0]
        function = "function" in op.variants or public is None
        has_self = bool(op.schema.args) and op.schema.args[0].is_tensor
        method = "method" in op.variants and public is not None and has_self
        for alias in [name, *op.row.get("aliases", [])]:
            add(alias, op, "", function, method)
        for alias in op.row.get("method_aliases", []):
            add(alias, op, "", False, True)
        if op.inplace:
            for alias in [name, *op.row.get("aliases", [])]:
                add(alias + "_", op, "_", "function" in op.variants, method)
    return list(bindings.values())


def _signature_text(op: Op, suffix: str) -> str:
    parts, star = [], False
    for a in op.schema.args:
        if a.kwonly and not star:
            parts.append("*")
            star = True
        kind = a.type.replace("!", "").replace("|Scalar", " or Number")
        parts.append(f"{kind} {a.name}" + (f"={a.default}" if a.default is not None else ""))
    base = (op.python_name or op.name.split(".")[0]) + suffix
    return f"{base}({', '.join(parts)})".replace('"', '\\"')


def _flags(a: Arg, varargs: bool) -> str:
    flags = []
    if a.kwonly:
        flags.append("kKeywordOnly")
    if a.default is not None:
        flags.append("kHasDefault")
    if a.type.endswith("?") or a.default == "None" or a.type == "Tensor?[]":
        flags.append("kNullable")
    if varargs:
        flags.append("kVarArgs")
    if a.repeat:
        flags.append("kRepeat")
    return " | ".join(flags) or "0"


# Pointwise ops that torch computes for two Python numbers as well.
NUMBERS_ALONE = {"add", "sub", "mul", "div", "floor_divide"}
EXTRA_FACTORY = ("requires_grad", "layout", "pin_memory")


def varargs_position(op: Op) -> int | None:
    """Which argument also takes its numbers spread, as in `x.view(2, 3)`: a list of ints that is
    the only positional argument after self."""
    positional = [a for a in op.schema.args if not a.kwonly]
    at = 1 if positional and positional[0].is_tensor else 0
    lists = at == len(positional) - 1 and positional[at].type in ("int[]", "int[]?")
    return at if lists else None


def _specs(op: Op, suffix: str) -> list[str]:
    varargs = varargs_position(op)
    out = []
    for i, a in enumerate(op.schema.args):
        out.append(f'{{"{a.name}", ArgKind::{KINDS[a.type]}, {_flags(a, i == varargs)}}}')
    if op.is_factory:
        for name in EXTRA_FACTORY:
            if name not in {a.name for a in op.schema.args}:
                out.append(f'{{"{name}", ArgKind::Any, kKeywordOnly | kHasDefault | kNullable}}')
    if takes_out(op, suffix):
        out.append('{"out", ArgKind::Any, kKeywordOnly | kHasDefault | kNullable}')
    return out


def takes_out(op: Op, suffix: str) -> bool:
    if suffix or op.mutated or op.kind == "view" or op.row.get("out") is False:
        return False
    kinds = {k for k, _ in op.schema.returns}
    return kinds == {"Tensor"}


def cpp_default(a: Arg) -> str:
    """C++ source of an argument's default value."""
    d = a.default
    assert d is not None
    if a.is_tensor or a.is_list or a.type == "Generator?":
        if d == "[]" or d == "None":
            return (
                f"{'TensorSpan()' if a.is_list else 'Tensor()' if a.is_tensor else 'Generator()'}"
            )
        value = ast.literal_eval(d)
        return f"wrapped_scalar(Scalar({_number(value)}))"
    if d == "None":
        return "std::nullopt"
    if a.type.startswith("str"):
        return '"' + ast.literal_eval(d) + '"'
    if a.type in ("int[]", "int[]?"):
        value = ast.literal_eval(d)
        items = [value] * (a.repeat or 1) if isinstance(value, int) else list(value)
        return f"IntListHolder{{{', '.join(str(v) for v in items)}}}"
    if a.type == "float[]":
        return "{}"
    if a.type in ("Scalar", "Scalar?"):
        return f"Scalar({_number(ast.literal_eval(d))})"
    if a.type.startswith("dtype"):
        return f"DType::{_dtype_name(d)}"
    if a.type.startswith("memory_format"):
        return {
            "contiguous_format": "MemoryFormat::Contiguous",
            "preserve_format": "MemoryFormat::Preserve",
        }[d.split(".")[-1]]
    value = ast.literal_eval(d)
    if a.type.startswith("float"):
        return f"double({value!r})"
    return _number(value)


def _dtype_name(text: str) -> str:
    known = {
        "bool": "Bool",
        "uint8": "UInt8",
        "int8": "Int8",
        "int16": "Int16",
        "int32": "Int32",
        "int64": "Int64",
        "long": "Int64",
        "float16": "Float16",
        "bfloat16": "BFloat16",
        "float32": "Float32",
        "float64": "Float64",
    }
    return known[text.split(".")[-1].strip("\"'")]


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"int64_t{{{value}}}"
    if value in (float("inf"), float("-inf")):
        return ("-" if value < 0 else "") + "std::numeric_limits<double>::infinity()"
    return repr(value)


READERS = {
    "Tensor": ("TensorArg", "tensor_arg({s})"),
    "TensorOrScalar": ("TensorArg", "tensor_or_scalar_arg({s})"),
    "TensorList": ("TensorListArg", "tensor_list_arg({s})"),
    "OptionalTensorList": ("TensorListArg", "optional_tensor_list_arg({s})"),
    "Scalar": ("Scalar", "scalar_arg({s})"),
    "ScalarList": ("std::vector<Scalar>", "scalar_list_arg({s})"),
    "Int": ("int64_t", "int_arg({s})"),
    "Float": ("double", "float_arg({s})"),
    "Bool": ("bool", "bool_arg({s})"),
    "IntList": ("IntListHolder", "int_list_arg({s}, {n})"),
    "FloatList": ("std::vector<double>", "float_list_arg({s})"),
    "DType": ("DType", "dtype_arg({s})"),
    "Device": ("Device", "device_arg({s})"),
    "Generator": ("Generator", "generator_arg({s})"),
    "Foreign": ("Ref<ForeignFunction>", "foreign_arg({s})"),
    "Str": ("std::string_view", "str_arg({s})"),
    "MemoryFormat": ("MemoryFormat", "memory_format_arg({s})"),
}


def _read_arg(a: Arg, slot: int) -> str:
    kind = KINDS[a.type]
    reader = READERS[kind][1].format(s=f"slots[{slot}]", n=a.repeat)
    ctype = READERS[kind][0]
    if kind in ("Tensor", "TensorOrScalar"):
        if a.default is not None and a.default != "None":
            return f"      const TensorArg {a.name} = slots[{slot}] ? {reader} : TensorArg({cpp_default(a)});\n"
        return f"      const TensorArg {a.name} = {reader};\n"  # null slot reads as an undefined tensor
    if kind in ("TensorList", "OptionalTensorList"):
        return f"      const {ctype} {a.name} = {reader};\n"
    nullable = a.type.endswith("?")
    if kind == "IntList" and nullable:
        base = f"slots[{slot}] ? std::optional<IntListHolder>({reader}) : std::nullopt"
        if a.default not in (None, "None"):
            base = f"slots[{slot}] ? std::optional<IntListHolder>({reader}) : std::optional<IntListHolder>({cpp_default(a)})"
        return (
            f"      const std::optional<IntListHolder> {a.name}_holder = {base};\n"
            f"      const std::optional<IntSpan> {a.name} = {a.name}_holder ? "
            f"std::optional<IntSpan>(*{a.name}_holder) : std::nullopt;\n"
        )
    if kind == "Generator":
        return f"      const Generator {a.name} = slots[{slot}] ? {reader} : Generator();\n"
    if nullable:
        full = f"std::optional<{ctype}>"
        default = "std::nullopt" if a.default in (None, "None") else f"{full}({cpp_default(a)})"
        return f"      const {full} {a.name} = slots[{slot}] ? {full}({reader}) : {default};\n"
    if a.default is not None:
        default = cpp_default(a)
        if default == "std::nullopt":
            default = f"{ctype}()"
        return f"      const {ctype} {a.name} = slots[{slot}] ? {reader} : {ctype}({default});\n"
    return f"      const {ctype} {a.name} = {reader};\n"


def _needs_a_tensor(op: Op) -> str:
    """Refuses a pointwise op over numbers alone: there is nothing to take a dtype from."""
    either = [i for i, a in enumerate(op.schema.args) if a.type == "Tensor|Scalar"]
    has_tensor = any(a.is_tensor and a.type == "Tensor" for a in op.schema.args)
    if op.kind != "pointwise" or has_tensor or not either or op.name in NUMBERS_ALONE:
        return ""
    found = " || ".join(f"is_tensor(slots[{i}])" for i in either)
    return (
        f'      check_type({found}, "{op.python_name}(): at least one argument must be a Tensor, "\n'
        '                 "not only Numbers");\n'
    )


def _call(op: Op, suffix: str) -> str:
    code = _needs_a_tensor(op)
    code += "".join(_read_arg(a, i) for i, a in enumerate(op.schema.args))
    n = len(op.schema.args)
    heavy = [a.name for a in op.schema.args if a.is_tensor or a.is_list]
    gil = f"      ReleaseGil gil(work_size({', '.join(heavy)}));\n" if heavy else ""
    if op.row.get("capture") == "creation" or (op.is_factory and not heavy):
        gil = ""
    names = ", ".join(a.name for a in op.schema.args)
    call = f"ops::{op.id}{suffix}({names})"
    ret = "Tensor" if suffix else op.schema.cpp_return
    factory = op.is_factory
    extra = n
    if factory:
        offset = {
            name: n + i
            for i, name in enumerate(
                x for x in EXTRA_FACTORY if x not in {a.name for a in op.schema.args}
            )
        }
        extra = n + len(offset)
    out_slot = f"slots[{extra}]" if takes_out(op, suffix) else None
    if ret == "void":
        return code + gil + f"      {call};\n      gil.reacquire();\n      return none();\n"
    code += gil + f"      auto result = {call};\n" + ("      gil.reacquire();\n" if gil else "")
    if factory and "requires_grad" in offset:
        code += f"      apply_factory_options(result, slots[{offset['requires_grad']}]);\n"
    if out_slot:
        out_name = op.python_name or op.name.split(".")[0]
        if ret == "Tensor":
            code += f'      if ({out_slot}) return write_out("{out_name}", {out_slot}, result);\n'
        else:
            parts = ", ".join(f"std::get<{i}>(result)" for i in range(len(op.schema.returns)))
            code += (
                f"      if ({out_slot})\n"
                f'        return write_out_tuple("{out_name}", {out_slot}, {{{parts}}});\n'
            )
    if ret.startswith("std::tuple"):
        fields = [name for _, name in op.schema.returns]
        parts = ", ".join(f"std::get<{i}>(result)" for i in range(len(fields)))
        if all(fields):
            names_list = ", ".join(f'"{f}"' for f in fields)
            base = op.python_name or op.name.split(".")[0]
            code += f'      return wrap_named("{base}", {{{names_list}}}, {{{parts}}});\n'
        else:
            code += f"      return wrap_tuple({{{parts}}});\n"
        return code
    if suffix or op.schema.returns_self:
        first = op.schema.args[0] if suffix else op.mutated[0]
        index = [a.name for a in op.schema.args].index(first.name)
        return code + f"      (void)result;\n      return new_reference(slots[{index}]);\n"
    return code + "      return wrap(result);\n"


def binding_code(binding: Binding) -> str:
    ident = binding.name
    code = f"// {ident}\n"
    rows = []
    for i, (op, suffix) in enumerate(binding.overloads):
        specs = _specs(op, suffix)
        code += f"constexpr ArgSpec {ident}_args{i}[] = {{{', '.join(specs)}}};\n" if specs else ""
        span = f"{ident}_args{i}" if specs else "{}"
        rows.append(f'    Signature("{_signature_text(op, suffix)}", {span}),\n')
    code += f"Signature {ident}_signatures[] = {{\n{''.join(rows)}}};\n"
    code += (
        f"PyObject* call_{ident}(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {{\n"
        f"  return guarded([&]() -> PyObject* {{\n    PyObject* slots[kMaxArgs];\n    ArgumentOwner owner;\n"
        f'    switch (match("{ident}", {ident}_signatures, self, args, nargs, kwnames, slots, owner)) {{\n'
    )
    for i, (op, suffix) in enumerate(binding.overloads):
        code += f"    case {i}: {{\n{_call(op, suffix)}    }}\n"
    code += "    default: return nullptr;\n    }\n  });\n}\n"
    if binding.method:
        code += (
            f"PyObject* method_{ident}(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {{\n"
            f"  return call_{ident}(self, args, nargs, kwnames);\n}}\n"
        )
    if binding.function:
        code += (
            f"PyObject* function_{ident}(PyObject*, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {{\n"
            f"  return call_{ident}(nullptr, args, nargs, kwnames);\n}}\n"
        )
    return code


def doc_text(binding: Binding) -> str:
    lines = []
    for op, suffix in binding.overloads:
        lines.append(_signature_text(op, suffix).replace('\\"', "'"))
    text = "\n".join(lines) + "\n\n" + binding.overloads[0][0].row["doc"].strip()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def python_file(bindings: list[Binding], index: int) -> str:
    out = [
        BANNER,
        '#include "python/arguments.h"\n#include "vt/ops.h"\n\nnamespace vt::python {\nnamespace {\n\n',
    ]
    for b in bindings:
        out.append(binding_code(b))
    out.append(
        f"\n}}  // namespace\n\nvoid collect_ops_{index}(std::vector<PyMethodDef>& methods, "
        "std::vector<PyMethodDef>& functions) {\n  constexpr int kFlags = METH_FASTCALL | METH_KEYWORDS;\n"
    )
    for b in bindings:
        doc = doc_text(b)
        if b.method:
            out.append(
                f'  methods.push_back({{"{b.name}", as_cfunction(method_{b.name}), kFlags, "{doc}"}});\n'
            )
        if b.function:
            out.append(
                f'  functions.push_back({{"{b.name}", as_cfunction(function_{b.name}), kFlags, "{doc}"}});\n'
            )
    out.append("}\n\n}  // namespace vt::python\n")
    return "".join(out)
