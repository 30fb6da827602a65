"""The builder: every variant to an object, in parallel, cached.

A variant's key is a hash of the sources of its family, the shared sources, its options and the DSL's
version; an object with the same key is not compiled again, so a warm build only hashes files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .manifest import Built, Manifest, read_built
from .registry import FAMILIES, ROOT, Kernel, jobs, load

DISTRIBUTION = "nvidia-cutlass-dsl"
#: What every kernel's code depends on; the rest of the package only drives the build.
SHARED_SOURCES = ("compile.py", "contract.py", "dsl.py", "failure.py", "philox.py", "rows.py")


def default_output() -> Path:
    """$XDG_CACHE_HOME/vibetensor/cute_kernels, where a build outside CMake puts its objects. A
    relative path is ignored, as the XDG specification says."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path.home() / ".cache"
    return cache / "vibetensor" / "cute_kernels"


def dsl_version() -> str:
    """The installed DSL's version; empty where there is none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""


def runtime_library() -> Path | None:
    """The DSL's static runtime for CUDA 13, which objects are linked with; None without one."""
    try:
        files = importlib.metadata.files(f"{DISTRIBUTION}-libs-cu13") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libcuda_dialect_runtime_static.a":
            path = Path(str(file.locate())).resolve()
            return path if path.exists() else None
    return None


def archive(manifest: Manifest, out: Path, path: Path, ar: str = "ar") -> None:
    """All objects of a build in one static library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    objects = "\n".join(str(out / f"{b.prefix}.o") for b in manifest.variants)
    with tempfile.NamedTemporaryFile("w", suffix=".rsp") as response:
        response.write(objects)
        response.flush()
        subprocess.run([ar, "qcsD", str(path), f"@{response.name}"], check=True)


def source_hash(family: str) -> str:
    """Of the family's sources and the shared ones."""
    digest = hashlib.sha256()
    shared = [ROOT / name for name in SHARED_SOURCES]
    for path in [*shared, *sorted((ROOT / family).glob("*.py"))]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(kernel: Kernel, variant: Any, sources: str, dsl: str) -> str:
    """What a cached object must have been made from."""
    text = json.dumps([kernel.prefix(variant), kernel.options(variant), sources, dsl])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cached(out: Path, prefix: str, key: str) -> Built | None:
    record = out / f"{prefix}.json"
    try:
        built = read_built(json.loads(record.read_text()), record)
    except (OSError, ValueError):
        return None
    complete = all((out / f"{prefix}.{suffix}").exists() for suffix in ("o", "h"))
    return built if built.key == key and complete else None


def _compile(name: str, variant_name: str, key: str, family: str, out: Path) -> Built:
    """In a worker. The record is written last: an interrupted build leaves no half object behind
    that looks whole."""
    from .compile import compile_variant

    kernel = load((family,))[name]
    variant = next(v for v in kernel.variants if v.name == variant_name)
    (out / f"{kernel.prefix(variant)}.json").unlink(missing_ok=True)
    built = compile_variant(kernel, variant, out, key)
    (out / f"{built.prefix}.json").write_text(json.dumps(asdict(built)) + "\n")
    return built


class BuildError(RuntimeError):
    """Variants that did not compile, each with its error."""


def build(
    out: Path,
    families: Iterable[str] = FAMILIES,
    processes: int | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Brings `out` up to date and writes its manifest.json.

    Without the DSL the manifest is empty and tells why. Raises BuildError, after all the others
    have been compiled, where variants fail.
    """
    families = tuple(families)
    out.mkdir(parents=True, exist_ok=True)
    manifest_path = out / "manifest.json"
    from .compile import ARCHITECTURE
    from .dsl import PROBLEM

    if PROBLEM:
        manifest = Manifest("", ARCHITECTURE, (), PROBLEM)
        manifest.write(manifest_path)
        say(f"cute_kernels: {PROBLEM}; nothing is compiled, library kernels are used")
        return manifest
    started = time.perf_counter()
    version = dsl_version()
    sources = {family: source_hash(family) for family in families}
    done: dict[str, Built] = {}
    missing: list[tuple[str, str, str, str, Path]] = []
    order: list[str] = []
    for kernel, variant in jobs(families):
        prefix = kernel.prefix(variant)
        order.append(prefix)
        key = key_of(kernel, variant, sources[kernel.family], version)
        if built := _cached(out, prefix, key):
            done[prefix] = built
        else:
            missing.append((kernel.name, variant.name, key, kernel.family, out))
    failed: list[str] = []
    if missing:
        count = min(processes or os.cpu_count() or 1, len(missing))
        # Spawned, not forked: each worker imports the DSL by itself, in a clean process.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            futures = {pool.submit(_compile, *job): job for job in missing}
            for n, future in enumerate(as_completed(futures), 1):
                name, variant_name, *_ = futures[future]
                try:
                    built = future.result()
                    done[built.prefix] = built
                except Exception as error:
                    failed.append(f"{name} {variant_name}: {type(error).__name__}: {error}")
                if n % 25 == 0 or n == len(missing):
                    say(f"cute_kernels: {n} of {len(missing)} compiled")
    if failed:
        raise BuildError("\n".join([f"{len(failed)} variants did not compile:", *sorted(failed)]))
    if set(families) == set(FAMILIES):
        _remove_stale(out, set(order))
    manifest = Manifest(version, ARCHITECTURE, tuple(done[p] for p in order))
    manifest.write(manifest_path)
    size = sum(b.object_bytes for b in manifest.variants)
    say(
        f"cute_kernels: {len(order)} variants, {len(missing)} of them compiled now, "
        f"{size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s, in {out}"
    )
    return manifest


def _remove_stale(out: Path, wanted: set[str]) -> None:
    """Objects of variants that are gone."""
    for record in out.glob("*.json"):
        if record.stem not in wanted and record.name != "manifest.json":
            for suffix in ("json", "o", "h"):
                (out / f"{record.stem}.{suffix}").unlink(missing_ok=True)
