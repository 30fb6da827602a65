"""Writes the C++ front of every op: declarations, promotion and allocation, the consumer point,
autograd, layers and autocast. One front file holds a share of the ops so that they compile in
parallel."""

from __future__ import annotations

from schema import Arg
from table import PROMOTIONS, Op

BANNER = "// Generated from csrc/ops/table by csrc/ops/gen. Do not edit.\n"


def ids(ops: list[Op]) -> list[str]:
    """Op ids in order: every op, each in-place form after its op."""
    out = []
    for op in ops:
        out.append(op.id)
        if op.inplace:
            out.append(op.id + "_")
    return out


def op_ids_h(ops: list[Op]) -> str:
    names = ids(ops)
    lines = "".join(f"  {n},\n" for n in names)
    return (
        BANNER
        + "#pragma once\n\n#include <cstdint>\n#include <string_view>\n\nnamespace vt {\n\n"
        + f"enum class OpId : uint16_t {{\n{lines}}};\ninline constexpr int kNumOps = {len(names)};\n\n"
        + '/// The op\'s name in the table ("sum.dim", "mul_").\nstd::string_view op_name(OpId id);\n'
        + '/// "pointwise", "reduction", … as in the table.\nstd::string_view op_capture_class(OpId id);\n'
        + "/// The id of a name, or -1.\nint find_op(std::string_view name);\n\n}  // namespace vt\n"
    )


def ops_h(ops: list[Op]) -> str:
    out = [
        BANNER,
        '#pragma once\n\n#include <tuple>\n\n#include "core/foreign.h"\n#include "core/generator.h"\n#include "core/tensor.h"\n\n',
        "namespace vt::ops {\n\n",
    ]
    for op in ops:
        out.append(f"/// {op.row['doc'].strip().splitlines()[0]}\n")
        out.append(f"{op.schema.cpp_return} {op.id}({op.schema.params()});\n")
        if op.inplace:
            out.append(f"Tensor {op.id}_({op.schema.params()});\n")
    out.append("\n}  // namespace vt::ops\n")
    return "".join(out)


def kernel_params(op: Op) -> list[str]:
    """C++ parameter types of the op's kernel."""

    def kernel_type(a: Arg) -> str:
        return "const PhiloxArgs&" if op.random and a.type == "Generator?" else a.cpp

    if op.kind == "pointwise":
        return ["TensorIterator&"] + [a.cpp for a in op.schema.args if not a.is_tensor]
    outs = []
    if not op.mutated:
        outs = [
            "TensorSpan" if kind == "Tensor[]" else "const Tensor&" for kind, _ in op.schema.returns
        ]
    return outs + [kernel_type(a) for a in op.schema.args]


def kernel_table_h(ops: list[Op]) -> str:
    out = [
        BANNER,
        '#pragma once\n\n#include "core/foreign.h"\n#include "core/generator.h"\n#include "core/tensor_iterator.h"\n\nnamespace vt {\n\n',
        "/// One typed function pointer an op; null where a backend has no kernel.\nstruct KernelTable {\n",
    ]
    for op in ops:
        if op.kind in ("pointwise", "native"):
            out.append(f"  void (*{op.id})({', '.join(kernel_params(op))}) = nullptr;\n")
    out.append("};\n\n}  // namespace vt\n")
    return "".join(out)


def meta_decls_h(ops: list[Op]) -> str:
    out = [
        BANNER,
        '#pragma once\n\n#include <tuple>\n\n#include "core/foreign.h"\n#include "core/generator.h"\n#include "core/tensor.h"\n\n',
    ]
    spaces: dict[str, list[str]] = {"meta": [], "views": [], "composite": []}
    for op in ops:
        line = f"{op.schema.cpp_return} {op.id}({op.schema.params()});\n"
        if op.kind == "native" and not op.mutated:
            spaces["meta"].append(line)
        elif op.kind == "view":
            spaces["views"].append(line)
        elif op.kind == "composite":
            spaces["composite"].append(line)
        if op.via_composite:
            extra = f"{op.schema.cpp_return} {op.via_composite}({op.schema.params()});\n"
            if extra not in spaces["composite"]:
                spaces["composite"].append(extra)
    for space, lines in spaces.items():
        out.append(f"namespace vt::{space} {{\n{''.join(lines)}}}  // namespace vt::{space}\n\n")
    return "".join(out)


