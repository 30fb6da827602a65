"""Runs every test on a CUDA device and says which did not run, and why.

python tests/on_device.py [--device cuda] [--jobs 8] [--parts NAMES] [--out FOLDER]

--parts runs those parts alone whose names hold one of NAMES, parted by commas: `--parts captured`,
`--parts "own, core"`. Parts run one after another, and each says how long it took as it ends. Each
process of --jobs has a context of its own on the device, which takes memory beside its tests.

The device's own tests (tests/cuda, tests/cute, every op beside the CPU's kernel), then the suites that
run on any device with the default device moved to the GPU: PARTS. Prints each skipped test with its
reason: those that tests/cuda/not_on_device.py lists, and those that a test gave itself. Fails if a test
fails, if a part runs nothing, or if something was skipped for want of a device.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NO_DEVICE = "no CUDA device"


@dataclass(frozen=True)
class Part:
    """Tests that one pytest runs. moved: with the default device on the GPU."""

    name: str
    paths: tuple[str, ...]
    moved: bool = False


PARTS = (
    Part("the device's own", ("cuda", "cute", "ops/test_cuda_against_cpu.py")),
    Part("ops", ("ops",), moved=True),
    Part("autograd, core, properties", ("autograd", "core", "properties"), moved=True),
    Part("nn, amp, optim", ("nn", "amp", "optim"), moved=True),
    Part("captured steps", ("graphs",), moved=True),
    Part("data, io, train", ("data", "io", "train"), moved=True),
)


@dataclass
class Report:
    """What ran. failed, skipped: (test, reason)."""

    passed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_report(path: Path) -> Report:
    """pytest's JUnit XML. An expected failure counts as passed, as its mark is strict."""
    report = Report()
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
        bad = case.find("failure")
        bad = case.find("error") if bad is None else bad
        skipped = case.find("skipped")
        if bad is not None:
            report.failed.append((name, _first_line(bad)))
        elif skipped is not None and skipped.get("type") != "pytest.xfail":
            report.skipped.append((name, _first_line(skipped)))
        else:
            report.passed += 1
    return report


def _first_line(element: xml.etree.ElementTree.Element) -> str:
    text = (element.get("message") or element.text or "no reason").strip()
    return text.splitlines()[0].removeprefix("Skipped: ") if text else "no reason"


def pytest_command(paths: Sequence[str | Path], report: Path, *options: str) -> list[str]:
    """A pytest of this interpreter that writes a report."""
    named = [str(TESTS / path) for path in paths]
    quiet = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    return [sys.executable, "-m", "pytest", *quiet, *options, *named]


def listed_reasons() -> set[str]:
    """The reasons for which tests are skipped by a list, and not by themselves."""
    listed = runpy.run_path(str(TESTS / "cuda" / "not_on_device.py"))["NOT_ON_DEVICE"]
    return set(listed.values())


def print_skipped(skipped: list[tuple[str, str]]) -> None:
    """Every one, by reason."""
    listed = listed_reasons()
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped:
        by_reason.setdefault(reason, []).append(name)
    for title, wanted in (
        ("listed in tests/cuda/not_on_device.py", True),
        ("by themselves", False),
    ):
        groups = {r: n for r, n in by_reason.items() if (r in listed) == wanted}
        print(f"skipped, {title}: {sum(map(len, groups.values()))}")
        for reason, names in sorted(groups.items()):
            print(f"  {reason}")
            for name in sorted(names):
                print(f"    {name}")


def within_another(part: Part) -> list[str]:
    """What lies in the part's folders and is another part's."""
    others = (path for other in PARTS if other is not part for path in other.paths)
    return [path for path in others if any(path.startswith(f"{own}/") for own in part.paths)]


def run_part(part: Part, options: argparse.Namespace, out: Path) -> tuple[Report, int]:
    """The part's report and pytest's status."""
    report = out / f"{part.name.replace(' ', '_').replace(',', '')}.xml"
    report.unlink(missing_ok=True)  # or an earlier run's would be read after a crash
    more = ["--device", options.device] if part.moved else []
    more += [f"--ignore={TESTS / path}" for path in within_another(part)]
    if options.jobs > 1:
        more += ["-n", str(options.jobs)]
    status = subprocess.run(pytest_command(part.paths, report, *more), cwd=ROOT).returncode
    return (read_report(report) if report.exists() else Report()), status


def chosen(parts: Sequence[Part], names: str | None) -> list[Part]:
    """The parts whose names hold one of `names`, in their order. Raises ValueError for one that none
    holds."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in wanted:
        if not any(name in part.name for part in parts):
            known = "; ".join(part.name for part in parts)
            raise ValueError(f"--parts: no part's name holds '{name}'; there are: {known}")
    if names is not None and not wanted:
        raise ValueError("--parts names none")
    return [part for part in parts if not wanted or any(name in part.name for name in wanted)]


def main(arguments: list[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes; more need pytest-xdist")
    parser.add_argument("--parts", help="parts of names, parted by commas", metavar="NAMES")
    parser.add_argument("--out", type=Path, help="keeps the reports (JUnit XML) there")
    options = parser.parse_args(arguments)
    if options.jobs > 1 and importlib.util.find_spec("xdist") is None:
        parser.error("--jobs needs pytest-xdist: pip install pytest-xdist")
    try:
        parts = chosen(parts, options.parts)
    except ValueError as error:
        parser.error(str(error))
    out = options.out or Path(tempfile.mkdtemp(prefix="on_device-"))
    out.mkdir(parents=True, exist_ok=True)
    lines, failed, skipped, bad = [], [], [], False
    for part in parts:
        print(f"=== {part.name}", flush=True)
        start = time.perf_counter()
        report, status = run_part(part, options, out)
        failed += report.failed
        skipped += report.skipped
        wrong = status != 0 or report.failed or not report.passed
        bad |= bool(wrong)
        line = (
            f"{part.name:<30} {report.passed:>6} passed {len(report.failed):>4} failed "
            f"{len(report.skipped):>4} skipped {time.perf_counter() - start:>6.0f} s"
            + (f"  FAILED (pytest's status {status})" if wrong else "")
        )
        lines.append(line)
        print(line, flush=True)
    print("\n=== summary")
    print_skipped(skipped)
    for name, reason in failed:
        print(f"failed: {name}: {reason}")
    print("\n".join(lines))
    if any(NO_DEVICE in reason for _, reason in skipped):
        print(f"tests were skipped for want of a device: '{NO_DEVICE}'")
        bad = True
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
