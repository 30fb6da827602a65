"""The report as a page: one file, safe with any names, complete, and quick with thousands of ops."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as vt
from tests.html_document import Document
from vibetensor.graphs import capture, report_html
from vibetensor.graphs.arena import blocks, live_at, live_bytes
from vibetensor.graphs.plan import aligned
from vibetensor.graphs.report_html import report_page
from vibetensor.graphs.tape import Decision
from vibetensor.viz import page as shared

FOLDER = Path(report_html.__file__).parent
HOSTILE = "</script><script>alert(1)</script><!--&amp;\"' \u2028 \udc80.py"


def two_captures() -> Any:
    layer = vt.nn.Linear(3, 2)

    @capture
    def step(x: Any) -> Any:
        layer.zero_grad()
        loss = layer(x).exp().tanh().sum()
        loss.backward()
        return loss

    for rows in (5, 4):
        for _ in range(3):
            step(vt.ones(rows, 3))
    return step


def test_page_holds_what_was_captured(tmp_path: Path) -> None:
    step = two_captures()
    profile = step.profile(vt.ones(5, 3))
    step.report_html(tmp_path / "page.html")
    document = Document((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert document.title == f"Capture of {step._name}" and document.names[0] == "html"
    data = document.data
    assert data["shown"] == 1  # the one that ran last
    assert [one["number"] for one in data["captures"]] == [1, 2]
    for one, variant in zip(data["captures"], step.variants):
        assert one["replays"] == variant.replays
        assert [op[0] for op in one["ops"]] == [op.name for op in variant.tape.ops]
        assert [op[3] for op in one["ops"]] == [op.text() for op in variant.tape.ops]
        assert [bool(op[4]) for op in one["ops"]] == [op.is_view for op in variant.tape.ops]
        for shown, op in zip(one["ops"], variant.tape.ops):
            assert data["phases"][shown[1]] == op.phase
            assert data["lines"][shown[2]][:3] == [str(op.source), op.source.file, op.source.line]
        (plan,) = variant.lowered.plans.values()
        (arena,) = one["arenas"]
        assert (arena["nbytes"], arena["bound"]) == (plan.nbytes, plan.lower_bound)
        assert len(arena["blocks"]) == len(plan.offsets)
        assert max(arena["live"]) == arena["live"][plan.peak_op] == plan.lower_bound
        for _, _, first, last, offset, nbytes, _ in arena["blocks"]:
            assert 0 <= first <= last < len(variant.tape) and 0 <= offset <= plan.nbytes - nbytes
    lines = [line[4] for line in data["lines"]]
    assert "loss = layer(x).exp().tanh().sum()" in lines and "loss.backward()" in lines
    first, second = data["captures"]
    assert first["again"] == [] and second["profile"] is None
    assert second["again"][0] == "captured again: argument 0 was float32[5, 3], is float32[4, 3]"
    assert ["argument 0", "float32[4, 3]"] in second["facts"]
    assert [op for op, _ in first["profile"]["times"]] == profile.indices
    assert first["profile"]["replay"] == pytest.approx(profile.replay * 1e6)


def test_blocks_that_are_live_together_lie_apart() -> None:
    """What the page draws is the plan: no overlap but where one takes another's place."""
    step = two_captures()
    for variant in step.variants:
        (plan,) = variant.lowered.plans.values()
        found = blocks(variant.tape, plan)
        assert {block.buffer for block in found} == set(plan.offsets)
        assert any(block.in_place_of is not None for block in found)
        for at, a in enumerate(found):
            for b in found[at + 1 :]:
                over = a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes
                if over and a.first <= b.last and b.first <= a.last:
                    assert b.in_place_of is a.buffer and a.last == b.first
        assert max(live_bytes(variant.tape, plan)) == plan.lower_bound
        for at, level in enumerate(live_bytes(variant.tape, plan)):
            assert level == sum(aligned(block.nbytes) for block in live_at(found, at))