def _boxed_args(op: Op, rng: bool) -> str:
    return ", ".join(
        "box(rng)" if rng and op.random and a.type == "Generator?" else f"box({a.name})"
        for a in op.schema.args
    )


def _iterator(op: Op, out: str) -> str:
    promote = PROMOTIONS[op.row.get("promote", "common")]
    fixed = op.row.get("output")
    fixed_cpp = (
        f"DType::{fixed.capitalize() if fixed != 'bool' else 'Bool'}" if fixed else "std::nullopt"
    )
    if fixed in ("int64", "float32", "uint8"):
        fixed_cpp = {"int64": "DType::Int64", "float32": "DType::Float32", "uint8": "DType::UInt8"}[
            fixed
        ]
    ins = ", ".join(f"&{a.name}" for a in op.schema.args if a.is_tensor)
    code = f"  Tensor* outs[] = {{&{out}}};\n  const Tensor* ins[] = {{{ins}}};\n"
    code += (
        f"  it.build(outs, ins, {{.promote = Promote::{promote}, .output_dtype = {fixed_cpp}, "
        f'.op = "{op.python_name or op.name}"}});\n'
    )
    allowed = op.row.get("dtypes", "all")
    if allowed != "all":
        cls = "float_" if allowed == "float" else allowed
        code += f'  check_compute_dtype(it.common_dtype(), DTypeClass::{cls}, "{op.id}");\n'
    return code


def _same_dtype(op: Op) -> str:
    """Operands that are not promoted: their dtype must be that of the first."""
    names = op.row.get("same_dtype", [])
    if not names:
        return ""
    first, title = op.schema.args[0].name, (op.python_name or op.name).lstrip("_")
    code = ""
    if op.row.get("dtypes") == "float":  # else a float among numbers would make integers floats
        code = f'  check_compute_dtype({first}.dtype(), DTypeClass::float_, "{title}");\n'
    for a in op.schema.args:
        if a.name in names:
            free = "true" if a.type == "Tensor|Scalar" else "false"
            code += f'  check_same_dtype({first}, {a.name}, {free}, "{title}", "{a.name}");\n'
    return code


def _check(op: Op) -> str:
    return f"  {op.row['check']};\n" if "check" in op.row else ""


def _fits(op: Op, dtype: str) -> str:
    """Python numbers that are converted to the op's dtype must be among its values."""
    return "".join(f"  check_fits({name}, {dtype});\n" for name in op.row.get("fits", []))


def _attrs(op: Op) -> str:
    return "".join(f", {a.name}" for a in op.schema.args if not a.is_tensor)


def _pointwise_raw(op: Op, inplace: bool) -> str:
    name = op.id + ("_" if inplace else "")
    out = "  Tensor out = self;\n" if inplace else "  Tensor out;\n"
    if inplace:
        first = op.schema.args[0].name
        out = f"  Tensor out = {first};\n"
    return (
        f"static Tensor raw_{name}({op.schema.params()}) {{\n{_check(op)}{_same_dtype(op)}{out}"
        "  TensorIterator it;\n"
        f"{_iterator(op, 'out')}{_fits(op, 'it.common_dtype()')}"
        f"  auto* kernel = kernels_for(it.device().type).{op.id};\n"
        f"  if (!kernel) [[unlikely]] no_kernel(OpId::{name}, it.device());\n"
        f"  if (thread_state.consumer) [[unlikely]] {{\n"
        f"    const Value args[] = {{{_boxed_args(op, False)}}};\n    const Tensor results[] = {{out}};\n"
        f"    thread_state.consumer->on_op({{OpId::{name}, args, results}}, [&] {{ kernel(it{_attrs(op)}); }});\n"
        f"    return out;\n  }}\n"
        f"  kernel(it{_attrs(op)});\n  return out;\n}}\n"
    )


def _pointwise_exec(op: Op) -> str:
    """Runs the kernel again from boxed arguments on given outputs."""
    code = f"void exec_{op.id}(std::span<const Value> args, std::span<const Tensor> outputs) {{\n"
    code += _unbox_args(op)
    code += "  Tensor out = outputs[0];\n  TensorIterator it;\n" + _iterator(op, "out")
    code += f"  kernels_for(it.device().type).{op.id}(it{_attrs(op)});\n}}\n"
    return code


