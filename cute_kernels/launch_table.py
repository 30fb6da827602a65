"""Generates the C++ launch table: arguments.h, the structures call sites fill in, and table.cpp,
every kernel's variants with their contracts, entry points and measured choices.

The contracts are in the table whether or not a variant was compiled; one that was not has no entry
point and is never chosen. What has not changed is not written, so that nothing is recompiled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .contract import SCALARS, Contract
from .manifest import Built, Manifest
from .model import Model, tile_of
from .registry import Kernel, load
from .tuning_table import Row, Table, models, read_tables, rows_of

_DTYPES = {
    "bfloat16": "BFloat16",
    "float16": "Float16",
    "float32": "Float32",
    "int32": "Int32",
    "int64": "Int64",
    "uint64": "Int64",  # a tensor has no unsigned dtype of that size
    "uint8": "UInt8",
}
_ACCESS = {"read": "Read", "write": "Write", "update": "Update"}
_SCALAR_FIELDS = {"float32": "f32", "int32": "i32", "int64": "i64", "uint64": "u64"}
_MADE = "// Made by `python -m vibetensor.cute_kernels table`; not to be edited.\n"


def struct_name(kernel: Kernel) -> str:
    """norm_forward -> NormForward."""
    return "".join(part.capitalize() for part in kernel.name.split("_"))


def _arguments(kernel: Kernel, index: int) -> str:
    contract = kernel.contract(kernel.variants[0])
    extents, tensors, scalars = contract.extents, contract.tensors, contract.scalars
    lines = [
        f"/// {kernel.doc}",
        f"struct {struct_name(kernel)} {{",
        f"  static constexpr int kIndex = {index};",
        f"  int64_t {', '.join(f'{e.name} = 0' for e in extents)};",
        f"  Operand {', '.join(t.name for t in tensors)};",
        *(f"  {SCALARS[s.type]} {s.name} = 0;" for s in scalars),
        "",
        f"  Values<{len(extents)}, {len(tensors)}, {len(scalars)}> values() const {{",
        f"    return {{{{{', '.join(e.name for e in extents)}}},",
        f"            {{{', '.join(t.name for t in tensors)}}},",
        "            {"
        + ", ".join(f"Scalar{{.{_SCALAR_FIELDS[s.type]} = {s.name}}}" for s in scalars)
        + "}};",
        "  }",
        "};",
    ]
    return "\n".join(lines) + "\n"


def _header(kernels: dict[str, Kernel]) -> str:
    parts = [_arguments(kernel, i) for i, kernel in enumerate(kernels.values())]
    return (
        f"{_MADE}// The arguments of every CuTe kernel: extents, tensors, numbers.\n#pragma once\n\n"
        '#include "cuda/cute/contract.h"\n\nnamespace vt::cuda::cute {\n\n'
        f"inline constexpr int kKernels = {len(kernels)};\n\n"
        + "\n".join(parts)
        + "\n}  // namespace vt::cuda::cute\n"
    )


def _strings(values: list[str]) -> str:
    return ", ".join(f'"{v}"' for v in values)


def _rules(name: str, contract: Contract) -> str:
    order = {e.name: i for i, e in enumerate(contract.extents)}
    tensor_order = {t.name: i for i, t in enumerate(contract.tensors)}
    extents = ", ".join(f"{{{e.divisible_by}, {e.minimum}, {e.maximum}}}" for e in contract.extents)
    tensors = []
    for t in contract.tensors:
        alias = sum(1 << tensor_order[a] for a in t.may_alias)
        dims = ", ".join(str(order[s]) for s in t.shape)
        tensors.append(
            f"{{DType::{_DTYPES[t.dtype]}, {len(t.shape)}, {{{dims}}}, "
            f"Access::{_ACCESS[t.access]}, {t.align}, {t.stride_divisible_by}, "
            f"{'true' if t.optional else 'false'}, {alias}u}}"
        )
    return (
        f"constexpr ExtentRule {name}_extents[] = {{{extents}}};\n"
        f"constexpr TensorRule {name}_tensors[] = {{\n    " + ",\n    ".join(tensors) + "};\n"
    )


def _entry(prefix: str, contract: Contract) -> str:
    """Packs a call into the exported structures. Their member counts are checked by the compiler:
    braces with too many values do not compile, and the sizes are asserted."""
    order = {e.name: i for i, e in enumerate(contract.extents)}
    lines = [f"int32_t enter_{prefix}(const Call& call, cudaStream_t stream) {{"]
    passed = []
    for i, t in enumerate(contract.tensors):
        local = f"tensor_{t.name}"
        shape = ", ".join(f"static_cast<int32_t>(call.extents[{order[s]}])" for s in t.shape)
        members = [f"call.tensors[{i}].data", f"{{{shape}}}"]
        if len(t.shape) > 1:
            strides = ", ".join(f"call.tensors[{i}].strides[{d}]" for d in range(len(t.shape) - 1))
            members.append(f"{{{strides}}}")
        lines.append(f"  {prefix}_Tensor_{t.name}_t {local}{{{', '.join(members)}}};")
        lines.append(f"  static_assert(sizeof({local}.dynamic_shapes) == {4 * len(t.shape)});")
        if len(t.shape) > 1:
            size = 8 * (len(t.shape) - 1)
            lines.append(f"  static_assert(sizeof({local}.dynamic_strides) == {size});")
        passed.append(f"&{local}")
    passed += [
        f"call.scalars[{i}].{_SCALAR_FIELDS[s.type]}" for i, s in enumerate(contract.scalars)
    ]
    lines += [
        f"  return cute_dsl_{prefix}_wrapper(nullptr, {', '.join(passed)}, stream);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _tuned(rows: list[Row], kernel: Kernel, gpus: list[str]) -> str:
    order = {v.name: i for i, v in enumerate(kernel.variants)}
    entries = []
    for row in rows:
        ranges = ", ".join(
            "{{{}, {}}}".format(*row.extents.get(e.name, (0, 2**62)))
            for e in kernel.contract(kernel.variants[0]).extents
        )
        dtype = f", DType::{_DTYPES[row.dtype]}" if row.dtype else ""
        variant = order.get(row.variant, -1)  # -1: the library's kernel
        entries.append(f"{{{gpus.index(row.gpu)}, {variant}, {{{{{ranges}}}}}{dtype}}}")
    return f"constexpr TunedRow {kernel.name}_tuned[] = {{{', '.join(entries)}}};\n"


_PRODUCT_DTYPES = {
    "bf16": "BFloat16",
    "f16": "Float16",
    "f32": "Float32",
    "tf32": "Float32",
    "f64": "Float64",
}
_PRODUCT_EPILOGUES = {
    "": "None",
    "relu": "Relu",
    "gelu_tanh": "GeluTanh",
    "gelu_tanh_backward": "GeluTanhBackward",
}


def _products(tables: tuple[Table, ...]) -> str:
    """The measured algorithms of cuBLASLt, and the function that gives them."""
    entries = []
    for table in tables:
        for gpu in table.gpus:
            for row in table.products:
                p, a = row.product, row.algorithm
                flags = {
                    "kTransposeB": p.layout[0] == "t",
                    "kTransposeA": p.layout[1] == "t",
                    "kBias": p.bias,
                    "kTf32": p.dtype == "tf32",
                    "kAccumulate": p.accumulate,
                }
                entries.append(
                    f"    {{{json.dumps(gpu)}, {{DType::{_PRODUCT_DTYPES[p.dtype]}, "
                    f"{' | '.join(f for f, on in flags.items() if on) or 0}, "
                    f"static_cast<int32_t>(GemmEpilogue::{_PRODUCT_EPILOGUES[p.epilogue]}), "
                    f"{p.batch}, {p.m}, {p.n}, {p.k}}}, "
                    f"{{{a.id}, {a.tile}u, {a.split_k}, {a.reduction}u, {a.swizzle}u, {a.custom}u, "
                    f"{a.stages}u, {a.inner}, {a.cluster}}}}}"
                )
    listed = ",\n".join(entries)
    rows = f"constexpr MeasuredProduct kProducts[] = {{\n{listed}}};\n" if entries else ""
    return (
        f"\nnamespace vt::cuda {{\n\n{rows}"
        "std::span<const MeasuredProduct> compiled_products() "
        f"{{ return {'kProducts' if entries else '{}'}; }}\n\n}}  // namespace vt::cuda\n"
    )


def _model(kernel: Kernel, model: Model) -> str:
    """The measured shapes of a product, the tiles of its variants and the weights of the costs."""
    order = {v.name: i for i, v in enumerate(kernel.variants)}
    points = [
        f"{{{{{', '.join(map(str, p.at))}}}, {order[p.variant] if p.variant else -1}, "
        f"{p.us!r}, {p.library_us!r}}}"
        for p in model.points
    ]
    tiles = [tile_of(v) for v in kernel.variants]
    listed = ", ".join(f"{{{t.m}, {t.n}, {t.k}, {t.down}, {t.across}}}" for t in tiles)
    return (
        f"constexpr MeasuredPoint {kernel.name}_points[] = {{\n    "
        + ",\n    ".join(points)
        + f"}};\nconstexpr Tile {kernel.name}_tiles[] = {{{listed}}};\n"
    )


def _model_entry(name: str, model: Model, gpu: int) -> str:
    def listed(weights: tuple[float, ...]) -> str:
        return "{" + ", ".join(repr(w) for w in weights) + "}"

    return (
        f"{{{name}_points, {name}_tiles, {listed(model.weights)}, "
        f"{listed(model.library_weights)}, {model.multiprocessors}, {gpu}}}"
    )


def _kernel(kernel: Kernel, built: dict[str, Built], rows: list[Row], gpus: list[str]) -> str:
    parts: list[str] = []
    entries: list[str] = []
    known: dict[Any, str] = {}  # contracts that many variants share
    for variant in kernel.variants:
        prefix = kernel.prefix(variant)
        contract = kernel.contract(variant)
        if contract not in known:
            known[contract] = f"{kernel.name}_{len(known)}"
            parts.append(_rules(known[contract], contract))
        compiled = "nullptr, nullptr, nullptr, nullptr"
        if prefix in built:
            parts.append(_entry(prefix, contract))
            parts.append(f"Module module_{prefix};\n")
            compiled = (
                f"enter_{prefix}, _mlir_{prefix}_cuda_init, _mlir_{prefix}_cuda_load_to_device, "
                f"&module_{prefix}"
            )
        rules = known[contract]
        entries.append(f'    {{"{variant.name}", {rules}_extents, {rules}_tensors, {compiled}}}')
    contract = kernel.contract(kernel.variants[0])
    names = [
        ("extent_names", [e.name for e in contract.extents]),
        ("tensor_names", [t.name for t in contract.tensors]),
        ("scalar_names", [s.name for s in contract.scalars]),
    ]
    for what, values in names:
        if values:
            parts.append(
                f"constexpr const char* {kernel.name}_{what}[] = {{{_strings(values)}}};\n"
            )
    if contract.scalars:
        types = ", ".join(f"ScalarType::{_SCALAR_FIELDS[s.type]}" for s in contract.scalars)
        parts.append(f"constexpr ScalarType {kernel.name}_scalar_types[] = {{{types}}};\n")
    parts.append(f"const Variant {kernel.name}_variants[] = {{\n" + ",\n".join(entries) + "};\n")
    if rows:
        parts.append(_tuned(rows, kernel, gpus))
    return "".join(parts)


def _table(kernels: dict[str, Kernel], manifest: Manifest | None, tables: tuple[Table, ...]) -> str:
    built = {b.prefix: b for b in manifest.variants} if manifest else {}
    rows = rows_of(tables)
    gpus = list(dict.fromkeys(r.gpu for r in rows))
    algorithms = _products(tables)
    modelled = models(kernels, tables)
    includes = "".join(f'#include "{prefix}.h"\n' for prefix in built)
    bodies, entries = [], []
    for kernel in kernels.values():
        own = [r for r in rows if r.kernel == kernel.name]
        bodies.append(_kernel(kernel, built, own, gpus))
        model = "{}"
        if kernel.name in modelled:
            gpu, made = modelled[kernel.name]
            bodies[-1] += _model(kernel, made)
            model = _model_entry(kernel.name, made, gpus.index(gpu))
        contract = kernel.contract(kernel.variants[0])
        scalars = (
            f"{kernel.name}_scalar_names, {kernel.name}_scalar_types"
            if contract.scalars
            else "{}, {}"
        )
        entries.append(
            f'    {{"{kernel.name}", {kernel.name}_extent_names, {kernel.name}_tensor_names, '
            f"{scalars}, {kernel.name}_variants, {f'{kernel.name}_tuned' if own else '{}'}, "
            f"{model}}}"
        )
    listed = f"const char* const kGpus[] = {{{_strings(gpus)}}};\n" if gpus else ""
    return (
        f'{_MADE}{includes}#include "cuda/cute/arguments.h"\n#include "cuda/cute/launch_table.h"\n'
        '#include "cuda/cublaslt.h"\n#include "cuda/measured_products.h"\n\n'
        "namespace vt::cuda::cute {\nnamespace {\n\n"
        + "\n".join(bodies)
        + f"{listed}const Kernel kTable[] = {{\n"
        + ",\n".join(entries)
        + "};\n\n}  // namespace\n\n"
        "std::span<const Kernel> kernels() { return kTable; }\n"
        f"std::span<const char* const> tuned_gpus() {{ return {'kGpus' if gpus else '{}'}; }}\n"
        f'const char* compiled_by() {{ return "{manifest.dsl if manifest else ""}"; }}\n\n'
        "}  // namespace vt::cuda::cute\n" + algorithms
    )


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def generate(manifest: Manifest | None, into: Path) -> None:
    """Writes `into`/cuda/cute/{arguments.h,table.cpp}; `manifest`: what was compiled, or None."""
    kernels = load()
    _write(into / "cuda" / "cute" / "arguments.h", _header(kernels))
    _write(into / "cuda" / "cute" / "table.cpp", _table(kernels, manifest, read_tables(kernels)))
