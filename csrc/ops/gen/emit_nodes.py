"""Writes the autograd node of every differentiable op from its backward formulas."""

from __future__ import annotations

import re

from emit_front import BANNER, node_name
from schema import Arg
from table import Op

# What a formula may ask of a tensor without keeping the tensor itself alive.
META = r"(sizes|strides|dtype|device|dim|numel|storage_offset|itemsize)\(\)|size\("


def _uses(formula: str, name: str) -> bool:
    return re.search(rf"(?<![\w.:]){re.escape(name)}\b(?!\s*\()", formula) is not None


def _split_meta(op: Op, formula: str) -> tuple[str, set[str]]:
    """Replaces `self.sizes()` and the like, and `tensors.metas()` of a list, by reads of saved
    descriptions; returns the names so read."""
    described: set[str] = set()
    names = [a.name for a in op.schema.args if a.is_tensor] + op.output_names

    def swap(match: re.Match) -> str:
        described.add(match.group(1))
        return f"{match.group(1)}_meta.{match.group(2)}"

    for name in names:
        formula = re.sub(rf"(?<![\w.:])({re.escape(name)})\.((?:{META}))", swap, formula)
    for a in op.schema.args:
        if a.is_list and f"{a.name}.metas()" in formula:
            described.add(a.name)
            formula = formula.replace(f"{a.name}.metas()", f"{a.name}_meta")
    return formula, described