def _pointwise_row(op: Op) -> str:
    """The kernel on a built iterator, its attributes as numbers."""
    code = (
        f"void row_{op.id}(TensorIterator& it, [[maybe_unused]] std::span<const Scalar> attributes) {{\n"
        f"  auto* const kernel = kernels_for(it.device().type).{op.id};\n"
    )
    own = [a for a in op.schema.args if not a.is_tensor]
    operands = len(op.schema.args) - len(own) + 1
    code += (
        f"  check(kernel && attributes.size() == {len(own)} && it.num_operands() == {operands},\n"
        f'        "{op.id}: a row of ", it.num_operands(), " operands and ", attributes.size(), " numbers");\n'
    )
    attributes = []
    for i, a in enumerate(own):
        number = f"attributes[{i}]"
        if a.type == "str":
            code += f"  const ShortString text{i}({number}.to_int());\n"
            attributes.append(f"text{i}.view()")
        else:
            attributes.append(number + ROW_ATTRIBUTES[a.type])
    return code + f"  kernel({', '.join(['it', *attributes])});\n}}\n"


# How a number becomes an attribute of a pointwise kernel.
ROW_ATTRIBUTES = {"Scalar": "", "float": ".to_double()", "int": ".to_int()", "bool": ".to_bool()"}


def has_row(op: Op) -> bool:
    """Whether a pointwise op can be one of those that capture fuses."""
    return op.kind == "pointwise" and all(
        a.is_tensor or a.type == "str" or a.type in ROW_ATTRIBUTES for a in op.schema.args
    )


def _unbox_args(op: Op, rng: bool = False) -> str:
    code = ""
    for i, a in enumerate(op.schema.args):
        kind = "PhiloxArgs" if rng and op.random and a.type == "Generator?" else a.boxed
        code += f"  [[maybe_unused]] decltype(auto) {a.name} = unbox<{kind}>(args[{i}]);\n"
    return code


def _kernel_call_args(op: Op) -> list[str]:
    return ["rng" if op.random and a.type == "Generator?" else a.name for a in op.schema.args]


def _outputs(op: Op) -> tuple[str, list[str]]:
    """Code that binds the results of the meta function, and the kernel's output arguments."""
    returns = op.schema.returns
    if len(returns) == 1:
        return f"  {op.schema.cpp_return} out = meta::{op.id}({op.schema.call_args()});\n", ["out"]
    names = [f"out{i}" for i in range(len(returns))]
    return f"  auto [{', '.join(names)}] = meta::{op.id}({op.schema.call_args()});\n", names


def _device_check(op: Op) -> str:
    """Native kernels read raw pointers, so every tensor must be where the kernel runs."""
    if op.row.get("device"):
        return ""
    free = op.row.get("host_scalars", [])
    code = ""
    check, check_free = (
        ("check_on_device", "check_host_scalar")
        if op.row.get("float8")
        else ("check_operand", "check_host_operand")
    )
    for a in op.schema.args:
        if (a.is_tensor or a.is_list) and a.name not in free:
            code += f'  {check}(device, {a.name}, "{op.python_name or op.name}", "{a.name}");\n'
    for name in free:
        code += f'  {check_free}(device, {name}, "{op.python_name or op.name}", "{name}");\n'
    return code


def _native_raw(op: Op) -> str:
    params = op.schema.params()
    if op.mutated:
        first = op.mutated[0]
        device = f"first_device({first.name})" if first.is_list else f"{first.name}.device()"
        numel = f"{first.name}.numel()" if not first.is_list else "0"
        results = f"    const std::vector<Tensor> recorded = collect({', '.join(a.name for a in op.mutated)});\n"
        ret = f"  return {first.name};\n" if op.schema.returns else ""
        code = f"static {'Tensor' if op.schema.returns else 'void'} raw_{op.id}({params}) {{\n"
        bind, outs = "", []
    else:
        code = f"static {op.schema.cpp_return} raw_{op.id}({params}) {{\n"
        bind, outs = _outputs(op)
        is_list = op.schema.returns[0][0] == "Tensor[]"
        device = "first_device(out)" if is_list else f"{outs[0]}.device()"
        numel = f"{outs[0]}.numel()" if not is_list else "0"
        results = f"    const std::vector<Tensor> recorded = collect({', '.join(outs)});\n"
        ret = f"  return {outs[0]};\n" if len(outs) == 1 else f"  return {{{', '.join(outs)}}};\n"
    device = op.row.get("device", device)
    code += bind
    code += f"  const Device device = {device};\n" + _device_check(op)
    if op.mutated:
        code += _fits(op, f"{op.mutated[0].name}.dtype()")
    if not op.row.get("float8") and any(a.type.startswith("dtype") for a in op.schema.args):
        code += "".join(f'  check_result({out}, "{op.python_name or op.name}");\n' for out in outs)
    if op.random:
        count = op.row.get("random_numel", numel)
        code += f"  const PhiloxArgs rng = reserve_counters(generator, device, static_cast<uint64_t>({count}));\n"
    code += f"  auto* kernel = kernels_for(device.type).{op.id};\n"
    code += f"  if (!kernel) [[unlikely]] no_kernel(OpId::{op.id}, device);\n"
    call = f"kernel({', '.join(outs + _kernel_call_args(op))})"
    code += (
        f"  if (thread_state.consumer) [[unlikely]] {{\n    const Value args[] = {{{_boxed_args(op, True)}}};\n{results}"
        f"    thread_state.consumer->on_op({{OpId::{op.id}, args, recorded}}, [&] {{ {call}; }});\n  }} else {{\n"
        f"    {call};\n  }}\n{ret}}}\n"
    )
    return code


