"""What must hold of the hot CUDA C++ kernels without running them: no more local memory than is
stated here with the reason, and the tensor cores' instruction in the code of those made for them.

python csrc/cuda/check_kernels.py build/dev

The folder is a build's: the objects that libvt_cuda.so is linked from lie below it. Looks at their code
for Hopper, sm_90a or sm_90. Needs cuobjdump and nvdisasm, of a toolkit or from PyPI
(nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), and no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cute_kernels.machine_code import find_tool, function_instructions, function_memory


@dataclass(frozen=True)
class Expected:
    """Of a source's kernels. instruction: what all have but those in `without`. local: bytes of
    local memory a thread may use, by kernel, and why; all others may use none. Kernels are patterns
    of names as shown(): the first one that fits counts."""

    instruction: str = ""
    without: tuple[str, ...] = ()
    local: Mapping[str, tuple[int, str]] = field(default_factory=dict)


LOADED_EARLY = "loaded_early"  # does nothing: see preload.h
_TWO_BLOCKS = "kept to 128 registers for two blocks on an SM"
_ALL_REGISTERS = "all 255 registers hold sums of small and of large terms"
_MORE_BLOCKS = "kept to 128 registers for more blocks on an SM"
_ROWS = "a row of float32 stays in the registers of its threads"
_ODD = "rows that no vector fits, which are rare"

EXPECTED = {
    "attention_long_forward": Expected("HGMMA"),
    "attention_long_backward": Expected("HGMMA", without=("sum_heads<*",)),
    "attention_mma": Expected("HMMA"),
    "attention_head": Expected("HMMA", local={"backward_head<*": (24, _MORE_BLOCKS)}),
    "attention_tiles": Expected(
        "HMMA",
        without=("query_number<*",),
        local={
            "tile_gradients<*, true>": (24, _MORE_BLOCKS),
            "tile_gradients<*": (16, _MORE_BLOCKS),
        },
    ),
    "attention_float": Expected("HMMA", local={"float_forward_kernel<1, false>": (32, _TWO_BLOCKS)}),
    "attention_float_backward": Expected(
        "HMMA",
        without=("float_query_numbers<*",),
        local={
            "float_gradients<1, *>": (48, _TWO_BLOCKS),
            "float_gradients<2, *>": (32, _ALL_REGISTERS),
            "float_gradients<4, *>": (96, _ALL_REGISTERS),
        },
    ),
    "matmul_float": Expected(
        "HGMMA",
        without=("add_parts<*",),
        local={"float_product_kernel<*": (256, "the array that plain_sums fills, after inf or NaN")},
    ),
    "norm_stream_forward": Expected(
        local={"norm_stream<*, 3, true, false>": (8, "one address, once a row")}
    ),
    "norm_stream_backward": Expected(
        local={
            "norm_gradient_stream<float, float, 6, true, *>": (32, _ROWS),
            "norm_gradient_stream<float, float, 4, *, false>": (8, _ROWS),
            "norm_gradient_stream<float, *, 4, false, false>": (24, _ROWS),
            "norm_gradient_stream<*, 6, true, true>": (8, "one address, once a row"),
        }
    ),
    "residual_norm": Expected(
        local={
            "sum_and_norm<float, 1>": (8, _ODD),
            "norm_gradient<float, 1>": (128, _ODD),
            "norm_gradient<double, 1>": (16, _ODD),
            "norm_gradient_long<double>": (8, "long rows of float64, which are rare"),
        }
    ),
}  # fmt: skip


def shown(demangled: str) -> str:
    """A kernel's name and template arguments alone: forward_kernel<__half, 64>."""
    name = re.sub(r"^void ", "", demangled.replace("(anonymous namespace)::", ""))
    depth = 0
    for at, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:at]
            break
    head, bracket, rest = name.partition("<")
    return head.rsplit("::", 1)[-1] + bracket + rest


