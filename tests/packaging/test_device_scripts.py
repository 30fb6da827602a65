"""tests/on_device.py and tests/sanitize.py say truly what ran, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
INNER = """
import os, time, pytest
def test_good(): pass
@pytest.mark.xfail(strict=True)
def test_expected(): assert False
@pytest.mark.skip(reason="a reason\\nof two lines")
def test_skipped(): pass
def test_other():
    pytest.skip("no CUDA device" if "skip" in os.environ.get("INNER", "") else "another reason")
@pytest.mark.skipif("fail" not in os.environ.get("INNER", ""), reason="only where asked for")
def test_bad(): assert 1 == 2
@pytest.mark.skipif("slow" not in os.environ.get("INNER", ""), reason="only where asked for")
def test_slow(): time.sleep(60)
"""
# Runs what it is given, as compute-sanitizer does, and writes a summary for its process.
SANITIZER = """#!{python}
import os, subprocess, sys
log = sys.argv[sys.argv.index("--log-file") + 1].replace("%p", str(os.getpid()))
command = sys.argv[sys.argv.index("--log-file") + 2:]
assert os.environ["VT_CUDA_ALLOC"] == "backend:async"
status = subprocess.call(command)
tool, errors = sys.argv[sys.argv.index("--tool") + 1], os.environ.get("ERRORS", "0")
if errors != "none":
    with open(log, "w") as file:
        if tool == "racecheck":
            file.write(f"========= RACECHECK SUMMARY: {{errors}} hazards displayed ({{errors}} errors, 0 warnings)\\n")
        else:
            file.write(f"========= COMPUTE-SANITIZER\\n========= ERROR SUMMARY: {{errors}} errors\\n")
sys.exit(status)
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # sanitize imports the other by name
    spec.loader.exec_module(module)
    return module


on_device, sanitize = load("on_device"), load("sanitize")