def _native_exec(op: Op) -> str:
    code = f"void exec_{op.id}([[maybe_unused]] std::span<const Value> args,\n    [[maybe_unused]] std::span<const Tensor> outputs) {{\n"
    code += _unbox_args(op, rng=True).replace("decltype(auto) generator", "decltype(auto) rng")
    call = _kernel_call_args(op)
    if op.mutated:
        outs: list[str] = []
    elif op.schema.returns[0][0] == "Tensor[]":
        outs = ["outputs"]
    else:
        outs = [f"outputs[{i}]" for i in range(len(op.schema.returns))]
    first = op.mutated[0].name if op.mutated else None
    device = (
        "outputs[0].device()"
        if not op.mutated
        else (f"first_device({first})" if op.mutated[0].is_list else f"{first}.device()")
    )
    device = op.row.get("device", device)
    code += f"  kernels_for({device}.type).{op.id}({', '.join(outs + call)});\n}}\n"
    return code


def _autocast(op: Op, name: str) -> str:
    how = op.row.get("autocast")
    if not how:
        return ""
    tensors = [a.name for a in op.tensor_args]
    wrap = {"lower": "lower", "float32": "raise", "promote": "promote"}[how]
    args = []
    for a in op.schema.args:
        if (a.is_tensor or a.is_list) and not a.mutated:
            extra = ", widest" if how == "promote" else ""
            args.append(f"autocast::{wrap}_input({a.name}{extra})")
        else:
            args.append(a.name)
    widest = (
        f"      const DType widest = autocast::widest({{{', '.join(f'&{t}' for t in tensors if True)}}});\n"
        if how == "promote"
        else ""
    )
    probe = tensors[0]
    return (
        f"    if (autocast::active_for({probe})) {{\n{widest}"
        f"      const autocast::Off off;\n      return {name}({', '.join(args)});\n    }}\n"
    )


def _slow_branch(op: Op, name: str, ret: str) -> str:
    unbox = {
        "void": "return;",
        "Tensor": "return unbox<Tensor>(layer_result);",
        "std::vector<Tensor>": "return std::get<std::vector<Tensor>>(layer_result);",
        "bool": "return std::get<bool>(layer_result);",
        "int64_t": "return std::get<int64_t>(layer_result);",
        "double": "return std::get<double>(layer_result);",
        "Scalar": "return std::get<Scalar>(layer_result);",
        "DType": "return std::get<DType>(layer_result);",
    }.get(ret)
    if unbox is None:
        n = ret.count("Tensor")
        parts = ", ".join(f"items[{i}]" for i in range(n))
        unbox = (
            f"{{ auto& items = std::get<std::vector<Tensor>>(layer_result); return {{{parts}}}; }}"
        )
    autocast = "" if name.endswith("_") and op.kind == "pointwise" else _autocast(op, name)
    return (
        "  if (thread_state.front != 0 || any_override.load(std::memory_order_relaxed)) [[unlikely]] {\n"
        "    if (layers_active()) {\n"
        f"      const Value layer_args[] = {{{_boxed_args(op, False) or 'Value()'}}};\n      Value layer_result;\n"
        f"      if (call_layer(OpId::{name}, layer_args, layer_result)) {unbox}\n    }}\n{autocast}  }}\n"
    )


