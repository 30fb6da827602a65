"""Writes a line for each kernel of the table that takes tensors: list_kernels.py TABLE.h OUT.inc"""

import re
import sys
from pathlib import Path

table, out = map(Path, sys.argv[1:])
kernels = re.findall(r"void \(\*(\w+)\)\(([^)]*)\)", table.read_text(encoding="utf-8"))
lines = [f"KERNEL({name})\n" for name, args in kernels if "TensorIterator" not in args]
out.write_text("".join(lines), encoding="utf-8")
