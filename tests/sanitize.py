"""Runs compute-sanitizer's four tools over tests of ops and kernels on a GPU.

python tests/sanitize.py [--tool memcheck] [--subset norms] [--jobs 4] [--processes 4] [--out FOLDER]

Each tool runs each subset (SUBSETS) in processes of its own within the subset's limit, with every
tensor an allocation of its own (VT_CUDA_ALLOC=backend:async), so that accesses outside of one are seen;
captured steps have the native allocator, whose pools they need. A run is clean if the tool wrote a summary
without errors and the tests passed; one that does not end in time, or in which no test ran, is not.
Skipped tests are printed with their reasons, and what a tool is not run on stands in LEFT_OUT and is
printed too. Exits with 1 unless all runs are clean.

Errors within cuDNN's and cuBLASLt's own kernels are counted apart and printed: racecheck finds a buffer of
cuBLASLt's small products that is read and written. synccheck ends at the first barrier of cuDNN's
attention's backward, which a part of a block does not reach, so that it leaves cuDNN's kernels out, and
initcheck leaves out the kernel in which cuBLASLt adds up the parts of a product: its reads of the workspace
are so many that others were dropped (OF_TOOLS).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from on_device import NO_DEVICE, ROOT, Report, print_skipped, pytest_command, read_report

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # a tool's status if it found errors


OF_TOOLS: dict[str, tuple[str, ...]] = {
    "initcheck": (
        *("--print-limit", "0", "--show-backtrace", "no"),
        *("--kernel-name-exclude", "kns=splitKreduce_kernel"),
    ),
    "synccheck": ("--kernel-name-exclude", "kns=cudnn"),
}
_running: set[subprocess.Popen[bytes]] = set()  # what an interruption ends
_CAPTURED = "in_captured_steps or in_the_place_of"
_CAPTURING_ATTENTION = (
    "of_a_projection or between_others or in_a_captured_step or test_captured or fallback or nodes"
)


@dataclass(frozen=True)
class Subset:
    """Tests to run under a tool, and for how many seconds at most. options: of pytest. settings: of the
    allocator."""

    paths: tuple[str, ...]
    limit: float
    options: tuple[str, ...] = ()
    settings: str = "backend:async"


SUBSETS = {
    "ops": Subset(("ops/test_cuda_against_cpu.py",), 1800, ("-k", "not conv")),
    "convolutions": Subset(("ops/test_cuda_against_cpu.py",), 600, ("-k", "conv")),
    "indexing": Subset(("cuda/test_indexing.py", "cuda/test_embedding.py"), 600),
    "reductions": Subset(("cuda/test_reductions.py", "cuda/test_random.py"), 600),
    "norms": Subset(
        ("cuda/test_norms.py", "cuda/test_cross_entropy.py"), 900, ("-k", f"not ({_CAPTURED})")
    ),
    "attention": Subset(
        ("cuda/test_attention.py", "cuda/test_attention_long.py", "cuda/test_attention_sums.py"),
        1800,
        ("-k", f"not ({_CAPTURING_ATTENTION})"),
    ),
    "products": Subset(
        (
            "cuda/test_small_products.py",
            "cuda/test_padded_products.py",
            "cuda/test_float32_products.py",
            "cuda/test_int_mm.py",
        ),
        900,
    ),
    "cute": Subset(
        ("cute/test_on_gpu.py", "cute/test_gemm_on_gpu.py"), 1200, ("-k", f"not ({_CAPTURED})")
    ),
    "captured": Subset(
        (
            "cuda/test_graphs.py",
            "cuda/test_norms.py",
            "cuda/test_cross_entropy.py",
            "cuda/test_attention.py",
            "cuda/test_attention_long.py",
            "cuda/test_attention_sums.py",
            "cute/test_on_gpu.py",
        ),
        900,
        ("-k", f"test_graphs or {_CAPTURED} or {_CAPTURING_ATTENTION}"),
        settings="",
    ),
    "training": Subset(("optim", "nn/test_module.py"), 1200, ("--device", "cuda")),
}

# (tool, subset): why it is not run.
_TMA = (
    "reads of what products wrote are reported, most likely as initcheck does not see stores by TMA"
)
LEFT_OUT: dict[tuple[str, str], str] = {
    ("initcheck", "products"): _TMA,
    ("initcheck", "cute"): _TMA,
    ("initcheck", "convolutions"): (
        "cuDNN's change of layouts reads padding, so often that other errors are dropped; without that "
        "kernel, what it writes is taken for uninitialised"
    ),
}

_SUMMARY = re.compile(
    r"=+ (?:ERROR SUMMARY: (\d+) errors?$|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error)",
    re.MULTILINE,
)
# A line and those set in below it.
_FINDING = re.compile(r"^=+ (\S.*(?:\n=+ {2,}\S.*)*)", re.MULTILINE)
_PLACE = re.compile(
    r"(?: {4}at |access at )(.+?)(?:\+0x\w+)?(?: in \S+)?(?: \[\d+ hazards\])?$", re.MULTILINE
)
_HEADING = re.compile(r"COMPUTE-SANITIZER$|\w+ SUMMARY: ")
_OF_LIBRARIES = re.compile(r"cudnn|nvjet_|cublas")


@dataclass(frozen=True)
class Result:
    """One run. errors: that the tool counted, None without a summary of it; of_libraries: more of them, in
    kernels of cuDNN and cuBLASLt. kinds: how often each of the errors was found, with its kernel, as far as
    the logs tell."""

    tool: str
    subset: str
    seconds: float
    status: int | None  # of pytest; None when it was ended at the limit
    errors: int | None
    report: Report
    of_libraries: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """What is wrong; empty for a clean run."""
        if self.status is None:
            return "did not end in time"
        if self.errors is None:
            return "the tool wrote no summary"
        if self.errors:
            return f"{self.errors} errors"
        if self.report.failed:
            return f"{len(self.report.failed)} tests failed"
        if self.status and not (self.status == FOUND and self.of_libraries):
            return f"status {self.status}"
        return "" if self.report.passed else "no test ran"


def errors_in(text: str) -> int | None:
    """The sum of the errors in a tool's summaries, one for each process; None without any."""
    found = [int(a or b) for a, b in _SUMMARY.findall(text)]
    return sum(found) if found else None