def _widened(op: Op) -> str:
    """Computes with 8-bit floats by converting them first, which loses nothing."""
    if op.row.get("float8") != "widened":
        return ""
    tensors = ", ".join(f"&{a.name}" for a in op.schema.args if a.is_tensor)
    args = ", ".join(f"widened({a.name})" if a.is_tensor else a.name for a in op.schema.args)
    return (
        f"  if (any_float8({{{tensors}}})) [[unlikely]] {{\n"
        f"    const WidenedFloat8 widened{{{tensors}}};\n    return {op.id}({args});\n  }}\n"
    )


def _save_inputs(op: Op) -> str:
    return f"    save_inputs_{op.id}(*node{''.join(', ' + a.name for a in op.schema.args)});\n"


def _record_condition(op: Op) -> str:
    return f"autograd::should_record({', '.join(a.name for a in op.diff_inputs)})"


def _edges(op: Op) -> str:
    return "".join(f"    autograd::add_edges(*node, {a.name});\n" for a in op.diff_inputs)


def front(op: Op) -> str:
    ret = op.schema.cpp_return
    params, call = op.schema.params(), op.schema.call_args()
    code = ""
    if op.kind == "composite":
        code += f"{ret} {op.id}({params}) {{\n{_slow_branch(op, op.id, ret)}"
        if ret == "Tensor" and op.is_factory:
            code += f"  Tensor result = composite::{op.id}({call});\n"
            code += "  autograd::mark_inference(result);\n  return result;\n}\n"
        else:
            code += f"  return composite::{op.id}({call});\n}}\n"
        return code
    from emit_nodes import save_outputs_code

    if op.kind == "view":
        many = ret == "std::vector<Tensor>"
        base = op.tensor_args[0].name
        code += f"{ret} {op.id}({params}) {{\n{_slow_branch(op, op.id, ret)}"
        code += f"  {ret} out = views::{op.id}({call});\n"
        set_view = f"autograd::set_view(out, {base});"
        if many:
            set_view = f"for (const Tensor& t : out) autograd::set_view(t, {base});"
        # A view without a gradient (detach) has no history to follow its base's.
        if op.differentiable:
            code += f"  {set_view}\n"
        code += (
            "  if (thread_state.consumer) [[unlikely]] {\n"
            f"    const Value args[] = {{{_boxed_args(op, False)}}};\n    const std::vector<Tensor> results = collect(out);\n"
            f"    thread_state.consumer->on_op({{OpId::{op.id}, args, results}}, [] {{}});\n  }}\n"
        )
        if op.differentiable:
            code += f"  if ({_record_condition(op)}) {{\n    auto node = autograd::make_node<autograd::{node_name(op)}>();\n"
            code += _edges(op) + _save_inputs(op)
            code += "    autograd::set_history(out, node);\n  }\n"
        code += "  return out;\n}\n"
        return code

    if op.kind == "native" and op.mutated:
        ret_cpp = "Tensor" if op.schema.returns else "void"
        code += f"{ret_cpp} {op.id}({params}) {{\n{_slow_branch(op, op.id, ret_cpp)}"
        singles = [a.name for a in op.mutated if not a.is_list]
        lists = [a.name for a in op.mutated if a.is_list]
        records = _record_condition(op) if op.differentiable else "false"
        code += f"  const bool records = {records};\n"
        for name in singles:
            code += (
                f'  if ({name}.defined()) autograd::check_inplace({name}, records, "{op.name}");\n'
            )
        for name in lists:
            code += f'  for (const Tensor& t : {name}) autograd::check_inplace(t, records, "{op.name}");\n'
        code += "  Ref<autograd::Node> history;\n"
        if op.differentiable:
            code += f"  if (records) {{\n    auto node = autograd::make_node<autograd::{node_name(op)}>();\n"
            code += _edges(op) + _save_inputs(op) + "    history = node;\n  }\n"
        code += f"  raw_{op.id}({call});\n"
        for name in singles:
            target = "history" if name == singles[0] else "{}"
            code += f"  if ({name}.defined()) autograd::rebase_history({name}, {target});\n"
        for name in lists:
            code += f"  for (const Tensor& t : {name}) autograd::rebase_history(t, {{}});\n"
        saves = save_outputs_code(op)
        if op.differentiable and saves:
            first = singles[0]
            code += (
                f"  if (history) {{\n    auto* node = static_cast<autograd::{node_name(op)}*>(history.get());\n"
                f"    const Tensor& result = {first};\n{saves}  }}\n"
            )
        code += f"  return {op.mutated[0].name};\n}}\n" if op.schema.returns else "}\n"
        return code

    # pointwise and native with fresh outputs
    code += f"{ret} {op.id}({params}) {{\n{_widened(op)}{_slow_branch(op, op.id, ret)}"
    names = op.output_names
    multi = len(op.schema.returns) > 1
    bind = (
        f"  auto [{', '.join(names)}] = raw_{op.id}({call});\n"
        if multi
        else f"  {ret} result = raw_{op.id}({call});\n"
    )
    is_list = ret == "std::vector<Tensor>"
    mark = "".join(f"  autograd::mark_inference({n});\n" for n in names) if not is_list else ""
    tail = f"  return {{{', '.join(names)}}};\n}}\n" if multi else "  return result;\n}\n"
    if op.differentiable:
        code += f"  if ({_record_condition(op)}) {{\n    auto node = autograd::make_node<autograd::{node_name(op)}>();\n"
        code += _edges(op) + _save_inputs(op)
        code += bind.replace("  ", "    ", 1)
        for n in names:
            # An output that no formula has a gradient for (a mean kept for the backward) stays
            # outside the graph, though it keeps its place among the node's.
            tracked = not multi or not op.backward or any(f"grad_{n}" in e for _, e in op.backward)
            code += (
                f"    autograd::set_history({n}, node);\n"
                if tracked
                else f"    node->add_input({n});\n"
            )
        code += save_outputs_code(op)
        code += "  " + tail[:-2] + "  }\n"
    code += bind + mark + tail
    if op.inplace:
        first = op.schema.args[0].name
        code += f"Tensor {op.id}_({params}) {{\n{_slow_branch(op, op.id + '_', 'Tensor')}"
        records = _record_condition(op) if op.differentiable else "false"
        code += f"  const bool records = {records};\n"
        code += f'  autograd::check_inplace({first}, records, "{op.id}_");\n'
        if op.differentiable:
            # Saved inputs are versioned before the write, so one that is `self` is caught at backward
            # unless the formula needs the result only; then it keeps a copy of the old value.
            code += f"  if (records) {{\n    auto node = autograd::make_node<autograd::{node_name(op)}>();\n"
            code += _edges(op)
            code += f"    save_inputs_{op.id}(*node{''.join(', ' + (f'autograd::saved_before_write({a.name})' if a.name == first and needs_self(op) else a.name) for a in op.schema.args)});\n"
            code += f"    raw_{op.id}_({call});\n"
            code += f"    autograd::rebase_history({first}, node);\n"
            saves = save_outputs_code(op)
            if saves:
                code += f"    const Tensor& result = {first};\n{saves}"
            code += f"    return {first};\n  }}\n"
        code += f"  raw_{op.id}_({call});\n  autograd::rebase_history({first}, {{}});\n  return {first};\n}}\n"
    return code


