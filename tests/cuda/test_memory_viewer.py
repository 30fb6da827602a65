"""The page that shows a memory snapshot, and PyTorch's own viewer on the same data."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.html_document import Document
from vibetensor.torch.cuda.memory import snapshot_html
from vibetensor.train.cli import main
from vibetensor.viz import memory as page_module
from vibetensor.viz.memory import memory_page
from vibetensor.viz.memory_snapshot import load_snapshot
from vibetensor.viz.memory_timeline import Stacks, places_at_peak, pool_rows, timeline

pytestmark = pytest.mark.cpu_only

HOSTILE = "</script><script>alert(1)</script><!--&amp;\"' \u2028 \udc80.py"


def frames(n: int) -> list[dict[str, Any]]:
    return [
        {"filename": "model.py", "line": n, "name": f"layer{n}"},
        {"filename": "train.py", "line": 7, "name": "<module>"},
    ]


def record(first_fit: Any, seed: int, steps: int = 300) -> Any:
    """A random program of allocations and frees; one allocation finds no memory."""
    rng = random.Random(seed)
    allocator = first_fit(16 << 20)
    places = [frames(n) for n in range(8)]
    for step in range(steps):
        if step == steps // 2:
            assert allocator.allocate(20 << 20, places[0]) is None
        if allocator.live and rng.random() < 0.45:
            allocator.free(rng.choice(sorted(allocator.live)))
        else:
            allocator.allocate(rng.randrange(1, 1 << rng.randrange(2, 22)), rng.choice(places))
    return allocator


@pytest.mark.parametrize("seed", range(5))
def test_timeline_counts_what_was_live(first_fit: Any, check_snapshot: Any, seed: int) -> None:
    allocator = record(first_fit, seed)
    snapshot = allocator.snapshot()
    check_snapshot(snapshot)
    stacks = Stacks()
    line = timeline(snapshot["device_traces"][0], snapshot["segments"], stacks)
    assert line.live_bytes() == allocator.live_after
    assert line.reserved == [(-1, 0), (0, 16 << 20)]
    assert len(line.ooms) == sum(e["action"] == "oom" for e in allocator.trace)
    assert [a[0] for a in line.allocations] == sorted(a[0] for a in line.allocations)
    peak, rows = places_at_peak(line)
    assert peak == max(allocator.live_after)
    assert sum(b for b, _, _ in rows) == peak  # eight places: all are shown
    assert all(stacks.text(s)[1] == "train.py:7 <module>" for _, _, s in rows)
    row = pool_rows(snapshot["segments"])[0]
    assert row["allocated"] == allocator.live_after[-1]
    assert row["allocated"] + row["free"] == row["reserved"] == 16 << 20


@pytest.mark.parametrize("lost", [1, 50, 299])
def test_timeline_of_a_ring_that_lost_its_start(first_fit: Any, lost: int) -> None:
    """What was allocated before the oldest event is found by its free or among the blocks."""
    allocator = record(first_fit, 11)
    snapshot = allocator.snapshot()
    trace = snapshot["device_traces"][0][lost:]
    if trace[0]["action"] == "free_completed":  # its memory was live before
        trace = trace[1:]
    line = timeline(trace, snapshot["segments"], Stacks())
    assert line.live_bytes() == allocator.live_after[-len(trace) :]


def test_snapshot_without_events_shows_its_blocks(first_fit: Any) -> None:
    allocator = record(first_fit, 3)
    snapshot = {"segments": allocator.snapshot()["segments"]}
    line = timeline((), snapshot["segments"], Stacks())
    assert places_at_peak(line)[0] == allocator.live_after[-1]
    assert "Who held the memory" in memory_page(snapshot)


def hostile_snapshot(first_fit: Any) -> dict[str, Any]:
    allocator = first_fit(1 << 20)
    stack = [{"filename": HOSTILE, "line": 1, "name": "<lambda>"}]
    allocator.free(allocator.allocate(5000, stack))
    allocator.allocate(100_000, stack)
    allocator.allocate(2 << 20, stack)  # out of memory
    return {**allocator.snapshot(), "allocator_settings": {"<b>": "</table>"}}


def test_page_is_whole_and_holds_its_data_whatever_the_names_are(first_fit: Any) -> None:
    page = memory_page(hostile_snapshot(first_fit), title=HOSTILE)
    document = Document(page)
    assert page.startswith("<!DOCTYPE html>") and document.names[0] == "html"
    assert document.names.count("script") == 2 and document.names.count("b") == 0
    assert document.title == HOSTILE
    data = json.loads(document.scripts[0])
    assert data["lines"] == [f"{HOSTILE}:1 <lambda>"]
    assert data["timelines"][0]["ooms"] == [[5, 2 << 20, 1 << 20, data["stacks"].index([0])]]
    assert len(data["segments"][0]["blocks"]) == 2
    ids = [value for name, value in document.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name in ("timeline", "tip", "data", "device", "axis", "scale", "segments"):
        assert name in ids


def test_page_of_a_file_name_that_is_no_text(first_fit: Any, tmp_path: Path) -> None:
    snapshot_html(tmp_path / "page.html", hostile_snapshot(first_fit))
    assert "?.py:1 &lt;lambda&gt;" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_page_loads_nothing(first_fit: Any) -> None:
    allocator = record(first_fit, 1)
    page = memory_page(allocator.snapshot())
    document = Document(page)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in document.attributes}
    assert not {"link", "img", "iframe", "object"} & set(document.names)
    for word in ("http:", "https:", "url(", "@import", "fetch(", "XMLHttpRequest", "import("):
        assert word not in page
    policy = dict(document.attributes)["content"]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_command_draws_a_pickle(
    first_fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = tmp_path / "run.pickle"
    pickled.write_bytes(pickle.dumps(record(first_fit, 2).snapshot(), protocol=4))
    assert main(["viz", "memory", str(pickled)]) == 0
    first = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert Document(first).title == "CUDA memory: run.pickle"
    assert main(["viz", "memory", str(pickled), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == first
    assert "wrote " in capsys.readouterr().out
    assert main(["viz", "memory", str(pickled), "-o", str(pickled)]) == 1
    assert "would replace the snapshot" in capsys.readouterr().err


class Trap:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a pickle", "is not a memory snapshot"),
        (b"", "is not a memory snapshot"),
        (pickle.dumps({"a": 1}), "it has no segments"),
        (pickle.dumps([1, 2]), "it has no segments"),
        (pickle.dumps({"segments": Trap()}), "a snapshot holds plain data only"),
        (b"\x80\x04\x8c\x02\xff\xfe.", "is not a memory snapshot"),
        (b"I1\nI2\nb.", "is not a memory snapshot"),  # state for a number
    ],
    ids=["text", "empty", "other dict", "list", "code", "no UTF-8", "no object"],
)
def test_other_files_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pickle").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_snapshot("x.pickle")
    assert main(["viz", "memory", "x.pickle"]) == 1
    assert "x.pickle" in capsys.readouterr().err
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "x.html").exists()


def whole_snapshot() -> dict[str, Any]:
    block = {"size": 512, "state": "active_allocated", "frames": frames(1)}
    segment = {"address": 4096, "total_size": 512, "stream": 0, "blocks": [block]}
    event = {"action": "alloc", "size": 512, "addr": 4096, "frames": frames(2)}
    return {"segments": [segment], "device_traces": [[event]], "allocator_settings": {}}


MISSING = object()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("segments",), 3, "segments is of type int, not a list"),
        (("segments", 0), "x", r"segments\[0\] is of type str, not a dict"),
        (("segments", 0, "stream"), MISSING, r"segments\[0\] has no 'stream'"),
        (("segments", 0, "total_size"), "8", r"segments\[0\]\.total_size is of type str"),
        (("segments", 0, "device"), -1, r"segments\[0\]\.device is -1"),
        (("segments", 0, "segment_pool_id"), 7, r"segment_pool_id is of type int"),
        (("segments", 0, "blocks", 0, "state"), MISSING, r"blocks\[0\] has no 'state'"),
        (("segments", 0, "blocks", 0, "size"), -5, r"blocks\[0\]\.size is -5"),
        (("segments", 0, "blocks", 0, "frames"), 1, r"blocks\[0\]\.frames is of type int"),
        (("segments", 0, "blocks", 0, "frames", 1, "line"), MISSING, r"frames\[1\] has no 'line'"),
        (("device_traces",), {}, "device_traces is of type dict, not a list"),
        (("device_traces", 0), None, r"device_traces\[0\] is of type NoneType, not a list"),
        (("device_traces", 0, 0), [], r"device_traces\[0\]\[0\] is of type list, not a dict"),
        (("device_traces", 0, 0, "action"), MISSING, r"device_traces\[0\]\[0\] has no 'action'"),
        (("device_traces", 0, 0, "time_us"), 1.5, r"time_us is of type float"),
        (("allocator_settings",), [1], "allocator_settings is no dict"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_malformed_snapshots_are_refused_by_place(
    tmp_path: Path, path: tuple[Any, ...], value: Any, says: str
) -> None:
    file = tmp_path / "bad.pickle"
    file.write_bytes(pickle.dumps(whole_snapshot()))
    assert load_snapshot(file) == whole_snapshot()
    snapshot = whole_snapshot()
    place: Any = snapshot
    for key in path[:-1]:
        place = place[key]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    file.write_bytes(pickle.dumps(snapshot))
    with pytest.raises(ValueError, match=rf"bad\.pickle' is not a memory snapshot: .*{says}"):
        load_snapshot(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_snapshot(tmp_path / "nowhere.pickle")


# --- the script of the page

FOLDER = Path(page_module.__file__).parent
SCRIPT = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "memory.js"))
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

STUB = """
const heard = {}, painted = [], made = [];
function element(id) {
  return { id, style: {}, children: [], textContent: "", clientWidth: 1200, clientHeight: 380,
    width: 1200, height: 380, value: values[id],
    addEventListener(name, f) { heard[id + " " + name] = f; },
    append(...all) { this.children.push(...all); }, appendChild(one) { this.children.push(one); },
    getContext: () => context };
}
const context = { beginPath() {}, lineTo() {}, moveTo() {}, stroke() {}, fillRect() {},
  fillText(text) { made.push(text); }, putImageData(image) { painted.push(image.data); },
  createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }) };