def findings_in(text: str) -> tuple[int, Counter[str]]:
    """How many errors of a tool's logs are in kernels of libraries, and what else was found, by what and
    where it is. Racecheck's warnings are among the latter: its summary does not count them as errors."""
    of_libraries, others = 0, Counter[str]()
    for finding in _FINDING.findall(text):
        places = _PLACE.findall(finding)
        in_library = bool(places) and all(map(_OF_LIBRARIES.search, places))
        if in_library and not finding.startswith("Warning: "):
            of_libraries += 1
        elif not _HEADING.match(finding):
            what = finding.partition("\n")[0].partition(" between ")[0]
            others[": ".join((what, *dict.fromkeys(places)))] += 1
    return of_libraries, others


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or of a toolkit."""
    places = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def run(
    sanitizer: str, tool: str, name: str, subset: Subset, out: Path, processes: int = 0
) -> Result:
    """Runs a tool over a subset and ends it at its limit."""
    report, logs = out / f"{tool}-{name}.xml", out / f"{tool}-{name}-logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    report.unlink(missing_ok=True)
    command = [
        sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND),
        *OF_TOOLS.get(tool, ()), "--log-file", str(logs / "%p.log"),
        *pytest_command(subset.paths, report, *subset.options, *("-n", str(processes)) * bool(processes)),
    ]  # fmt: skip
    environment = {**os.environ, "VT_CUDA_ALLOC": subset.settings}
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    _running.add(child)
    status: int | None
    try:
        status = child.wait(subset.limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if child.poll() is None:  # its group is its own: the tests' processes end with it
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        _running.discard(child)
    written = "\n".join(path.read_text(errors="replace") for path in sorted(logs.iterdir()))
    found = read_report(report) if report.exists() else Report()
    seconds, errors = time.perf_counter() - start, errors_in(written)
    of_libraries, kinds = findings_in(written)
    if errors is not None:
        errors -= of_libraries
    return Result(tool, name, seconds, status, errors, found, of_libraries, kinds)


def main(
    arguments: list[str] | None = None,
    subsets: Mapping[str, Subset] = SUBSETS,
    left_out: Mapping[tuple[str, str], str] = LEFT_OUT,
) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", action="append", choices=TOOLS)
    parser.add_argument("--subset", action="append", choices=list(subsets))
    parser.add_argument("--sanitizer", help="the program; default: of the PATH or the toolkit")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--processes", type=int, default=0, help="that share a run's tests")
    parser.add_argument("--out", type=Path, help="keeps the tools' logs and the reports there")
    options = parser.parse_args(arguments)
    sanitizer = options.sanitizer or find_sanitizer()
    if sanitizer is None:
        parser.error("compute-sanitizer was not found: it is part of the CUDA toolkit")
    out = options.out or Path(tempfile.mkdtemp(prefix="sanitize-"))
    out.mkdir(parents=True, exist_ok=True)
    asked = [(t, n) for n in options.subset or subsets for t in options.tool or TOOLS]
    asked = [each for each in asked if each not in left_out]

    def one(each: tuple[str, str]) -> Result:
        tool, name = each
        print(f"=== {tool}, {name}: at most {subsets[name].limit:.0f} s", flush=True)
        result = run(sanitizer, tool, name, subsets[name], out, options.processes)
        print(described(result), flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            results = list(pool.map(one, asked))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(_running):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            raise
    return summary(results, subsets, left_out, options, out)


def described(r: Result) -> str:
    apart = f"; {r.of_libraries} errors in kernels of cuDNN and cuBLASLt" if r.of_libraries else ""
    return (
        f"{r.tool:<10} {r.subset:<12} {r.report.passed:>6} passed {len(r.report.skipped):>4} skipped "
        f"{r.seconds:>6.0f} s  {r.problem or 'clean'}{apart}"
    )


def summary(
    results: Sequence[Result],
    subsets: Mapping[str, Subset],
    left_out: Mapping[tuple[str, str], str],
    options: argparse.Namespace,
    out: Path,
) -> int:
    """Prints what ran, what did not, and why. 1 unless all is clean."""
    print(f"\n=== summary; logs in {out}")
    skipped = {skip for result in results for skip in result.report.skipped}
    print_skipped(sorted(skipped))
    for (tool, name), reason in left_out.items():
        print(f"left out: {tool}, {name}: {reason}")
    asked = [(t, n) for t in options.tool or TOOLS for n in options.subset or subsets]
    if len(asked) < len(TOOLS) * len(subsets):
        print(f"asked for {len(asked)} of {len(TOOLS) * len(subsets)} runs")
    for result in results:
        for name, reason in result.report.failed:
            print(f"failed: {result.tool}: {name}: {reason}")
        for kind, times in result.kinds.items():
            print(f"found {times} times: {result.tool}, {result.subset}: {kind}")
    for result in results:
        print(described(result))
    bad = [r for r in results if r.problem] or not results
    if any(NO_DEVICE in reason for _, reason in skipped):
        print(f"tests were skipped for want of a device: '{NO_DEVICE}'")
        return 1
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