def needs_self(op: Op) -> bool:
    """Whether backward reads the overwritten input: then an in-place call keeps a copy of it."""
    from emit_nodes import saved_tensors

    return op.schema.args[0].name in saved_tensors(op)


def node_name(op: Op) -> str:
    parts = op.id.split("_")
    return (
        "".join(p[:1].upper() + p[1:] for p in parts if p)
        + ("_" if op.id.startswith("_") else "")
        + "Backward"
    )


def front_file(ops: list[Op]) -> str:
    out = [
        BANNER,
        '#include "dispatch/pointwise.h"\n#include "ops/front_support.h"\n#include "vt/nodes.h"\n#include "vt/ops.h"\n\n',
    ]
    out.append("namespace vt::ops {\n\n")
    for op in ops:
        if op.kind == "pointwise":
            out.append(_pointwise_raw(op, False))
            if op.inplace:
                out.append(_pointwise_raw(op, True))
        elif op.kind == "native":
            out.append(_native_raw(op))
    from emit_nodes import save_inputs_function

    for op in ops:
        if op.differentiable:
            out.append(save_inputs_function(op))
    for op in ops:
        out.append(front(op))
    out.append("\n}  // namespace vt::ops\n\nnamespace vt::boxed {\nusing namespace vt::ops;\n")
    for op in ops:
        if op.kind == "pointwise":
            out.append(_pointwise_exec(op))
            if has_row(op):
                out.append(_pointwise_row(op))
        elif op.kind == "native":
            out.append(_native_exec(op))
    out.append("}  // namespace vt::boxed\n")
    return "".join(out)