def test_page_is_whole_whatever_the_names_are(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    source = "def step(x, key):\n    return x.exp().tanh()\n"
    exec(compile(source, HOSTILE, "exec"), space)
    step = capture(space["step"])
    for _ in range(2):
        step(vt.ones(3), "<b>&</table>" + HOSTILE)
    tape = step.tape()
    tape.decisions += [
        Decision("<i>pass</i>", True, HOSTILE, tape.ops[0]),
        Decision("pass", False, "</td>", tape.ops[1]),
    ]
    step.report_html(tmp_path / "page.html")
    document = Document((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert document.names.count("script") == 2
    assert not {"b", "i"} & set(document.names)
    data = document.data
    assert data["lines"][0][1] == HOSTILE.replace("\udc80", "?")  # no text
    (one,) = data["captures"]
    assert [d[:5] for d in one["decisions"]] == [
        ["<i>pass</i>", True, HOSTILE, "exp", 0],
        ["pass", False, "</td>", "tanh", 0],
    ]
    assert [d[5] for d in one["decisions"]] == [0, 1]
    title = Document(report_page(HOSTILE, step.variants)).title
    assert title == f"Capture of {HOSTILE}"


def test_page_loads_nothing_and_writes_text_only() -> None:
    page = report_page("step", two_captures().variants)
    document = Document(page)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in document.attributes}
    assert not {"link", "img", "iframe", "object"} & set(document.names)
    words = "http: https: url( @import fetch( XMLHttpRequest import( innerHTML document.write eval("
    for word in words.split():
        assert word not in page
    assert "default-src 'none'" in page
    assert len(document.ids) == len(set(document.ids))


def test_script_and_page_know_the_same_elements() -> None:
    script = (FOLDER / "report_page.js").read_text(encoding="utf-8")
    ids = {part.split('"')[0] for part in script.split('at("')[1:]}
    known = set(Document(report_page("step", two_captures().variants)).ids)
    assert ids <= known and len(ids) > 15


def test_thousands_of_ops() -> None:
    def step(x: Any) -> Any:
        for _ in range(1250):
            x = x * 0.5 + (x.tanh() - x).reshape(4, 4).t()
        return x

    step = capture(step)
    for _ in range(2):
        step(vt.ones(4, 4))
    began = time.perf_counter()
    page = report_page("step", step.variants)
    assert time.perf_counter() - began < 5
    assert len(step.tape()) >= 5000
    assert len(page) < 250 * len(step.tape())
    (one,) = Document(page).data["captures"]
    assert len(one["ops"]) == len(step.tape())


def test_an_op_of_thousands_of_tensors_is_shortened() -> None:
    weights = [vt.ones(2, requires_grad=True) for _ in range(400)]
    optimizer = vt.optim.SGD(weights, lr=0.1, momentum=0.9)

    @capture
    def step() -> None:
        optimizer.zero_grad()
        vt.stack(weights).sum().backward()
        optimizer.step()

    for _ in range(4):
        step()
    (one,) = Document(report_page("step", step.variants)).data["captures"]
    assert any("characters more)" in op[3] for op in one["ops"])
    assert max(len(op[3]) for op in one["ops"]) < 1600
    assert max(len(op[7]) for op in one["ops"]) == 64


# --- the script of the page

SCRIPT = "".join(
    path.read_text(encoding="utf-8")
    for path in (Path(shared.__file__).parent / "page.js", FOLDER / "report_page.js")
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def run_node(tmp_path: Path, *parts: str) -> Any:
    script = tmp_path / "script.js"
    script.write_text("\n".join((SCRIPT, *parts)), encoding="utf-8")
    done = subprocess.run(["node", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_script_sums_and_searches(tmp_path: Path) -> None:
    step = two_captures()
    profile = step.profile()
    variant = step.last
    data = Document(report_page("step", step.variants, variant)).data
    by_op, by_phase, by_line, counts, found, few = run_node(
        tmp_path,
        f"const data = {json.dumps(data)}, capture = data.captures[data.shown];",
        "const sums = (group, measure) => grouped(data, capture, group, measure);",
        "console.log(JSON.stringify([sums('op', 'time'), sums('phase', 'time'),",
        " sums('line', 'time'), sums('op', 'ops'),",
        " [search(data, capture, ' BACKWARD  float32[4 ', false), search(data, capture, '', true),",
        "  search(data, capture, 'no such op', true)], shortened(sums('op', 'time'), 3)]));",
    )
    rows = {row.name: row for row in profile.by_op()}
    assert {one["name"] for one in by_op} == rows.keys()
    for one in by_op:
        assert one["total"] == pytest.approx(1e6 * rows[one["name"]].seconds, abs=1e-3)
        assert one["ops"] == rows[one["name"]].ops
        assert sum(one["parts"]) == pytest.approx(one["total"])
    assert [one["name"] for one in by_phase] == [row.name for row in profile.by_phase()]
    assert len(by_line) == len(profile.by_line())
    assert sum(one["total"] for one in counts) == len(profile.ops)
    ops = list(enumerate(variant.tape.ops))
    assert found[0] == [
        at for at, op in ops if op.phase == "backward" and not op.is_view and "float32[4" in str(op)
    ]
    assert found[1] == [at for at, _ in ops] and found[2] == [] and found[0]
    assert len(few) == 3 and few[2]["name"] is None and few[2]["groups"] == len(by_op) - 2
    assert sum(one["total"] for one in few) == pytest.approx(1e6 * profile.total, abs=0.1)


@needs_node
def test_script_finds_the_block_under_the_mouse(tmp_path: Path) -> None:
    step = two_captures()
    data = Document(report_page("step", step.variants)).data
    (plan,) = step.variants[0].lowered.plans.values()
    found = blocks(step.variants[0].tape, plan)
    asked = [
        (op, offset)
        for op in range(len(step.variants[0].tape))
        for offset in range(0, plan.nbytes, 32)
    ]
    hits, holding = run_node(
        tmp_path,
        f"const capture = {json.dumps(data['captures'][0])}, arena = capture.arenas[0];",
        f"const asked = {json.dumps(asked)};",
        "console.log(JSON.stringify([asked.map(([op, offset]) => blockAt(arena.blocks, op, offset)),",
        " holders(capture, arena)]));",
    )
    for (op, offset), hit in zip(asked, hits):
        over = [
            at
            for at, b in enumerate(found)
            if b.first <= op <= b.last and b.offset <= offset < b.offset + b.nbytes
        ]
        assert hit == (over[-1] if over else -1)
    assert any(hit >= 0 for hit in hits) and -1 in hits
    live = live_at(found, plan.peak_op)
    assert sum(nbytes for _, nbytes, _ in holding) == sum(block.nbytes for block in live) > 0
    assert sum(count for _, _, count in holding) == len(live)


@needs_node
def test_script_runs_on_every_kind_of_report(tmp_path: Path) -> None:
    """The whole script on a page that only remembers: no error, and the choices do something."""
    step = two_captures()
    step.profile()
    tape = step.tape()
    tape.decisions += [Decision("one", n % 2 == 0, f"text {n}", tape.ops[0]) for n in range(600)]
    empty = capture(lambda x: None)
    for _ in range(2):
        empty(vt.ones(2))
    for variants in (step.variants, empty.variants):
        page = Document(report_page("step", variants))
        made, texts = run_node(
            tmp_path,
            f"const data = {json.dumps(page.data)};",
            STUB,
            "main(data);",
            "const decided = elements.decisions.children.length;",
            "for (const name of ['capture', 'measure', 'group', 'arena', 'made', 'views'])",
            "  fire(name, 'change');",
            "elements.group.value = 'line'; fire('group', 'change');",
            "elements.capture.value = '0'; fire('capture', 'change');",
            "elements.search.value = 'tanh_backward'; fire('search', 'input');",
            "fire('plan', 'mousemove', { offsetX: 10, offsetY: 300, clientX: 5, clientY: 5 });",
            "fire('plan', 'mousedown', { offsetX: 100 });",
            "fire('plan', 'mouseup', { offsetX: 300 });",
            "fire('plan', 'dblclick');",
            "const ops = elements.found.textContent;",
            "for (const row of elements.tape.children.slice(1)) row.heard.click();",
            "console.log(JSON.stringify([decided, [ops,",
            "  document.getElementById('tip').textContent, elements.summary.children.length]]));",
        )
        assert texts[2] >= 5
        if variants == step.variants:
            assert made == 501  # the first ones, and how many more
            assert texts[0] == "1 op" and "op 0, forward" in texts[1]
        else:
            assert made == 0 and texts[0] == "0 ops"


STUB = """
function element() {
  return { style: {}, children: [], heard: {}, textContent: "", clientWidth: 900, clientHeight: 380,
    checked: true, value: "0", scrollTop: 0,
    set textContent(text) { if (!text) this.children.length = 0; this.text = text; },
    get textContent() { return this.text || ""; },
    addEventListener(name, act) { this.heard[name] = act; },
    appendChild(one) { this.children.push(one); return one; },
    getContext: () => new Proxy({}, { get: () => () => {}, set: () => true }) };
}
const elements = {};
globalThis.window = { innerWidth: 1000, addEventListener() {},
  matchMedia: () => ({ addEventListener() {} }) };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => " #123 " });
globalThis.document = { body: {}, getElementById: (id) => elements[id] ??= element(),
  createElement: element, createTextNode: element };
const known = { measure: "time", group: "op", search: "" };
for (const [id, value] of Object.entries(known)) document.getElementById(id).value = value;
function fire(id, name, event) { elements[id].heard[name]({ offsetX: 0, offsetY: 0, ...event }); }
"""
