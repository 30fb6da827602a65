"""Writes bench/README.md, its charts and the tables of docs from the checked-in results.

python bench/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bars import bars
from curves import curves
from missed import reason_of
from side_by_side import goal_of

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def page() -> str:
    """The page's text."""
    lines = [
        "# Benchmarks",
        "",
        "Each runs vibetensor and torch side by side and reports medians: `train.py` whole training steps, one",
        "process for each library and mode; the others in turns in one process. This page is made by",
        "`python bench/tables.py` from `results/*.json`.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        lines += ["", f"## {path.stem}", "", *how(record), ""]
        if "convergence" in record:
            lines += convergence(record)
        elif "kernels" in record:
            lines += kernel_table(record)
        else:
            lines += step_tables(path.stem, record) if "steps" in record else rows(record)
    return "\n".join(lines) + "\n"


def how(record: dict[str, Any]) -> list[str]:
    """What was run, and on what."""
    launch = record.get("launch_us")
    commands = record["command"].replace("; ", "`, `")
    return [
        f"`{commands}`, commit {record['commit']}, {record.get('gpu') or record['processor']}, {record['threads']} threads, "
        f"Python {record['python']}, torch {record['torch']}."
        + (
            f" The driver takes {launch:.2f} us to launch an empty kernel by itself."
            if launch is not None
            else ""
        )
    ]


def rows(record: dict[str, Any]) -> list[str]:
    """Cases measured in turns."""
    lines = ["| case | vibetensor | torch | ratio | goal | |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        asked, met = goal_of(row)
        verdict = "" if not asked else "met" if met else "**missed**"
        torch = (
            f"{row['torch']:.3g} {row['unit']} | {row['ratio']:.2f}" if "torch" in row else " | "
        )
        lines.append(
            f"| {row['case']} | {row['vibetensor']:.3g} {row['unit']} | {torch} | {asked} | {verdict} |"
        )
    return lines


def step_tables(name: str, record: dict[str, Any]) -> list[str]:
    """Training steps: a table, and a chart that is linked from it."""
    lines = [
        f"![step times](results/{name}.svg)",
        "",
        "`vs torch` is the step against torch's fastest run of the same workload; `first` the time from the first",
        "call to the end of the first steady step; `arena` what the planner needs over the least that is possible;",
        "`nodes` of a GPU's graph, of as many without the passes, which is what eager launches.",
        "",
        "| workload | run | step | vs torch | tokens/s | first | peak memory | ops | nodes | arena |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = []
    for workload in record["steps"]:
        title = f"{workload['workload']}, {workload['shape']}, {workload['dtype']}"
        measured = [run for run in workload["runs"] if "ms" in run]
        peers = [run["ms"] for run in measured if run["library"] == "torch"]
        for run in workload["runs"]:
            label = f"{run['library']} {run['mode']}"
            if "ms" not in run:
                lines.append(f"| {title} | {label} | failed | | | | | | | |")
                continue
            ours = run["library"] == "vibetensor"
            ratio = f"{run['ms'] / min(peers):.2f}x" if ours and peers else ""
            capture = run.get("capture")
            ops = f"{capture['ops']} of {capture['recorded']}" if capture else ""
            arena = (
                f"{capture['arena_bytes'] / 2**20:,.1f} MiB, +{capture['arena_bytes'] / capture['lower_bound'] - 1:.1%}"
                if capture and capture["lower_bound"]
                else ""
            )
            nodes = ""
            if capture and "nodes" in capture:
                before = sum((capture["nodes_recorded"] or {}).values())
                nodes = f"{sum(capture['nodes'].values())} of {before or '?'}"
            rate = workload["samples"] / run["ms"] * 1e3
            lines.append(
                f"| {title} | {label} | {run['ms']:.3g} ms | {ratio} | {rate:,.0f} | {run['first_s']:.2f} s | "
                f"{run['peak_bytes'] / 2**20:,.0f} MiB | {ops} | {nodes} | {arena} |"
            )
        groups.append(
            (
                title,
                [
                    (f"{r['library']} {r['mode']}", r["ms"], f"{r['ms']:.3g} ms", r["library"] == "vibetensor")
                    for r in measured
                ],
            )
        )  # fmt: skip
    where = record.get("gpu") or record["processor"]
    (RESULTS / f"{name}.svg").write_text(
        bars(f"A training step on {where}, ms (less is better)", groups)
    )
    return lines


def kernel_table(record: dict[str, Any]) -> list[str]:
    """Single kernels beside torch's fastest mode."""
    bandwidth, flops = record["ceilings"]["bandwidth"], record["ceilings"]["flops"]["float16"]
    lines = [
        "`of limit`: the least time that the kernel's bytes or flops take at the rates of the same run "
        f"({bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s), over the time taken.",
        "",
        "| kernel | shape | vibetensor | rate | of limit | torch | speed | goal | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["kernels"]:
        ours, theirs = row["vibetensor_us"], row["torch_us"]
        peer = "" if theirs is None else f"{theirs:,.1f} us, {row['torch_mode']}"
        speed = "" if theirs is None else f"{theirs / ours:.2f}x"
        goal = row["goal"] + (f" ({row['notes']})" if row["notes"] else "")
        verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
        lines.append(
            f"| {row['kernel']} | {row['shape']} | {ours:,.1f} us | {row['rate']:.3g} {row['unit']} | "
            f"{row['of_limit']:.0%} | {peer} | {speed} | {goal} | {verdict} |"
        )
    return lines + missed_goals(record["kernels"])


def missed_goals(kernels: list[dict[str, Any]]) -> list[str]:
    """Why: rows with one reason together."""
    rows_of: dict[str, list[str]] = {}
    for row in kernels:
        if row["met"] is False and (reason := reason_of(row)):
            rows_of.setdefault(reason, []).append(f"{row['kernel']} {row['shape']}")
    if not rows_of:
        return []
    return ["", "Goals that are missed:", ""] + [
        f"- **{'; '.join(names)}.** {reason}" for reason, names in rows_of.items()
    ]


BEGIN, END = "<!-- made by bench/tables.py from kernels.json -->", "<!-- end of kernels.json -->"


def with_kernels(text: str, path: Path) -> str:
    """A page with the table of kernels between its marks; as it is without results."""
    if not path.exists():
        return text
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the table of kernels: {BEGIN} ... {END}")
    record = json.loads(path.read_text())
    table = "\n".join([*how(record), "", *kernel_table(record)])
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def convergence(record: dict[str, Any]) -> list[str]:
    """Validation losses of both libraries: a table, and a chart for each workload."""
    lines = [
        f"Text: {record['source']}. Last validation losses of each seed; both libraries have a seed's weights and batches.",
        "",
        "| workload | steps | batch | vibetensor | torch | means within torch's spread |",
        "|---|---|---|---|---|---|",
    ]
    charts = []
    for each in record["convergence"]:
        ours, theirs = (
            ", ".join(f"{v:.4f}" for v in each["last"][lib]) for lib in ("vibetensor", "torch")
        )
        verdict = "yes" if each["within_spread"] else "NO"
        name = each["workload"]
        lines.append(
            f"| {name} | {each['steps']} | {each['batch']} | {ours} | {theirs} | {verdict} |"
        )
        drawn = [
            (library, line, library == "vibetensor")
            for library, found in each["curves"].items()
            for line in found
        ]
        (RESULTS / f"convergence_{name}.svg").write_text(curves(f"{name}: validation loss", drawn))
        charts.append(f"![{name}](results/convergence_{name}.svg)")
    return [*lines, "", *charts]


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
    guide = HERE.parent / "docs" / "cute-kernels.md"
    guide.write_text(with_kernels(guide.read_text(), RESULTS / "kernels.json"))
