"""Writes the page that lists every op."""

from __future__ import annotations

import ast
from pathlib import Path

from emit_python import collect
from table import Op

# Functions written in Python over ops of the table, and those that make tensors of other data.
PYTHON_FUNCTIONS = [
    Path(__file__).parents[3] / "vibetensor" / "torch" / name
    for name in ("_variadic.py", "_compositions.py")
]
FROM_DATA = [
    ("tensor(data, *, dtype=None, device=None, requires_grad=False)",
     "A copy of numbers, nested sequences, arrays or a tensor."),
    ("as_tensor(data, dtype=None, device=None)", "As tensor, without a copy where there need be none."),
    ("from_numpy(ndarray)", "A tensor over a NumPy array's memory."),
    ("from_dlpack(ext_tensor, *, device=None, copy=None)", "A tensor over another library's memory."),
]  # fmt: skip


def _python_functions() -> list[tuple[str, str]]:
    """Signature and first sentence of each public function, read from the source."""
    found = []
    for node in (n for path in PYTHON_FUNCTIONS for n in ast.parse(path.read_text()).body):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        text = " ".join((ast.get_docstring(node) or "").split())
        found.append((f"{node.name}({ast.unparse(node.args)})", text))
    return sorted(found)


def ops_md(ops: list[Op]) -> str:
    """Markdown: one row an op, in the table's files' order."""
    names: dict[int, list[str]] = {}
    for binding in collect(ops):
        for op, suffix in binding.overloads:
            if not suffix:
                names.setdefault(id(op), []).append(binding.name)
    lines = [
        "# Ops",
        "",
        "Every op of the table. *Forms*: f function, m method, i in-place form: the name with `_` behind it, as a function and, where",
        "m stands, as a method. *Gradient*: how it is differentiated.",
        "",
    ]
    current = ""
    for op in ops:
        if op.file != current:
            current = op.file
            title = current.removesuffix(".yaml").replace("_", " ")
            lines += [
                "",
                f"## {title.capitalize()}",
                "",
                "| op | arguments | forms | gradient | |",
                "|---|---|---|---|---|",
            ]
        forms = "".join(
            c for c, v in (("f", "function"), ("m", "method"), ("i", "inplace")) if v in op.variants
        )
        if op.python_name is None:
            forms = "f"
        gradient = (
            "through its parts" if op.kind == "composite" else "yes" if op.differentiable else "no"
        )
        public = op.python_name is not None and not op.python_name.startswith("_")
        aliases = [n for n in names.get(id(op), []) if n != op.python_name]
        doc = op.row["doc"].strip().splitlines()[0]
        if aliases and public:
            doc += f" Also `{'`, `'.join(aliases)}`."
        if not public:
            doc += " (internal)"
        schema, doc = op.row["schema"].replace("|", "\\|"), doc.replace("|", "\\|")
        lines.append(f"| `{op.name}` | `{schema}` | {forms} | {gradient} | {doc} |")
    for title, functions in (("From other data", FROM_DATA), ("In Python", _python_functions())):
        lines += ["", f"## {title}", "", "| function | |", "|---|---|"]
        lines += [f"| `{signature}` | {text} |" for signature, text in functions]
    return "\n".join(lines) + "\n"
