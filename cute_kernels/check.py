"""What must hold of compiled variants without running them: no spills, and the instructions that
make a kernel what it is (HGMMA in a Hopper product) in its machine code."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from .machine_code import device_code, find_tool, instruction_names
from .manifest import Manifest
from .registry import load


def instructions(object_file: Path, nvdisasm: str) -> set[str]:
    """The names of the machine instructions, without their modifiers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(device_code(object_file))
        cubin.flush()
        text = subprocess.run(
            [nvdisasm, "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return instruction_names(text)


def problems(out: Path, manifest: Manifest) -> list[str]:
    """One line for each thing that is wrong; empty when all is well."""
    found = []
    kernels = load()
    nvdisasm = find_tool("nvdisasm")
    for built in manifest.variants:
        if built.spilled_bytes:
            found.append(f"{built.prefix}: {built.spilled_bytes} bytes spilled")
        if not 0 < built.registers <= 255:
            found.append(f"{built.prefix}: {built.registers} registers")
        wanted = set(kernels[built.kernel].instructions)
        if not wanted:
            continue
        if nvdisasm is None:
            found.append(
                f"{built.prefix}: {', '.join(sorted(wanted))} cannot be looked for without "
                "nvdisasm: pip install nvidia-cuda-nvdisasm"
            )
        elif lacking := wanted - instructions(out / f"{built.prefix}.o", nvdisasm):
            found.append(f"{built.prefix}: no {', '.join(sorted(lacking))} in its code")
    return found
