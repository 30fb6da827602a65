"""python -m vibetensor.cute_kernels build | list | check | table"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import build as builder
from .manifest import Manifest
from .registry import FAMILIES, load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vibetensor.cute_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile what is not up to date")
    build.add_argument("--out", type=Path, default=builder.default_output())
    build.add_argument("--jobs", type=int, default=None, help="processes; default: the cores")
    build.add_argument(
        "--family", action="append", choices=FAMILIES, help="only this one; may be repeated"
    )
    listing = commands.add_parser("list", help="the kernels and their variants")
    listing.add_argument("--variants", action="store_true")
    check = commands.add_parser("check", help="registers, spills and instructions of a build")
    check.add_argument("--out", type=Path, default=builder.default_output())
    table = commands.add_parser("table", help="generate the C++ launch table of a build")
    table.add_argument("--out", type=Path, default=builder.default_output())
    table.add_argument("--into", type=Path, required=True, help="the folder for the sources")
    given = parser.parse_args(arguments)

    if given.command == "build":
        try:
            builder.build(given.out, given.family or FAMILIES, given.jobs)
        except builder.BuildError as error:
            print(error, file=sys.stderr)
            return 1
    elif given.command == "list":
        for kernel in load().values():
            print(f"{kernel.name} ({kernel.family}, {len(kernel.variants)} variants): {kernel.doc}")
            if given.variants:
                for variant in kernel.variants:
                    print(f"  {variant.name}")
    elif given.command == "check":
        return _check(given.out)
    else:
        from .launch_table import generate

        path = given.out / "manifest.json"
        generate(Manifest.read(path), given.out, given.into)
    return 0


def _check(out: Path) -> int:
    from .check import problems

    try:
        manifest = Manifest.read(out / "manifest.json")
    except FileNotFoundError:
        print(f"{out} holds no build: run the command `build` first", file=sys.stderr)
        return 1
    if not manifest.variants:
        print(f"nothing was compiled: {manifest.problem}", file=sys.stderr)
        return 1
    print("| kernel | variants | registers | spilled bytes | object KB | compile s |")
    print("|---|---|---|---|---|---|")
    for name in dict.fromkeys(b.kernel for b in manifest.variants):
        of = [b for b in manifest.variants if b.kernel == name]

        def span(values: list[float], digits: int = 0) -> str:
            low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
            return low if low == high else f"{low}-{high}"

        print(
            f"| {name} | {len(of)} | {span([b.registers for b in of])} | "
            f"{sum(b.spilled_bytes for b in of)} | {span([b.object_bytes / 1000 for b in of])} | "
            f"{span([b.seconds for b in of], 1)} |"
        )
    found = problems(out, manifest)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
