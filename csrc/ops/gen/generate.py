"""Generates the C++ and Python faces of the op table.

    python generate.py --table csrc/ops/table --out build/generated

Writes a fixed list of files and touches only those whose content changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import emit_docs
import emit_front
import emit_nodes
import emit_python
import emit_stub
import table
from schema import SchemaError

FRONT_FILES, NODE_FILES, BOXED_FILES, PYTHON_FILES = 6, 4, 2, 6


def outputs(ops: list[table.Op], formulas: Path) -> dict[str, str]:
    """File name to content."""
    headers = sorted(p.name for p in formulas.glob("*.h"))
    files = {
        "vt/op_ids.h": emit_front.op_ids_h(ops),
        "vt/ops.h": emit_front.ops_h(ops),
        "vt/kernel_table.h": emit_front.kernel_table_h(ops),
        "vt/meta_decls.h": emit_front.meta_decls_h(ops),
        "vt/nodes.h": emit_nodes.nodes_h(ops),
        "vt/boxed.h": emit_front.boxed_h(ops),
        "ops.md": emit_docs.ops_md(ops),
        "_ops.pyi": emit_stub.stub(ops),
    }
    for i in range(FRONT_FILES):
        files[f"front_{i}.cpp"] = emit_front.front_file(ops[i::FRONT_FILES])
    for i in range(NODE_FILES):
        files[f"nodes_{i}.cpp"] = emit_nodes.nodes_file(ops[i::NODE_FILES], headers)
    for i in range(BOXED_FILES):
        files[f"boxed_{i}.cpp"] = emit_front.boxed_file(
            ops[i::BOXED_FILES], ops, with_tables=i == 0
        )
    bindings = emit_python.collect(ops)
    for i in range(PYTHON_FILES):
        files[f"python_ops_{i}.cpp"] = emit_python.python_file(bindings[i::PYTHON_FILES], i)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", type=Path, required=True, help="folder with the op table's YAML files"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    options = parser.parse_args()
    try:
        ops = table.load(options.table)
        files = outputs(ops, options.table.parents[1] / "autograd" / "formulas")
    except SchemaError as error:
        print(f"op table: {error}", file=sys.stderr)
        return 1
    for name, text in files.items():
        path = options.out / name
        if path.exists() and path.read_text() == text:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
