"""bench/floor.py: bytes and flops of ops and steps as counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floor
import pytest
from op_work import Work, attended, work_of
from workloads import WORKLOADS

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor.graphs import record


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Any:
    """What is counted does not depend on where it runs."""
    vt.set_default_device("cpu")
    yield
    vt.set_default_device(None)


def work(call: Callable[[], object], name: str) -> Work:
    """Of the only op of that name that the call records."""
    tape = record(call, dry=True).tape
    (op,) = (op for op in tape.ops if op.name == name and not op.is_view)
    return work_of(op)


def test_products() -> None:
    a, b = vt.randn(6, 4), vt.randn(4, 5)
    assert work(lambda: a @ b, "mm") == Work(4 * (24 + 20), 4 * 30, 2 * 6 * 4 * 5, "float32")
    assert work(lambda: a @ a.T, "mm").read == 4 * (24 + 24)  # another view: what a kernel reads
    low = [x.to(vt.bfloat16) for x in (vt.randn(2, 3, 8), vt.randn(16, 8), vt.randn(16))]
    assert work(lambda: F.linear(*low), "linear") == Work(
        2 * (48 + 128 + 16), 2 * 2 * 3 * 16, 2 * 6 * 8 * 16, "float16"
    )
    c, d = vt.randn(3, 2, 4, dtype=vt.float64), vt.randn(3, 4, 5, dtype=vt.float64)
    assert work(lambda: c @ d, "bmm") == Work(8 * (24 + 60), 8 * 30, 2 * 3 * 2 * 4 * 5, "float64")


def test_memory() -> None:
    x, row = vt.randn(8, 16), vt.randn(16)
    assert work(lambda: x + row.expand(8, 16), "add") == Work(4 * (128 + 16), 4 * 128, 0, "")
    assert work(lambda: x + x, "add").read == 4 * 128  # one tensor, read once
    assert work(lambda: x.copy_(row), "copy_") == Work(4 * 16, 4 * 128, 0, "")
    assert work(lambda: x.fill_(1.0), "fill_").written == 4 * 128
    assert work(lambda: x.fill_(1.0), "fill_").read <= 8  # the number
    assert work(lambda: x.add_(row), "add_") == Work(4 * (128 + 16), 4 * 128, 0, "")
    assert work(lambda: x[:, ::2].contiguous(), "clone").bytes == 4 * 2 * 64
    assert work(lambda: x.sum(1), "sum.dim") == Work(4 * 128, 4 * 8, 0, "")


def test_rows_of_a_table_are_read_where_the_index_points() -> None:
    table, index = vt.randn(1000, 8), vt.randint(0, 1000, (5,))
    assert work(lambda: F.embedding(index, table), "embedding") == Work(
        5 * 8 + 4 * 40, 4 * 40, 0, ""
    )
    many = vt.randint(0, 1000, (4000,))  # more rows than the table has
    assert work(lambda: F.embedding(many, table), "embedding").read == 8 * 4000 + 4 * 8000
    rows = vt.randn(5, 8)
    assert work(lambda: table.index_add_(0, index, rows), "index_add_") == Work(
        5 * 8 + 4 * 40 + 4 * 40, 4 * 40, 0, ""
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 8), (8, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(queries: int, keys: int, causal: bool) -> None:
    pairs = sum(1 for q in range(queries) for k in range(keys) if not causal or k <= q)
    assert attended(queries, keys, causal) == pairs
    q, k, v = (vt.randn(2, 3, n, 16, requires_grad=True) for n in (queries, keys, keys))

    def step() -> Any:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        y.sum().backward()
        return y

    forward = work(step, "_attention")
    assert forward.flops == 2 * 2 * 6 * pairs * 16 and forward.kind == "float32"
    assert work(step, "_attention_backward").flops == 5 * 2 * 6 * pairs * 16
    # lse: one number a query.
    assert forward.bytes == 4 * 6 * (2 * queries * 16 + 2 * keys * 16 + queries)


def test_convolution_counts_each_product_once() -> None:
    x, w = vt.randn(2, 4, 9, 9, requires_grad=True), vt.randn(6, 4, 3, 3, requires_grad=True)

    def step() -> None:
        F.conv2d(x, w, stride=2).sum().backward()

    tape = record(step, dry=True).tape
    flops = [w.flops for w in (work_of(op) for op in tape.ops if not op.is_view) if w.flops]
    # As its own ops, or unfolded to products: 2 * 6 channels * 4 * 4 places of 4 * 3 * 3 terms, thrice.
    assert flops == [2 * 2 * 6 * 16 * 36] * 3


def test_an_update_reads_and_writes_what_it_must() -> None:
    weight = vt.nn.Parameter(vt.randn(64, 32))
    weight.grad = vt.randn(64, 32)
    optimizer = vt.optim.AdamW([weight], lr=1e-3, fused=True)
    optimizer.step()
    found = work(optimizer.step, "_fused_adamw_")
    least = 4 * 64 * 32
    assert 4 * least <= found.read <= 4 * least + 64  # and step count, learning rate
    assert 3 * least <= found.written <= 4 * least + 64


def test_every_product_of_the_table_has_its_flops() -> None:
    """An op that computes on tensor cores and is not counted would have a floor that is too low."""
    from op_work import _FLOPS

    yaml = pytest.importorskip("yaml")
    table = Path(__file__).parents[2] / "csrc" / "ops" / "table"
    if not table.exists():
        pytest.skip("needs a checkout")
    uncounted = {
        row["op"]
        for path in table.glob("*.yaml")
        for row in yaml.safe_load(path.read_text())
        if row.get("capture") in ("gemm", "attention") and row["op"] not in _FLOPS
    }
    # A dot product is bound by memory, the factors are random numbers, the lengths of packed
    # sequences are known on the device alone, and 8-bit products have no ceiling yet.
    packed = {"_attention_varlen", "_attention_varlen_backward"}
    assert uncounted == {"dot", "_attention_dropout_factors", "_scaled_mm", *packed}


def test_a_step_as_counted_by_hand() -> None:
    """GPT-2 at tiny scale: 2 layers, 16 wide, 2 heads, 2 sequences of 8 tokens, 11 words."""
    config = WORKLOADS["gpt2"].tiny
    assert (config.layers, config.width, config.heads, config.context) == (2, 16, 2, 8)
    found = floor.planned("gpt2", "tiny", dtype="float32")
    tokens, d = 16, 16
    products = 2 * tokens * (2 * 12 * d * d + 11 * d)
    pairs = 2 * 2 * (8 * 9 // 2)  # sequences, heads
    attention = 2 * 2 * pairs * 8
    assert sum(row.flops for row in found.rows) == 3 * products + 2 * (
        attention + attention * 5 // 2
    )
    assert found.floor == pytest.approx(sum(row.floor for row in found.rows))
    assert all(row.seconds is None and row.gap == 0 for row in found.rows)
    floors = [row.floor for row in found.rows]
    assert floors == sorted(floors, reverse=True)


def test_the_floor_is_the_longer_of_both() -> None:
    ceilings = floor.Ceilings("here", 100.0, {"float16": 1000.0, "float32": 10.0, "float64": 1.0})
    assert ceilings.floor(Work(50, 50, 0, "")) == 1.0
    assert ceilings.floor(Work(50, 50, 2000, "float16")) == 2.0
    assert ceilings.floor(Work(50, 50, 5, "float32")) == 1.0
    assert ceilings.floor(Work(0, 0, 3, "int64")) == 3.0


def test_rows_are_sorted_by_gap_and_sum_to_the_totals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where ops are timed, which is the same code on any device."""
    arguments = ["--workload", "reverse", "--scale", "tiny", "--device", "cpu"]
    assert floor.main([*arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    gaps = [row["seconds"] - row["floor"] for row in rows]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert found["floor"] == pytest.approx(sum(row["floor"] for row in rows))
    assert found["replay"] > 0 and any(row["count"] > 1 for row in rows)
    planned = floor.planned("reverse", "tiny", dtype="float32")
    assert sum(row["flops"] for row in rows) == sum(row.flops for row in planned.rows)
    assert floor.main([*arguments, "--top", "3"]) == 0
    table = capsys.readouterr().out
    assert (
        "the floor" in table and table.rstrip().endswith("others") and len(table.splitlines()) == 7
    )


def test_ceilings_are_measured() -> None:
    found = floor.measured_ceilings("cpu", side=64, elements=1 << 16)
    assert found.where.endswith("as measured") and 1e8 < found.bandwidth < 1e13
    assert set(found.flops) == set(floor.CEILINGS.flops) and all(
        f > 1e6 for f in found.flops.values()
    )