const elements = {};
globalThis.window = { innerWidth: 1000 };
globalThis.document = {
  getElementById: (id) => elements[id] ??= element(id),
  createElement: () => element(""), addEventListener() {} };
elements.data = { textContent: JSON.stringify(data) };
"""


def run_node(tmp_path: Path, *parts: str) -> Any:
    script = tmp_path / "script.js"
    script.write_text("\n".join(parts), encoding="utf-8")
    done = subprocess.run(["node", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_script_finds_what_was_live(first_fit: Any, tmp_path: Path) -> None:
    allocator = record(first_fit, 4)
    data = json.loads(Document(memory_page(allocator.snapshot())).scripts[0])
    line = data["timelines"][0]
    positions = list(range(0, len(allocator.trace), 3))
    live, found, events = run_node(
        tmp_path,
        SCRIPT,
        f"const line = {json.dumps(line)}, positions = {positions}, live = [], found = [];",
        "sweep(line.allocations, positions, (_, l) => live.push(l.slice()));",
        "positions.forEach((p) => found.push([0, 1e6, 4e6, 1e9].map("
        "(h) => hit(line.allocations, p, h))));",
        "const events = line.times.map((t) => eventAt(line.times, t));",
        "console.log(JSON.stringify([live, found, [eventAt(line.times, -1), ...events]]));",
    )
    sizes = [a[2] for a in line["allocations"]]
    assert [sum(sizes[i] for i in one) for one in live] == allocator.live_after[::3]
    for one, hits in zip(live, found):
        for height, index in zip((0, 1e6, 4e6, 1e9), hits):
            bottom, want = 0, -1
            for i in one:
                if bottom <= height < bottom + sizes[i]:
                    want = i
                bottom += sizes[i]
            assert index == want
    assert events == [-1, *range(len(allocator.trace))]


def drawn(tmp_path: Path, snapshot: dict[str, Any], axis: str) -> Any:
    """What the page draws: the height of each of 1200 columns, its texts, segments and a tip."""
    data = json.loads(Document(memory_page(snapshot)).scripts[0])
    return run_node(
        tmp_path,
        f'const data = {json.dumps(data)}, values = {{ device: "0", axis: "{axis}" }};',
        STUB,
        SCRIPT,
        "const last = painted.length - 1, heights = [];",
        "for (let x = 0; x < 1200; ++x) { let n = 0;",
        "  for (let y = 0; y < 380; ++y) n += painted[last][4 * (y * 1200 + x) + 3] === 255;",
        "  heights.push(n); }",
        'heard["timeline mousemove"]({ offsetX: 600, offsetY: 379, clientX: 5, clientY: 5 });',
        "const tip = elements.tip.textContent, rows = elements.segments.children.length;",
        'heard["timeline mousedown"]({ offsetX: 100 });',
        'heard["timeline mouseup"]({ offsetX: 300 });',
        'heard["timeline dblclick"]();',
        "console.log(JSON.stringify([heights, made, rows, tip]));",
    )


@needs_node
@pytest.mark.parametrize("axis", ["event", "time"])
def test_script_draws_the_live_memory(first_fit: Any, tmp_path: Path, axis: str) -> None:
    allocator = record(first_fit, 5)
    heights, texts, rows, tip = drawn(tmp_path, allocator.snapshot(), axis)
    count = len(allocator.trace)
    top = 1.05 * (16 << 20)  # what is reserved
    for x, height in enumerate(heights):
        # A column shows what is live at its right edge; events are 3 µs apart.
        end = (x + 1) / 1200
        at = math.ceil(count * end) - 1 if axis == "event" else int((count - 1) * end)
        wanted = [380 * live / top for live in allocator.live_after[max(at - 1, 0) : at + 2]]
        assert min(abs(height - h) for h in wanted) <= 1
    assert abs(heights[-1] - 380 * allocator.live_after[-1] / top) <= 1
    assert len(texts) >= sum(e["action"] == "oom" for e in allocator.trace) > 0
    assert rows == 2 and "train.py:7 <module>" in tip


@needs_node
@pytest.mark.parametrize("axis", ["event", "time"])
def test_script_draws_the_last_event_of_few(first_fit: Any, tmp_path: Path, axis: str) -> None:
    """The last event is the only one after which all is live."""
    allocator = first_fit(16 << 20)
    for size in (1 << 20, 2 << 20, 8 << 20):
        allocator.allocate(size, frames(1))
    heights, *_ = drawn(tmp_path, allocator.snapshot(), axis)
    assert abs(heights[-1] - 380 * allocator.live_after[-1] / (1.05 * (16 << 20))) <= 1
    if axis == "event":  # as wide as any other
        assert 250 < sum(h == heights[-1] for h in heights) < 400


@needs_node
@pytest.mark.parametrize("axis", ["event", "time"])
def test_script_draws_what_is_held_without_events(
    first_fit: Any, tmp_path: Path, axis: str
) -> None:
    allocator = record(first_fit, 3)
    snapshot = {"segments": allocator.snapshot()["segments"]}
    heights, _, _, tip = drawn(tmp_path, snapshot, axis)
    live = 380 * allocator.live_after[-1] / (1.05 * (16 << 20))
    assert all(abs(height - live) <= 1 for height in heights)
    assert "before the record to the end" in tip


# --- PyTorch's viewer


@pytest.mark.torch
def test_pytorch_viewer_reads_the_same_data(
    first_fit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    allocator = record(first_fit, 7)
    snapshot = allocator.snapshot()
    sums = viewer.segsum(snapshot)
    assert "total_reserved: 16.0MiB" in sums and "segments: 1" in sums
    told = viewer.trace(copy.deepcopy(snapshot))
    assert f"{len(allocator.trace)} entries" in told and "OutOfMemoryError" in told
    for lines in (
        viewer.memory(snapshot, format_flamegraph=str),
        viewer.segments(snapshot, format_flamegraph=str),
        viewer.compare([], snapshot["segments"], format_flamegraph=str),
    ):
        assert "active_allocated;train.py:7:<module>;model.py:" in lines
    capsys.readouterr()
    for draw in (viewer.trace_plot, viewer.segment_plot):
        assert "MemoryViz" in draw(snapshot)
