"""bench/kernels.py: all rows run, with tiny shapes on the CPU, and become a table."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import missed
import pytest
import tables

import vibetensor.torch as vt

torch = pytest.importorskip("torch")

import kernels  # noqa: E402
from floor import Ceilings  # noqa: E402
from kernel_cases import Goal, cases  # noqa: E402
from op_work import Work  # noqa: E402

CEILINGS = Ceilings("here", 1e12, {"float16": 1e14, "float32": 1e13, "float64": 1e13})


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Any:
    """The rows name their device."""
    threads = vt.get_num_threads(), torch.get_num_threads()
    vt.set_default_device("cpu")
    yield
    vt.set_default_device(None)
    vt.set_num_threads(threads[0])
    torch.set_num_threads(threads[1])


@pytest.mark.torch
def test_all_rows_run_and_agree_with_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cpu", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("0 rows failed") and lines[-1].startswith(f"{len(lines) - 2} rows")
    for kernel, rows in (
        ("GEMM forward ", 8), ("GEMM dgrad ", 8), ("GEMM wgrad ", 8), ("GELU", 2),
        ("bias gradient inside", 2), ("attention forward", 5), ("attention backward", 5),
        ("LayerNorm forward", 2), ("LayerNorm backward", 2), ("RMSNorm forward", 2),
        ("RMSNorm backward", 2), ("cross-entropy", 1), ("AdamW", 2),
    ):  # fmt: skip
        assert sum(kernel in line for line in lines) == rows, kernel


def test_shapes_are_those_of_the_table() -> None:
    """At full size, without making the inputs."""
    shapes = {(case.kernel, case.shape): case for case in cases("cpu")}
    assert len(shapes) == 8 * 3 + 3 + 2 * 5 + 2 * 4 + 1 + 2
    product = shapes["GEMM forward", "32768x50304x768"]
    assert product.work.flops == 2 * 32768 * 50304 * 768
    assert product.work.bytes == 2 * (32768 * 768 + 50304 * 768 + 32768 * 50304)
    norm = shapes["LayerNorm forward, residual add inside", "32768x768"]
    assert norm.work.bytes == 2 * (4 * 32768 * 768 + 2 * 768) + 4 * 2 * 32768
    assert norm.goal == Goal(us=28)
    parameters = [case.shape for case in shapes.values() if case.kernel == "AdamW"]
    assert parameters == ["124.5M parameters", "1104M parameters"]
    causal = shapes["attention backward", "B4 H16 T4096 D128 causal"].work.flops
    assert causal == 10 * 4 * 16 * (4096 * 4097 // 2) * 128


def test_a_wrong_result_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(cases("cpu", tiny=True)))
    wrong = replace(case, ours=lambda x, w: lambda: vt.nn.functional.linear(x, w) * 1.5)
    with pytest.raises(RuntimeError, match="differs from torch's cuBLAS"):
        kernels.run_case(wrong, "cpu", CEILINGS, 1)
    nan = replace(case, ours=lambda x, w: lambda: vt.nn.functional.linear(x, w) * float("nan"))
    with pytest.raises(RuntimeError, match="differs"):
        kernels.run_case(nan, "cpu", CEILINGS, 1)

    def missing(*tensors: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    row = kernels.run_case(replace(case, peers={"gone": missing}), "cpu", CEILINGS, 1)
    assert row["torch_us"] is None and row["met"] is None
    assert row["torch_failed"] == {"gone": "no kernel"} and "not judged" in kernels.text_of(row)


def judged(goal: Goal, ours: float, work: Work, **peers: float) -> dict[str, Any]:
    case = replace(next(iter(cases("cpu", tiny=True))), goal=goal, work=work)
    return kernels.row_of(case, {"vibetensor": ours, **peers}, {}, CEILINGS)


def test_goals_and_limits() -> None:
    product = Work(0, 0, 10**9, "float16")  # 10 us at 1e14 a second
    row = judged(Goal(speed=1.1), 20.0, product, a=30.0, b=22.5)
    assert row["met"] and row["torch_mode"] == "b" and row["torch_us"] == 22.5
    assert row["of_limit"] == pytest.approx(0.5) and row["rate"] == pytest.approx(50)
    assert judged(Goal(speed=1.2), 20.0, product, a=22.5)["met"] is False
    memory = Work(10**6, 10**6, 0, "")  # 2 us at 1e12 a second
    assert judged(Goal(us=4), 4.0, memory)["met"] is True
    assert judged(Goal(us=4), 4.1, memory)["met"] is False
    assert judged(Goal(bandwidth=0.9), 2.2, memory)["met"] is True
    assert judged(Goal(bandwidth=0.9), 2.3, memory)["met"] is False


def test_results_become_a_table(tmp_path: Path) -> None:
    row = judged(Goal(speed=1.1), 20.0, Work(0, 0, 10**9, "float16"), a=30.0)
    alone = {**row, "torch_us": None, "torch_mode": None, "met": None, "notes": "a note"}
    record = {
        "command": "python bench/kernels.py --save", "commit": "abc", "processor": "p", "gpu": "a GPU",
        "threads": 1, "python": "3", "torch": "2", "kernels": [row, {**row, "met": False}, alone],
        "ceilings": {"bandwidth": 4e12, "flops": {"float16": 7e14}},
    }  # fmt: skip
    lines = tables.kernel_table(record)
    assert lines[-3].endswith("| 50% | 30.0 us, a | 1.50x | ≥ 1.1x torch | met |")
    assert lines[-2].endswith("**missed** |") and lines[-1].endswith(
        "|  |  | ≥ 1.1x torch (a note) |  |"
    )
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    path = tmp_path / "kernels.json"
    assert tables.with_kernels(page, path) == page
    path.write_text(json.dumps(record))
    made = tables.with_kernels(page, path)
    assert "old" not in made and lines[-1] in made and made.endswith(f"{tables.END}\nafter\n")
    assert tables.with_kernels(made, path) == made
    with pytest.raises(ValueError, match="no place"):
        tables.with_kernels("no marks", path)


def test_every_missed_goal_has_a_reason() -> None:
    record = json.loads((tables.RESULTS / "kernels.json").read_text())
    lost = [row for row in record["kernels"] if row["met"] is False]
    assert [(r["kernel"], r["shape"]) for r in lost if not missed.reason_of(r)] == []
    told = "\n".join(tables.missed_goals(record["kernels"]))
    assert all(f"{r['kernel']} {r['shape']}" in told for r in lost)
    assert tables.missed_goals([row for row in record["kernels"] if row["met"]]) == []


def test_reasons_are_of_rows_that_there_are() -> None:
    there = [(case.kernel, case.shape) for case in cases("cpu", tiny=False)]
    for reason in missed.REASONS:
        assert any(fnmatchcase(k, reason.kernel) and fnmatchcase(s, reason.shape) for k, s in there)
    norm = {"kernel": "LayerNorm forward", "shape": "1x1", "goal": "≤ 28 us", "vibetensor_us": 60.0}
    assert "take 30 us" in missed.reason_of({**norm, "of_limit": 0.5})
    assert missed.reason_of({**norm, "of_limit": 0.4}) == ""


def test_the_guide_has_a_place_for_the_table() -> None:
    guide = Path(tables.__file__).parents[1] / "docs" / "cute-kernels.md"
    text = guide.read_text()
    assert text.index(tables.BEGIN) < text.index(tables.END)


def test_what_cannot_be_saved_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "cpu", "--save"], ["--kernel", "GEMM", "--save"]):
        with pytest.raises(SystemExit):
            kernels.main(arguments)
    assert "--save is for all rows" in capsys.readouterr().err
