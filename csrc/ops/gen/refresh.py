"""Rewrites what is checked in of the generated files, after a change of the op table:

python csrc/ops/gen/refresh.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import emit_docs
import emit_stub
import table

ROOT = Path(__file__).parents[3]


def checked_in() -> dict[Path, str]:
    """Path to text: the docs page of ops, and the golden file of the stub."""
    ops = table.load(ROOT / "csrc" / "ops" / "table")
    return {
        ROOT / "docs" / "ops.md": emit_docs.ops_md(ops),
        ROOT / "tests" / "ops" / "golden" / "_ops.pyi": emit_stub.stub(ops),
    }


if __name__ == "__main__":
    for path, text in checked_in().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
