"""Writes the page that lists every op."""

from __future__ import annotations

from emit_python import collect
from table import Op


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
        "Every op of the table. *Forms*: f function, m method, i in-place method. *Gradient*: how it is differentiated.",
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
    return "\n".join(lines) + "\n"