def boxed_h(ops: list[Op]) -> str:
    out = [
        BANNER,
        '#pragma once\n\n#include "dispatch/consumer.h"\n#include "dispatch/pointwise.h"\n\nnamespace vt::boxed {\n',
    ]
    for op in ops:
        out.append(f"Value call_{op.id}(std::span<const Value> args);\n")
        if op.inplace:
            out.append(f"Value call_{op.id}_(std::span<const Value> args);\n")
        if op.kind in ("pointwise", "native"):
            out.append(
                f"void exec_{op.id}(std::span<const Value> args, std::span<const Tensor> outputs);\n"
            )
        if has_row(op):
            out.append(
                f"void row_{op.id}(TensorIterator& it, std::span<const Scalar> attributes);\n"
            )
    out.append("}  // namespace vt::boxed\n")
    return "".join(out)


def boxed_calls(ops: list[Op]) -> str:
    out = []
    for op in ops:
        for name in [op.id] + ([op.id + "_"] if op.inplace else []):
            ret = "Tensor" if name != op.id else op.schema.cpp_return
            out.append(
                f"Value call_{name}([[maybe_unused]] std::span<const Value> args) {{\n{_unbox_args(op)}"
            )
            call = f"ops::{name}({op.schema.call_args()})"
            if ret == "void":
                out.append(f"  {call};\n  return Value();\n}}\n")
            elif ret.startswith("std::tuple"):
                out.append(f"  return box_tuple({call});\n}}\n")
            else:
                out.append(f"  return box({call});\n}}\n")
    return "".join(out)


def boxed_file(ops: list[Op], all_ops: list[Op], with_tables: bool) -> str:
    out = [
        BANNER,
        '#include "ops/front_support.h"\n#include "vt/boxed.h"\n#include "vt/ops.h"\n\nnamespace vt::boxed {\n\n',
        boxed_calls(ops),
        "\n}  // namespace vt::boxed\n",
    ]
    if not with_tables:
        return "".join(out)
    out.append(
        "\nnamespace vt {\nnamespace {\n\nstruct Entry {\n  std::string_view name;\n  std::string_view capture;\n"
        "  Value (*call)(std::span<const Value>);\n"
        "  void (*exec)(std::span<const Value>, std::span<const Tensor>);\n  PointwiseKernel row;\n"
        "  std::optional<Promote> promotion;\n};\nconstexpr Entry entries[] = {\n"
    )
    for op in all_ops:
        default = {"view": "view", "pointwise": "pointwise", "composite": "composite"}.get(
            op.kind, "opaque"
        )
        capture = op.row.get("capture", default)
        run = f"boxed::exec_{op.id}" if op.kind in ("pointwise", "native") else "nullptr"
        row, promotion = "nullptr", "std::nullopt"
        if has_row(op):
            row = f"boxed::row_{op.id}"
            promotion = f"Promote::{PROMOTIONS[op.row.get('promote', 'common')]}"
        rest = f"{run}, {row}, {promotion}"
        out.append(f'    {{"{op.name}", "{capture}", boxed::call_{op.id}, {rest}}},\n')
        if op.inplace:
            out.append(f'    {{"{op.name}_", "{capture}", boxed::call_{op.id}_, {rest}}},\n')
    out.append(
        "};\n\n}  // namespace\n\nstd::string_view op_name(OpId id) { return entries[static_cast<int>(id)].name; }\n"
        "std::string_view op_capture_class(OpId id) { return entries[static_cast<int>(id)].capture; }\n"
        "int find_op(std::string_view name) {\n  for (int i = 0; i < kNumOps; ++i) {\n"
        "    if (entries[i].name == name) return i;\n  }\n  return -1;\n}\n"
        "Value call_op(OpId id, std::span<const Value> args) { return entries[static_cast<int>(id)].call(args); }\n"
        "void execute_kernel(OpId id, std::span<const Value> args, std::span<const Tensor> outputs) {\n"
        "  if (auto* run = entries[static_cast<int>(id)].exec) run(args, outputs);\n}\n"
        "PointwiseKernel pointwise_kernel(OpId id) { return entries[static_cast<int>(id)].row; }\n"
        "std::optional<Promote> op_promotion(OpId id) { return entries[static_cast<int>(id)].promotion; }\n\n"
        "}  // namespace vt\n"
    )
    return "".join(out)
