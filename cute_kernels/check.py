"""What must hold of compiled variants without running them: no spills, and the instructions that
make a kernel what it is (HGMMA in a Hopper product) in its machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .manifest import Manifest
from .registry import load

_FATBIN_ELF = b"\x7fELF"
_EM_CUDA = 190


def device_code(object_file: Path) -> bytes:
    """The GPU's machine code inside an object: an ELF of its own, for the CUDA machine."""
    data = object_file.read_bytes()
    at = data.find(_FATBIN_ELF, 1)
    while at >= 0:
        if int.from_bytes(data[at + 18 : at + 20], "little") == _EM_CUDA:
            return data[at:]
        at = data.find(_FATBIN_ELF, at + 1)
    raise ValueError(f"{object_file}: no CUDA machine code inside")


def disassembler() -> str | None:
    """nvdisasm: on the PATH, of a toolkit, or of the package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin"):
        return found
    try:
        import nvidia
    except ImportError:
        return None
    for root in nvidia.__path__:
        for path in Path(root).glob("*/bin/nvdisasm"):
            return str(path)
    return None


def instructions(object_file: Path, nvdisasm: str) -> set[str]:
    """The names of the machine instructions, without their modifiers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(device_code(object_file))
        cubin.flush()
        text = subprocess.run(
            [nvdisasm, "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", text, re.M))


def problems(out: Path, manifest: Manifest) -> list[str]:
    """One line for each thing that is wrong; empty when all is well."""
    found = []
    kernels = load()
    nvdisasm = disassembler()
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