@pytest.fixture
def inner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of tests of which some run."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = tmp_path / "test_inner.py"
    path.write_text(INNER)
    monkeypatch.delenv("INNER", raising=False)
    monkeypatch.delenv("ERRORS", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return path


def test_every_skip_is_printed_with_its_reason(
    inner: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [on_device.Part("inner", (str(inner),))]
    assert on_device.main([], parts) == 0
    said = capfd.readouterr().out
    assert "inner                               2 passed    0 failed    4 skipped" in said
    assert "by themselves: 4\n  a reason\n    test_inner::test_skipped\n" in said
    assert "  another reason\n    test_inner::test_other\n" in said

    monkeypatch.setenv("INNER", "fail, skip")
    assert on_device.main([], parts) == 1
    said = capfd.readouterr().out
    assert "failed: test_inner::test_bad: assert 1 == 2" in said and "1 failed" in said
    assert "skipped for want of a device" in said


def test_a_part_that_does_not_run_fails(inner: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inner.write_text("import nothing_of_this_name")
    assert on_device.main([], [on_device.Part("broken", (str(inner),))]) == 1
    said = capfd.readouterr().out
    assert "FAILED (pytest's status" in said and "failed: test_inner" in said


def test_parts_are_chosen_by_what_their_names_hold(
    inner: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def named(names: str | None) -> list[str]:
        return [part.name for part in on_device.chosen(on_device.PARTS, names)]

    assert named(None) == [part.name for part in on_device.PARTS]
    assert named("captured") == ["captured steps"]
    assert named("core, own") == ["the device's own", "autograd, core, properties"]
    for part in on_device.PARTS:
        assert named(part.name) == [part.name]
    parts = [on_device.Part("first", (str(inner),)), on_device.Part("second", (str(inner),))]
    assert on_device.main(["--parts", "sec"], parts) == 0
    said = capfd.readouterr().out
    assert "=== second" in said and "first" not in said
    # How long it took is said as it ends, before the summary too.
    assert "2 passed" in said.partition("=== summary")[0].splitlines()[-2]
    for names, why in (("third", "no part's name holds 'third'"), (" , ", "names none")):
        with pytest.raises(SystemExit):
            on_device.main(["--parts", names], parts)
        assert why in capfd.readouterr().err


def test_a_file_runs_in_one_part_alone() -> None:
    ops = next(part for part in on_device.PARTS if part.paths == ("ops",))
    assert on_device.within_another(ops) == ["ops/test_cuda_against_cpu.py"]
    assert on_device.within_another(on_device.PARTS[0]) == []


def test_all_suites_are_in_the_command() -> None:
    """What conftest.py can move is moved, and the device's own folders are there."""
    text = (TESTS / "conftest.py").read_text()
    suites = set(eval(text[text.index("SUITES = (") + 9 : text.index(")  # fmt: skip")] + ")"))
    moved = {path for part in on_device.PARTS if part.moved for path in part.paths}
    assert moved == suites
    own = {path for part in on_device.PARTS if not part.moved for path in part.paths}
    assert own == {"cuda", "cute", "ops/test_cuda_against_cpu.py"}
    subsets = [path for subset in sanitize.SUBSETS.values() for path in subset.paths]
    assert all((TESTS / path).exists() for path in (*moved, *own, *subsets))
    assert all(t in sanitize.TOOLS and n in sanitize.SUBSETS for t, n in sanitize.LEFT_OUT)


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    """Options with a sanitizer that runs anywhere."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(SANITIZER.format(python=sys.executable))
    path.chmod(0o755)
    return ["--sanitizer", str(path), "--out", str(tmp_path / "out")]


def test_clean_and_unclean_runs(
    inner: Path, fake: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subsets = {"inner": sanitize.Subset((str(inner),), 60)}
    left_out = dict.fromkeys([("initcheck", "inner"), ("synccheck", "inner")], "why not")
    one = ["--tool", "memcheck", "--tool", "initcheck"]
    assert sanitize.main([*fake, *one], subsets, left_out) == 0
    said = capfd.readouterr().out
    assert said.count("  clean") == 2 and "asked for 2 of 4 runs" in said
    assert "left out: initcheck, inner: why not" in said
    assert "another reason\n    test_inner::test_other" in said
    monkeypatch.setenv("ERRORS", "3")
    monkeypatch.setenv("INNER", "fail, skip")
    assert sanitize.main([*fake, "--tool", "racecheck"], subsets, left_out) == 1
    said = capfd.readouterr().out
    assert "3 errors" in said and "failed: racecheck: test_inner::test_bad" in said
    assert "for want of a device" in said
    assert sanitize.main([*fake, "--tool", "initcheck"], subsets, left_out) == 1  # nothing ran


def test_what_is_no_clean_run() -> None:
    ran = on_device.Report(passed=3)

    def problem(status: int | None = 0, errors: int | None = 0, report: Any = ran) -> str:
        return sanitize.Result("memcheck", "x", 1.0, status, errors, report).problem

    assert problem() == ""
    assert problem(status=None) == "did not end in time"
    assert problem(errors=None) == "the tool wrote no summary"
    assert problem(errors=2) == "2 errors"
    assert problem(status=99) == "status 99"
    assert problem(report=on_device.Report()) == "no test ran"
    assert problem(report=on_device.Report(1, failed=[("a", "b")])) == "1 tests failed"


def test_a_run_ends_at_its_limit(
    inner: Path, fake: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INNER", "slow")
    subsets: dict[str, Any] = {"inner": sanitize.Subset((str(inner),), 1.5)}
    assert sanitize.main([*fake, "--tool", "memcheck"], subsets, {}) == 1
    assert "did not end in time" in capfd.readouterr().out


def test_errors_of_libraries_are_counted_apart(
    tmp_path: Path, inner: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the kernel that they are in, not by who launched it; others are named."""
    tool = tmp_path / "compute-sanitizer"
    read = "========= Uninitialized __global__ memory read of size 2 bytes"
    of_cudnn = [read, "=========     at void cudnn::nhwcToNchwKernel<__half>(x)+0x10"]
    race = ["========= Error: Race reported between Read access at nvjet_sm90_hsh_64x24_NNT+0xb30",
            "=========     and Write access at nvjet_sm90_hsh_64x24_NNT+0x30a0 [480 hazards]"]  # fmt: skip
    own = [read, "=========     at void vt::copy<float>(int)+0x10 in copy.cuh:5",
           "=========     Saved host backtrace",
           "=========         Host Frame: cudnnBackendExecute in libcudnn.so"]  # fmt: skip

    def write(*findings: list[str]) -> None:
        lines = ["========= COMPUTE-SANITIZER"]
        for finding in findings:
            lines += [*finding, "========= "]
        lines.append(f"========= ERROR SUMMARY: {len(findings)} errors")
        tool.write_text(f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[1:]
log = arguments[arguments.index("--log-file") + 1].replace("%p", "1")
open(log, "w").write({chr(10).join(lines)!r})
subprocess.run(arguments[arguments.index("--log-file") + 2 :])
sys.exit({sanitize.FOUND})
""")
        tool.chmod(0o755)

    subset = sanitize.Subset((str(inner),), 60)
    write(of_cudnn, race, of_cudnn)
    result = sanitize.run(str(tool), "initcheck", "inner", subset, tmp_path)
    assert (result.problem, result.errors, result.of_libraries) == ("", 0, 3)
    assert not result.kinds

    write(own, race, own, ["========= Program hit an error on an API call"])
    options = ["--sanitizer", str(tool), "--out", str(tmp_path), "--tool", "memcheck"]
    assert sanitize.main(options, {"inner": subset}, {}) == 1
    said = capfd.readouterr().out
    what = "Uninitialized __global__ memory read of size 2 bytes: void vt::copy<float>(int)"
    assert f"found 2 times: memcheck, inner: {what}\n" in said
    assert "found 1 times: memcheck, inner: Program hit an error on an API call\n" in said
    assert "3 errors; 1 errors in kernels of cuDNN and cuBLASLt\n" in said


def test_warnings_about_libraries_hide_no_errors() -> None:
    """Racecheck's summary has them apart, so that they are not taken off its errors."""
    race = "Race reported between Read access at {0}+0xb30\n=========     and Write access at {0}+0x3 [8 hazards]\n"
    log = "========= "
    log += "========= ".join(
        ["COMPUTE-SANITIZER\n", "Warning: " + race.format("nvjet_hsh"), "Error: " + race.format("nvjet_hsh"),
         "Error: " + race.format("vt::sum"), "RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"]
    )  # fmt: skip
    of_libraries, others = sanitize.findings_in(log)
    assert sanitize.errors_in(log) - of_libraries == 1
    assert others == {"Error: Race reported: vt::sum": 1, "Warning: Race reported: nvjet_hsh": 1}


def test_summaries_are_summed() -> None:
    assert sanitize.errors_in("nothing") is None
    lines = ["========= ERROR SUMMARY: 0 errors", "x", "========= ERROR SUMMARY: 1 error"]
    assert sanitize.errors_in("\n".join(lines)) == 1
    race = "========= RACECHECK SUMMARY: 4 hazards displayed (2 errors, 2 warnings)"
    assert sanitize.errors_in(race) == 2


def test_a_missing_sanitizer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    with pytest.raises(SystemExit):
        sanitize.main([])
    assert "part of the CUDA toolkit" in capsys.readouterr().err


def test_an_interruption_ends_what_runs(tmp_path: Path) -> None:
    """At once, with the tools' processes, and no other run begins."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, time\n"
        f"(pathlib.Path({str(tmp_path)!r}) / f'{{os.getpid()}}.started').touch()\n"
        "time.sleep(60)\n"
    )
    tool.chmod(0o755)
    options = ["--sanitizer", str(tool), "--out", str(tmp_path / "out"), "--jobs", "2"]
    command = [sys.executable, str(TESTS / "sanitize.py"), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # As from a terminal: where these tests run in the background, it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 30
        while len(list(tmp_path.glob("*.started"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    finally:
        process.kill()
        process.wait()
    started = [int(path.stem) for path in tmp_path.glob("*.started")]
    assert len(started) == 2
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
