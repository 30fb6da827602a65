"""Builds, lists and checks the CuTe kernels, and generates their C++ launch table."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from . import build as builder
from .manifest import Manifest
from .registry import FAMILIES, load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vibetensor.cute_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile what is not up to date")
    build.add_argument("--out", type=Path, help="the folder; default: in the user's cache folder")
    build.add_argument("--jobs", type=int, default=None, help="processes; default: the cores")
    build.add_argument(
        "--family", action="append", choices=FAMILIES, help="only this one; may be repeated"
    )
    build.add_argument(
        "--module",
        action="append",
        help="compile the ops that this module registers instead; may be repeated",
    )
    listing = commands.add_parser("list", help="the kernels and their variants")
    listing.add_argument("--variants", action="store_true")
    check = commands.add_parser("check", help="registers, spills and instructions of a build")
    check.add_argument("--out", type=Path, default=builder.default_output())
    table = commands.add_parser("table", help="generate the C++ launch table")
    table.add_argument("--out", type=Path, help="the build it launches; none: contracts only")
    table.add_argument("--into", type=Path, required=True, help="the folder for the sources")
    table.add_argument("--archive", type=Path, help="put the objects into this static library")
    table.add_argument("--ar", default="ar")
    commands.add_parser("runtime", help="print the path of the DSL's static runtime library")
    given = parser.parse_args(arguments)

    if given.command == "build":
        try:
            if given.module:
                if given.family:
                    parser.error("--module and --family exclude each other")
                _build_modules(given.module, given.out)
            else:
                out = given.out or builder.default_output()
                builder.build(out, given.family or FAMILIES, given.jobs)
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
    elif given.command == "runtime":
        path = builder.runtime_library()
        if path is None:
            print("the CuTe DSL for CUDA 13 is not installed", file=sys.stderr)
            return 1
        print(path)
    else:
        from .launch_table import generate

        manifest = Manifest.read(given.out / "manifest.json") if given.out else None
        if given.archive:
            if manifest is None:
                parser.error("--archive needs --out")
            builder.archive(manifest, given.out, given.archive, given.ar)
        generate(manifest, given.into)
    return 0


def _build_modules(modules: list[str], out: Path | None) -> None:
    """Compiles the ops that `modules` register into `out`, or the user's cache folder."""
    # The registry is the one of the package that the modules know, whatever name this one has.
    objects = importlib.import_module("vibetensor.cute_kernels.objects")
    user_ops = importlib.import_module("vibetensor.cute_kernels.user_ops")
    if "" not in sys.path:
        sys.path.insert(0, "")
    before = set(user_ops.registered())
    for module in modules:
        importlib.import_module(module)
    ops = [op for name, op in user_ops.registered().items() if name not in before]
    if not ops:
        raise builder.BuildError(f"{', '.join(modules)}: no op was registered")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    folder = objects.cache_folder(create=True) if out is None else out
    if folder is None:
        raise builder.BuildError("the cache folder is not this user's alone: give another, --out")
    for op in ops:
        try:
            made, compiled = op.build(folder)
        except user_ops.BuildError as error:
            raise builder.BuildError(str(error)) from None
        print(f"{op.name}: {made.library}, {'compiled' if compiled else 'up to date'}")
        for code in made.codes:
            spilled = f", {code.spilled_bytes} bytes spilled" if code.spilled_bytes else ""
            print(f"  {code.variant}: {code.registers or 'unknown'} registers{spilled}")


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
