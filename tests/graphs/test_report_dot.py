"""The graph of a tape in DOT: nodes, clusters, and edges that say who reads what."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture, record
from vibetensor.graphs.dataflow import edges
from vibetensor.graphs.dot import to_dot


def arrows(function: Any) -> set[tuple[str | None, str | None]]:
    """Edges by the names of ops; a number tells apart ops of one name."""
    tape = record(function).tape
    names: list[str] = []
    for op in tape.ops:
        names.append(f"{op.name}{sum(other.name == op.name for other in tape.ops[: len(names)])}")
    return {
        (
            None if edge.writer is None else names[edge.writer],
            None if edge.reader is None else names[edge.reader],
        )
        for edge in edges(tape)
    }


def test_edges_of_a_chain() -> None:
    x = vt.ones(4)
    assert arrows(lambda: x.exp().tanh()) == {(None, "exp0"), ("exp0", "tanh0"), ("tanh0", None)}


def test_edges_go_to_the_latest_writer() -> None:
    x = vt.ones(4)

    def step() -> vt.Tensor:
        y = x.exp()
        z = y.tanh()
        y.neg_()
        return z + y

    found = arrows(step)
    assert ("exp0", "tanh0") in found and ("exp0", "neg_0") in found
    assert ("neg_0", "add0") in found and ("exp0", "add0") not in found


def test_edges_of_parts_of_a_buffer() -> None:
    """A reader of all depends on all writers of parts, a reader of one part on its writer."""
    x = vt.ones(4, 4)

    def step() -> tuple[vt.Tensor, vt.Tensor]:
        y = x.exp()
        y[0].neg_()
        y[2:].sqrt_()
        return y[0].tanh(), y.sum()

    found = arrows(step)
    assert ("neg_0", "tanh0") in found and ("sqrt_0", "tanh0") not in found
    writers = {a for a, b in found if b is not None and b.startswith("sum")}
    assert writers == {"exp0", "neg_0", "sqrt_0"}


def test_a_part_with_gaps_does_not_hide_what_lies_between() -> None:
    x = vt.ones(4, 4)

    def step() -> vt.Tensor:
        y = x.exp()
        y[:, 0].neg_()
        return y[:, 1].tanh()

    assert ("exp0", "tanh0") in arrows(step)


def test_state_that_is_changed_comes_in_and_goes_out() -> None:
    total, x = vt.zeros(4), vt.ones(4)
    found = arrows(lambda: total.add_(x).exp())
    assert {(None, "add_0"), ("add_0", None), ("add_0", "exp0"), ("exp0", None)} == found


def make_step() -> Any:
    layer = vt.nn.Linear(3, 2)
    optimizer = vt.optim.SGD(layer.parameters(), lr=0.1)

    @capture
    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = layer(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(4):
        step(vt.ones(5, 3))
    return step


def test_nodes_clusters_and_edges() -> None:
    step = make_step()
    tape, text = step.tape(), step.to_dot()
    assert text.startswith("digraph ") and text.count("{") == text.count("}") == 4
    clusters = dict(re.findall(r"subgraph cluster_(\w+) \{\n(.*?)\n  \}", text, re.S))
    for at, op in enumerate(tape.ops):
        node = f'    op{at} [label="{at} {op.name}\\n{op.source}'
        for phase, body in clusters.items():
            assert (node in body) == (phase == op.phase and not op.is_view)
    declared = set(re.findall(r"^ +(\w+) \[label=", text, re.M))
    ends = re.findall(r"^  (\w+) -> (\w+) \[label=\"(.*)\"\];$", text, re.M)
    assert ends and {name for a, b, _ in ends for name in (a, b)} <= declared
    assert len(ends) == len(list(edges(tape)))
    linear = next(at for at, op in enumerate(tape.ops) if op.name == "linear")
    weight = next(view for view in tape.ops[linear].reads() if view.sizes == (2, 3))
    assert (f"in{weight.buffer.index}", f"op{linear}", f"{weight.buffer.name} 24 B") in ends


def test_names_are_quoted() -> None:
    tape = record(lambda: vt.ones(2).exp()).tape
    text = to_dot(tape, 'a "name" with \\ and\na line')
    assert text.splitlines()[0] == 'digraph "a \\"name\\" with \\\\ and\\na line" {'


def test_an_empty_tape() -> None:
    assert to_dot(record(lambda: None).tape).count("\n") == 5


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_the_dump(tmp_path: Path) -> None:
    step = make_step()
    step.debug_dump(tmp_path / "step.dot")
    assert (tmp_path / "step.dot").read_text(encoding="utf-8") == step.to_dot()
    command = ["dot", "-Tplain", tmp_path / "step.dot"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    nodes = re.findall(r"^node (op\d+) ", done.stdout, re.M)
    assert len(nodes) == sum(not op.is_view for op in step.tape().ops)
