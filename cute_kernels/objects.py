"""CuTe objects that come apart from the library: compiled for one op of the user's, linked into a
shared library of their own, and kept on disk.

A library stands beside a record in JSON, whose name has the key of what it was made from. The record
is written last, and names the library by its contents' hash, so that a reader finds both or neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .build import BuildError, default_output, dsl_version, runtime_library
from .contract import Contract

#: Of the record and of how objects are called.
FORMAT = 2
_compiling = threading.RLock()  # the compiler and the process' output are one


@dataclass(frozen=True)
class Job:
    """One variant to compile: a prefix for its symbols, and what makes its function."""

    variant: str
    prefix: str
    contract: Contract
    make: Callable[[], Any]


@dataclass(frozen=True)
class Code:
    """A compiled variant: the names of its functions. registers: 0 where they are not known."""

    variant: str
    entry: str
    init: str
    load: str
    registers: int
    spilled_bytes: int


@dataclass(frozen=True)
class Objects:
    """A shared library with the compiled variants of one op."""

    library: Path
    codes: tuple[Code, ...]
    dsl: str


def cache_folder(create: bool = False) -> Path | None:
    """$XDG_CACHE_HOME/vibetensor/cute_kernels/ops. None where others own it or may write to it."""
    folder = default_output() / "ops"
    if create:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        found = folder.stat()
    except OSError:
        return None
    private = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if private and folder.is_dir() else None


def key_of(description: Any) -> str:
    """Of what objects are made from: names, contracts, options, and the digest of their source."""
    from .compile import OPTIONS

    text = json.dumps([FORMAT, OPTIONS, description])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _hash(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:24]


def find(stem: str, key: str, folder: Path) -> Objects | None:
    """What `folder` holds for this key; None if nothing, or what another version of the DSL made
    where one is installed."""
    try:
        record = json.loads((folder / f"{stem}-{key}.json").read_text())
        codes = tuple(Code(**code) for code in record["codes"])
        library, dsl = folder / record["library"], record["dsl"]
        whole = _hash(library) == record["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    current = dsl_version()
    if not whole or (current and dsl != current) or library.parent != folder:
        return None
    return Objects(library, codes, dsl)


def find_or_compile(
    stem: str,
    key: str,
    jobs: Sequence[Job],
    folder: Path,
    check_source: Callable[[], None] = lambda: None,
) -> tuple[Objects, bool]:
    """What `folder` holds for this key, or else what `jobs` make, and whether they were compiled. Of
    two threads that are here at once, one compiles. Raises as `compile_objects`."""
    if found := find(stem, key, folder):
        return found, False
    with _compiling:
        if found := find(stem, key, folder):  # made while this one waited
            return found, False
        return compile_objects(stem, key, jobs, folder, check_source), True


def compile_objects(
    stem: str,
    key: str,
    jobs: Sequence[Job],
    folder: Path,
    check_source: Callable[[], None] = lambda: None,
) -> Objects:
    """Compiles and links `jobs` into `folder`. Raises BuildError where the DSL, a linker or the CUDA
    runtime is missing, a kernel does not compile, or it does not have its contract's arguments; and
    what `check_source` raises, which is asked before and after."""
    from . import dsl

    if dsl.PROBLEM:
        raise BuildError(f"{stem}: {dsl.PROBLEM}")
    runtime, cudart, linker = runtime_library(), cuda_runtime(), _linker()
    if runtime is None:
        raise BuildError(f"{stem}: the CuTe DSL has no runtime for CUDA 13: install its libs-cu13")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as made:
        place = Path(made)
        check_source()
        codes = [_compile(job, place) for job in jobs]
        check_source()
        library = place / "objects.so"
        command = [
            *linker, "-shared", "-o", str(library), *(str(place / f"{j.prefix}.o") for j in jobs),
            str(runtime), str(cudart), "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", "-Wl,-z,now",
            "-ldl", "-lrt", "-lpthread",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{stem}: linking its objects failed:\n{done.stderr.strip()}")
        contents = _hash(library)
        record = {
            "hash": contents,
            "library": f"{stem}-{contents}.so",
            "dsl": dsl_version(),
            "codes": [asdict(code) for code in codes],
        }
        written = place / "record.json"
        written.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(library, folder / record["library"])
        os.replace(written, folder / f"{stem}-{key}.json")
    return Objects(folder / record["library"], tuple(codes), record["dsl"])


def _compile(job: Job, place: Path) -> Code:
    from . import compile as compiler
    from . import dsl

    said: list[str] = []
    try:
        with _compiling, compiler._captured_output() as said:
            compiled = dsl.cute.compile(
                job.make(), *compiler.placeholders(job.contract), options=compiler.OPTIONS
            )
            compiled.export_to_c(
                file_path=str(place), file_name=job.prefix, function_prefix=job.prefix
            )
    except Exception as error:
        raise BuildError(
            f"{job.prefix} does not compile: {type(error).__name__}: {error}\n{''.join(said)}"
        ) from error
    entry = check_header((place / f"{job.prefix}.h").read_text(), job.prefix, job.contract)
    registers, spilled = compiler._usage(said[0])
    symbols = (f"_mlir_{job.prefix}_cuda_init", f"_mlir_{job.prefix}_cuda_load_to_device")
    return Code(job.variant, entry, *symbols, registers, spilled)


def check_header(header: str, prefix: str, contract: Contract) -> str:
    """The symbol of the exported function, whose arguments must be the contract's: calls pass
    them by that. Raises BuildError."""
    entry = re.search(r"void (\w*_mlir_ciface_\w+)\(void \*\*args", header)
    listed = re.search(r"void \*args\[\d+\] = \{(.*?)\};", header, re.DOTALL)
    if entry is None or listed is None:
        raise BuildError(f"{prefix}: its exported header is not what this version reads")
    got = [a.strip().lstrip("&") for a in listed[1].split(",") if a.strip()]
    names = [t.name for t in contract.tensors] + [s.name for s in contract.scalars]
    if got[:-2] != names:
        raise BuildError(f"{prefix}: its kernel takes {got[:-2]}, and its contract says {names}")
    for t in contract.tensors:
        struct = re.search(
            rf"typedef struct \{{([^}}]*)\}} {re.escape(f'{prefix}_Tensor_{t.name}_t')};", header
        )
        members = struct[1] if struct else ""
        counts = [re.search(rf"{what}\[(\d+)\]", members) for what in
                  ("int32_t dynamic_shapes", "int64_t dynamic_strides")]  # fmt: skip
        found = [int(c[1]) if c else 0 for c in counts]
        if found != [len(t.shape), len(t.shape) - 1]:
            raise BuildError(
                f"{prefix}: its tensor {t.name} has {found[0]} extents and {found[1]} strides that "
                f"are not fixed, and the contract's {t.shape} has {len(t.shape)} and "
                f"{len(t.shape) - 1}"
            )
    return entry[1]


def _linker() -> list[str]:
    if given := os.environ.get("CC"):
        return shlex.split(given)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("linking CuTe objects needs a C compiler: cc, gcc, clang or $CC")


def _cuda_folders() -> Iterator[Path]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-runtime") or []:
            if file.name == "libcudart_static.a":
                yield Path(str(file.locate())).parent
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.append(str(Path(nvcc).resolve().parent.parent))
    for root in filter(None, [*roots, *map(str, sorted(Path("/usr/local").glob("cuda-13*")))]):
        yield from (Path(root) / "lib64", Path(root) / "lib")


def cuda_runtime() -> Path:
    """The static CUDA runtime that objects are linked with. Raises BuildError where there is none."""
    for folder in _cuda_folders():
        if (path := folder / "libcudart_static.a").exists():
            return path
    raise BuildError(
        "linking CuTe objects needs libcudart_static.a of CUDA 13: pip install "
        "'nvidia-cuda-runtime==13.*', or set CUDA_HOME"
    )
