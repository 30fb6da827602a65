"""The GPU's machine code: the tools of a CUDA toolkit that print it, and what is read from them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_ELF = b"\x7fELF"
_EM_CUDA = 190
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{ *)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", re.M)


def find_tool(name: str) -> str | None:
    """nvdisasm, cuobjdump: on the PATH, of a toolkit, or of the package nvidia-cuda-NAME."""
    if found := shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin"):
        return found
    try:
        import nvidia
    except ImportError:
        return None
    for root in nvidia.__path__:
        for path in Path(root).glob(f"*/bin/{name}"):
            return str(path)
    return None


def device_code(object_file: Path) -> bytes:
    """The GPU's machine code inside an object: an ELF of its own, for the CUDA machine."""
    data = object_file.read_bytes()
    at = data.find(_ELF, 1)
    while at >= 0:
        if int.from_bytes(data[at + 18 : at + 20], "little") == _EM_CUDA:
            return data[at:]
        at = data.find(_ELF, at + 1)
    raise ValueError(f"{object_file}: no CUDA machine code inside")


def instruction_names(text: str) -> set[str]:
    """The machine instructions in a disassembly, without their modifiers."""
    return set(_INSTRUCTION.findall(text))


def function_instructions(text: str) -> dict[str, set[str]]:
    """What `cuobjdump -sass` printed, by the mangled name of each kernel."""
    found: dict[str, set[str]] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name, _, code = part.partition("\n")
        found.setdefault(name.strip(), set()).update(instruction_names(code))
    return found


def function_memory(text: str) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` printed: bytes of local memory a thread, its stack and
    what lies beside it, by the mangled name of each kernel."""
    found: dict[str, int] = {}
    for name, usage in re.findall(r"^ *Function (\S+):\n(.*)$", text, re.M):
        counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        if counts.keys() != {"REG", "STACK", "LOCAL"}:
            raise ValueError(f"{name}: no registers, stack and local memory in {usage.strip()!r}")
        found[name] = max(found.get(name, 0), counts["STACK"] + counts["LOCAL"])
    return found