class Plan:
    """What one op's node saves, and its formulas rewritten to read it."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.formulas: list[tuple[tuple[str, ...], str, list[str], list[str]]] = []
        self.tensors: dict[str, list[int]] = {}  # saved tensor -> formulas that read it
        self.metas: dict[str, list[int]] = {}
        self.attrs: set[str] = set()
        tensor_names = [a.name for a in op.schema.args if a.is_tensor or a.is_list]
        outputs = op.output_names
        for index, (inputs, formula) in enumerate(op.backward):
            formula, described = _split_meta(op, formula)
            used = [n for n in tensor_names + outputs if _uses(formula, n)]
            for n in used:
                self.tensors.setdefault(n, []).append(index)
            for n in described:
                self.metas.setdefault(n, []).append(index)
            for a in op.schema.args:
                if not (a.is_tensor or a.is_list) and _uses(formula, a.name):
                    self.attrs.add(a.name)
            self.formulas.append((inputs, formula, used, sorted(described)))
        if op.via_composite:
            for a in op.schema.args:
                if a.is_tensor or a.is_list:
                    self.tensors.setdefault(a.name, []).append(-1)
                elif a.type != "Generator?":
                    self.attrs.add(a.name)
        unknown = [n for n in self.tensors if n not in tensor_names + outputs]
        assert not unknown, (op.name, unknown)

    def arg(self, name: str) -> Arg | None:
        return next((a for a in self.op.schema.args if a.name == name), None)

    def is_list(self, name: str) -> bool:
        a = self.arg(name)
        return a is not None and a.is_list

    def edge_expr(self, name: str) -> str:
        """C++ for the first edge of input `name`."""
        offset, dynamic = 0, ""
        for a in self.op.diff_inputs:
            if a.name == name:
                break
            if a.is_list:
                dynamic += f" + {a.name}_count"
            else:
                offset += 1
        return f"{offset}{dynamic}"


_PLANS: dict[str, Plan] = {}


def plan(op: Op) -> Plan:
    if op.name not in _PLANS:
        _PLANS[op.name] = Plan(op)
    return _PLANS[op.name]


def saved_tensors(op: Op) -> set[str]:
    return {n for n in plan(op).tensors if n not in op.output_names} if op.differentiable else set()


def _shown_name(op: Op) -> str:
    """C++ for what grad_fn prints: torch's name for the op's backward."""
    name = op.row.get("node_name", node_name(op).replace("_", "") + "0")
    return f'"{name}"' if re.fullmatch(r"\w+", name) else name


def nodes_h(ops: list[Op]) -> str:
    out = [
        BANNER,
        '#pragma once\n\n#include "autograd/front.h"\n#include "autograd/tensor_meta.h"\n'
        '#include "core/generator.h"\n\nnamespace vt::autograd {\n\n',
    ]
    for op in ops:
        if not op.differentiable:
            continue
        p = plan(op)
        out.append(
            f"struct {node_name(op)} final : Node {{\n  TensorVec apply(TensorVec grads) override;\n"
            f"  std::string name() const override {{ return {_shown_name(op)}; }}\n"
        )
        releases = "".join(f" {n}.release();" for n in p.tensors)
        if releases:
            out.append(f"  void release_saved() override {{{releases} }}\n")
        for n in p.tensors:
            out.append(f"  {'SavedTensors' if p.is_list(n) else 'SavedTensor'} {n};\n")
        for n in p.metas:
            kind = "std::vector<TensorMeta>" if p.is_list(n) else "TensorMeta"
            out.append(f"  {kind} {n}_meta;\n")
        for a in op.schema.args:
            if a.name in p.attrs:
                init = (
                    ""
                    if a.saved.startswith(("std::", "Dims", "Scalar", "Generator", "Device"))
                    else "{}"
                )
                out.append(f"  {a.saved} {a.name}{init};\n")
        for a in op.diff_inputs:
            if a.is_list:
                out.append(f"  size_t {a.name}_count = 0;\n")
        out.append("};\n\n")
    out.append("}  // namespace vt::autograd\n")
    return "".join(out)


def _wanted(p: Plan, indices: list[int]) -> str:
    """C++ condition: some formula in `indices` will be evaluated."""
    if -1 in indices:
        return "true"
    conditions = []
    for i in indices:
        for name in p.formulas[i][0]:
            if p.is_list(name):
                return "true"
            conditions.append(f"node.wants({p.edge_expr(name)})")
    text = " || ".join(dict.fromkeys(conditions))
    return text if all("_count" not in c for c in conditions) else text.replace(" + ", " + node.")


def save_inputs_function(op: Op) -> str:
    p = plan(op)
    params = "".join(f", [[maybe_unused]] {a.cpp} {a.name}" for a in op.schema.args)
    code = f"static void save_inputs_{op.id}([[maybe_unused]] autograd::{node_name(op)}& node{params}) {{\n"
    for a in op.diff_inputs:
        if a.is_list:
            code += f"  node.{a.name}_count = {a.name}.size();\n"
    for n, indices in p.tensors.items():
        if n in op.output_names:
            continue
        condition = _wanted(p, indices)
        guard = "" if condition == "true" else f"if ({condition}) "
        code += f"  {guard}node.{n}.save({n});\n"
    for n in p.metas:
        if n not in op.output_names:
            made = "metas_of" if p.is_list(n) else "TensorMeta"
            code += f"  node.{n}_meta = autograd::{made}({n});\n"
    for a in op.schema.args:
        if a.name not in p.attrs:
            continue
        value = a.name
        if a.type == "int[]":
            value = f"Dims({a.name})"
        elif a.type == "int[]?":
            value = f"{a.name} ? std::optional<Dims>(Dims(*{a.name})) : std::nullopt"
        elif a.type == "str":
            value = f"std::string({a.name})"
        elif a.type == "str?":
            value = f"{a.name} ? std::optional<std::string>(std::string(*{a.name})) : std::nullopt"
        elif a.type in ("float[]", "Scalar[]"):
            value = f"{a.saved}({a.name}.begin(), {a.name}.end())"
        code += f"  node.{a.name} = {value};\n"
    return code + "}\n"


def save_outputs_code(op: Op) -> str:
    p = plan(op)
    code = ""
    for n in op.output_names:
        if n in p.tensors:
            code += f"    node->{n}.save({n}, true);\n"
        if n in p.metas:
            code += f"    node->{n}_meta = autograd::TensorMeta({n});\n"
    return code


def _composite_call(op: Op, p: Plan) -> str:
    """vjp of the row's composite with respect to its differentiable inputs."""
    tensors = [a for a in op.schema.args if a.is_tensor or a.is_list]
    diff = {a.name for a in op.diff_inputs}
    code = ""
    for a in tensors:
        kind = "std::vector<Tensor>" if a.is_list else "const Tensor"
        code += f"    {kind} saved_{a.name} = {a.name}.unpack(this);\n"
    code += "    std::vector<Tensor> inputs;\n    SmallVector<bool, 8> wanted;\n"
    for a in op.diff_inputs:
        if a.is_list:
            code += (
                f"    for (size_t i = 0; i < saved_{a.name}.size(); ++i) {{\n      inputs.push_back(saved_{a.name}[i]);\n"
                f"      wanted.push_back(wants({p.edge_expr(a.name)} + i));\n    }}\n"
            )
        else:
            code += f"    inputs.push_back(saved_{a.name});\n    wanted.push_back(wants({p.edge_expr(a.name)}));\n"
    code += "    auto composite = [&](TensorSpan given) -> TensorVec {\n      [[maybe_unused]] size_t at = 0;\n"
    args = []
    for a in op.schema.args:
        if a.name in diff and a.is_list:
            code += f"      const TensorSpan arg_{a.name} = given.subspan(at, {a.name}_count);\n      at += {a.name}_count;\n"
            args.append(f"arg_{a.name}")
        elif a.name in diff:
            code += f"      const Tensor& arg_{a.name} = given[at++];\n"
            args.append(f"arg_{a.name}")
        elif a.is_tensor or a.is_list:
            args.append(f"saved_{a.name}")
        elif a.type == "Generator?":
            args.append("Generator()")
        else:
            args.append(a.name)
    call = f"composite::{op.via_composite}({', '.join(args)})"
    n = len(op.schema.returns)
    if n == 1:
        code += f"      return {{{call}}};\n"
    else:
        names = [f"o{i}" for i in range(n)]
        code += f"      auto [{', '.join(names)}] = {call};\n      return {{{', '.join(names)}}};\n"
    code += "    };\n"
    code += (
        "    return composite_vjp(composite, inputs, std::span<const Tensor>(grads.data(), grads.size()), "
        "std::span<const bool>(wanted.data(), wanted.size()));\n"
    )
    return code


