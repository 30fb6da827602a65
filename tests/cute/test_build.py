"""Compiling, caching and checking objects. Needs the CuTe DSL, and no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="needs the CuTe DSL")

from vibetensor.cute_kernels import build, check, registry
from vibetensor.cute_kernels.__main__ import main


def test_compile_check_and_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = build.build(tmp_path, ("dropout",), processes=1, say=lambda line: None)
    assert [b.kernel for b in made.variants] == ["dropout_forward"] * 3
    assert all(0 < b.registers < 64 and b.spilled_bytes == 0 for b in made.variants)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.o")}
    assert len(times) == 3
    said: list[str] = []
    assert build.build(tmp_path, ("dropout",), say=said.append).variants == made.variants
    assert "0 of them compiled now" in said[-1]
    # A broken record, a missing header and another key are each compiled again.
    records = sorted(p for p in tmp_path.glob("dropout*.json"))
    records[0].write_text("{")
    records[1].with_suffix(".h").unlink()
    changed = json.loads(records[2].read_text())
    records[2].write_text(json.dumps({**changed, "key": "old"}))
    build.build(tmp_path, ("dropout",), processes=1, say=said.append)
    assert "3 of them compiled now" in said[-1]
    assert main(["check", "--out", str(tmp_path)]) == 0
    assert "| dropout_forward | 3 |" in capsys.readouterr().out
    assert check.device_code(next(iter(times)))[18] == 190  # EM_CUDA


def test_check_fails_on_a_spill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.build(tmp_path, ("dropout",), processes=1, say=lambda line: None)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    record["variants"][0]["spilled_bytes"] = 16
    path.write_text(json.dumps(record))
    assert main(["check", "--out", str(tmp_path)]) == 1
    assert "16 bytes spilled" in capsys.readouterr().err


def test_check_fails_on_a_missing_instruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.build(tmp_path, ("dropout",), processes=1, say=lambda line: None)
    kernel = registry.load(("dropout",))["dropout_forward"]
    wanting = replace(kernel, instructions=("HGMMA", "LDG"))
    monkeypatch.setattr(check, "load", lambda: {kernel.name: wanting})
    monkeypatch.setattr(check, "find_tool", lambda name: None)
    assert len(check.problems(tmp_path, made)) == 3  # a check that cannot be made is a failure
    monkeypatch.undo()
    if check.find_tool("nvdisasm") is None:
        pytest.skip("needs nvdisasm")
    monkeypatch.setattr(check, "load", lambda: {kernel.name: wanting})
    assert check.problems(tmp_path, made) == [
        f"{b.prefix}: no HGMMA in its code" for b in made.variants
    ]


def test_two_builds_give_the_same_objects(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build.build(tmp_path / name, ("dropout",), processes=1, say=lambda line: None)
    made = sorted((tmp_path / "a").glob("*.[oh]"))
    assert len(made) == 6
    for path in made:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