def problems(
    source: str, expected: Expected, memory: Mapping[str, int], code: Mapping[str, set[str]]
) -> list[str]:
    """One line for each thing that is wrong. memory, code: by kernel as shown()."""
    if not memory:
        return [f"{source}: no kernels in its code"]
    found = []
    for kernel, bytes_used in memory.items():
        limit, reason = next(
            (given for pattern, given in expected.local.items() if fnmatchcase(kernel, pattern)),
            (0, ""),
        )
        if bytes_used > limit:
            allowed = f"; {limit} are allowed: {reason}" if reason else ""
            found.append(f"{source}: {kernel}: {bytes_used} bytes of local memory{allowed}")
        wanted = expected.instruction if kernel != LOADED_EARLY else ""
        if (
            wanted
            and not any(fnmatchcase(kernel, p) for p in expected.without)
            and wanted not in code.get(kernel, ())
        ):
            found.append(f"{source}: {kernel}: no {wanted} in its code")
    return found + [
        f"{source}: {pattern}: no kernel of this name is left"
        for pattern in (*expected.local, *expected.without)
        if not any(fnmatchcase(kernel, pattern) for kernel in memory)
    ]


def _output(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _names(mangled: Iterable[str]) -> dict[str, str]:
    names = list(mangled)
    lines = _output(["c++filt"], "\n".join(names)).splitlines() if names else []
    return {name: shown(line) for name, line in zip(names, lines, strict=True)}


def object_of(build: Path, source: str) -> Path | None:
    """The source's object, in whichever target: the newest, as one may be left of another target."""
    found = build.glob(f"csrc/cuda/CMakeFiles/*.dir/kernels/{source}.cu.o")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def code_for(listing: str, archs: Sequence[str]) -> str | None:
    """The first of these that `cuobjdump --list-elf` names."""
    there = set(re.findall(r"\.(sm_\w+)\.cubin", listing))
    return next((arch for arch in archs if arch in there), None)


def check(build: Path, source: str, archs: Sequence[str], cuobjdump: str) -> tuple[list[str], int]:
    """What is wrong with a source's kernels, and how many there are."""
    path = object_of(build, source)
    if path is None:
        return [f"{source}: {build} has no object of it"], 0
    arch = code_for(_output([cuobjdump, "--list-elf", str(path)]), archs)
    if arch is None:
        return [f"{source}: no code for {' or '.join(archs)} in {path}"], 0
    expected = EXPECTED[source]
    memory = function_memory(
        _output([cuobjdump, "--dump-resource-usage", "-arch", arch, str(path)])
    )
    code: dict[str, set[str]] = {}
    if expected.instruction:
        code = function_instructions(_output([cuobjdump, "-sass", "-arch", arch, str(path)]))
    names = _names(memory)
    found = problems(
        source,
        expected,
        {names[m]: n for m, n in memory.items()},
        {names[m]: s for m, s in code.items() if m in names},
    )
    return found, len(memory)


def main(arguments: list[str] | None = None, find: Callable[[str], str | None] = find_tool) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, nargs="?", help="the build's folder")
    parser.add_argument(
        "--sources", action="store_true", help="print the sources looked at, a line each"
    )
    parser.add_argument(
        "--arch", nargs="+", default=["sm_90a", "sm_90"], help="the first that an object has counts"
    )
    options = parser.parse_args(arguments)
    if options.sources:
        print(*EXPECTED, sep="\n")
        return 0
    if options.build is None:
        parser.error("the build's folder is missing")
    cuobjdump, nvdisasm = find("cuobjdump"), find("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        print(
            "cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm",
            file=sys.stderr,
        )
        return 1
    # cuobjdump looks for nvdisasm there.
    os.environ["PATH"] = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
    found, kernels = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for lines, count in pool.map(
            lambda source: check(options.build, source, options.arch, cuobjdump), EXPECTED
        ):
            found += lines
            kernels += count
    for line in found:
        print(line, file=sys.stderr)
    print(f"{kernels} kernels of {len(EXPECTED)} sources: {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
