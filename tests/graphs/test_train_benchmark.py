"""bench/train.py and what belongs to it, at the smallest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import tables
import train
import train_process
from bars import bars
from plans import plan_of
from workloads import WORKLOADS

import vibetensor.torch as vt

ROOT = Path(__file__).parents[2]


def options(name: str, mode: str, dtype: str = "float32") -> dict[str, Any]:
    return {
        "workload": name, "scale": "tiny", "library": "vibetensor", "mode": mode, "device": "cpu",
        "dtype": dtype, "threads": vt.get_num_threads(), "check": 4, "steps": 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_modes_of_every_workload_do_the_same_work(name: str) -> None:
    eager, captured = (train_process.run(options(name, mode)) for mode in train.MODES)
    assert len(eager["losses"]) == 5 and len(set(eager["losses"])) == 5
    assert train.difference(captured, eager) <= train.TOLERANCE["float32"]
    for result in (eager, captured):
        assert len(result["times"]) == 3 and 0 < result["ms"] <= max(result["times"])
    described = captured["capture"]
    assert 0 < described["ops"] <= described["recorded"]
    assert described["lower_bound"] <= described["arena_bytes"] <= 1.05 * described["lower_bound"]


def test_a_run_that_is_too_short_to_be_captured_says_so() -> None:
    with pytest.raises(RuntimeError, match="--check"):
        train_process.run({**options("reverse", "capture"), "check": 2})


@pytest.mark.parametrize("scale", ["tiny", "small", "full"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_arenas_are_within_five_percent_of_the_bound(name: str, scale: str) -> None:
    """At full size too: the recording is dry, and touches no memory."""
    found = plan_of(name, scale)
    assert 0 < found.bound <= found.arena <= 1.05 * found.bound
    assert found.arena < found.unshared
    assert found.ops <= found.recorded


@pytest.mark.torch
def test_the_command_compares_with_torch() -> None:
    pytest.importorskip("torch")
    command = "--device cpu --scale tiny --workload reverse --mode capture --peer torch:eager,graph --steps 3 --check 4"
    package = Path(vt.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "train.py", *command.split()],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "torch graph: CUDA graphs need --device cuda" in run.stdout
    for run_name in ("vibetensor capture", "torch eager"):
        assert run_name in run.stdout


def test_a_run_that_fails_is_a_row_with_its_error() -> None:
    result = train.run_one({"workload": "nothing"}, 60)
    assert "KeyError" in result["error"]


def test_the_fastest_of_several_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"eager": [{"ms": 3.0}, {"ms": 2.0}, {"ms": 4.0}], "capture": [{"error": "no"}]}
    asked = []

    def run_one(options: dict[str, Any], timeout: float) -> dict[str, Any]:
        asked.append(options["mode"])
        return answers[options["mode"]].pop(0)

    monkeypatch.setattr(train, "run_one", run_one)
    runs = [("vibetensor", mode) for mode in train.MODES]
    assert train.quietest(runs, {}, 3, 60) == [{"ms": 2.0}, {"error": "no"}]
    assert asked == ["eager", "capture", "eager", "eager"]


def test_results_of_one_commit_are_kept_together(tmp_path: Path) -> None:
    path = tmp_path / "results" / "steps.json"

    def save(commit: str, command: str, **workloads: int) -> dict[str, Any]:
        steps = [
            {"workload": name.partition("_")[0], "dtype": name.partition("_")[2], "runs": value}
            for name, value in workloads.items()
        ]
        train.save(path, {"commit": commit, "command": command, "steps": steps})
        found = json.loads(path.read_text())
        made = {
            "_".join(filter(None, (each["workload"], each["dtype"]))): each["runs"]
            for each in found["steps"]
        }
        return made | {"": found["command"]}

    assert save("a", "one", vit=1, gpt2=2) == {"vit": 1, "gpt2": 2, "": "one"}
    assert save("a", "two", gpt2=3, reverse=4, vit_bfloat16=6) == {
        "vit": 1,
        "gpt2": 3,
        "reverse": 4,
        "vit_bfloat16": 6,
        "": "one; two",
    }
    assert save("b", "three", vit=5) == {"vit": 5, "": "three"}


def test_unknown_names_are_refused() -> None:
    parse = train.listed(train.PEER_MODES, "torch:")
    assert parse("torch:all") == list(train.PEER_MODES)
    assert parse("torch:none") == []
    with pytest.raises(Exception, match="'fast' is none of eager"):
        parse("torch:eager,fast")


def test_results_become_a_table_and_a_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    capture = {"ops": 80, "recorded": 120, "arena_bytes": 2**21, "lower_bound": 2**20,
               "nodes": {"kernel": 90, "memset": 10}, "nodes_recorded": {"kernel": 250}}  # fmt: skip
    runs = [
        {"library": "vibetensor", "mode": "capture", "ms": 2.0, "first_s": 0.1, "peak_bytes": 2**20, "capture": capture},
        {"library": "torch", "mode": "graph", "ms": 4.0, "first_s": 1.0, "peak_bytes": 2**21},
        {"library": "torch", "mode": "compile", "error": "no compiler"},
    ]  # fmt: skip
    record = {
        "processor": "a <processor>",
        "steps": [{"workload": "minigpt", "shape": "L1", "dtype": "float32", "samples": 100, "runs": runs}],
    }  # fmt: skip
    lines = tables.step_tables("steps_cpu", record)
    (row,) = (line for line in lines if "vibetensor capture" in line)
    assert (
        "| 2 ms | 0.50x | 50,000 | 0.10 s | 1 MiB | 80 of 120 | 100 of 250 | 2.0 MiB, +100.0% |"
        in row
    )
    assert "100 nodes (90 kernel, 10 memset) of 250 recorded (250 kernel): 2.50x" in train.nodes(
        capture
    )
    assert any("torch compile | failed" in line for line in lines)
    chart = xml.etree.ElementTree.parse(tmp_path / "steps_cpu.svg").getroot()
    widths = [float(r.get("width", 0)) for r in chart.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(widths) == 2 and widths[0] == pytest.approx(widths[1] / 2, abs=0.1)


def test_a_chart_without_bars() -> None:
    assert xml.etree.ElementTree.fromstring(bars("nothing", [("group", [])])) is not None