def apply_function(op: Op) -> str:
    p = plan(op)
    code = f"TensorVec {node_name(op)}::apply(TensorVec grads) {{\n"
    if op.via_composite:
        always = not op.backward
        code += "  {\n" if always else "  if (thread_state.grad_enabled) [[unlikely]] {\n"
        code += _composite_call(op, p) + "  }\n"
        if always:
            return code + "}\n"
    code += "  TensorVec result_grads(edges.size());\n"
    outputs = op.output_names
    if len(outputs) == 1 and op.schema.returns[0][0] != "Tensor[]":
        code += "  const Tensor& grad = grads[0];\n"
    else:
        for i, n in enumerate(outputs):
            if op.schema.returns[0][0] == "Tensor[]":
                continue
            code += f"  [[maybe_unused]] const Tensor& grad_{n} = grads[{i}];\n"
        if outputs and op.schema.returns[0][0] != "Tensor[]":
            code += "  [[maybe_unused]] const Tensor& grad = grads[0];\n"
    for inputs, formula, used, _ in p.formulas:
        edges = [p.edge_expr(n) for n in inputs]
        if len(inputs) == 1 and p.is_list(inputs[0]):
            condition = "true"
        else:
            condition = " || ".join(f"wants({e})" for e in edges)
        code += f"  if ({condition}) {{\n"
        for n in used:
            kind = "std::vector<Tensor>" if p.is_list(n) else "Tensor"
            code += f"    const {kind} {n} = this->{n}.unpack(this);\n"
        if len(inputs) == 1:
            if p.is_list(inputs[0]):
                code += (
                    f"    auto list = {formula};\n    for (size_t i = 0; i < list.size(); ++i) "
                    f"result_grads[{edges[0]} + i] = list[i];\n"
                )
            else:
                code += f"    result_grads[{edges[0]}] = {formula};\n"
        else:
            mask = ", ".join(f"wants({e})" for e in edges)
            names = ", ".join(f"g{i}" for i in range(len(inputs)))
            code += (
                f"    [[maybe_unused]] const std::array<bool, {len(inputs)}> mask = {{{mask}}};\n"
            )
            code += f"    auto [{names}] = {formula};\n"
            for i, e in enumerate(edges):
                if p.is_list(inputs[i]):
                    code += f"    for (size_t k = 0; k < g{i}.size(); ++k) result_grads[{e} + k] = g{i}[k];\n"
                else:
                    code += f"    result_grads[{e}] = g{i};\n"
        code += "  }\n"
    return code + "  return result_grads;\n}\n"


def nodes_file(ops: list[Op], formula_headers: list[str]) -> str:
    out = [BANNER, '#include "vt/nodes.h"\n\n#include "autograd/engine.h"\n']
    out += [f'#include "autograd/formulas/{h}"\n' for h in formula_headers]
    out.append('#include "vt/meta_decls.h"\n#include "vt/ops.h"\n\nnamespace vt::autograd {\n\n')
    out += [apply_function(op) for op in ops if op.differentiable]
    out.append("\n}  // namespace vt::autograd\n")
    return "".join(out)
