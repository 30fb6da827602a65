"""Writes bench/README.md from the checked-in results.

python bench/table.py
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent


def page() -> str:
    """The page's text."""
    lines = [
        "# Benchmarks",
        "",
        "Each runs vibetensor and torch side by side in one process and reports medians. This page is made by",
        "`python bench/table.py` from `results/*.json`.",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        record = json.loads(path.read_text())
        lines += [
            "",
            f"## {path.stem}",
            "",
            f"`{record['command']}`, commit {record['commit']}, {record.get('gpu') or record['processor']}, {record['threads']} threads, "
            f"Python {record['python']}, torch {record['torch']}."
            + (
                f" The driver alone takes {record['launch_us']:.2f} us to launch an empty kernel."
                if "launch_us" in record
                else ""
            ),
            "",
            "| case | vibetensor | torch | ratio | goal | |",
            "|---|---|---|---|---|---|",
        ]
        for row in record["rows"]:
            goal, limit = row.get("goal"), row.get("limit")
            asked = "" if goal is None else f"≤ {goal}x"
            met = goal is None or row["ratio"] <= goal
            if limit is not None:
                asked, met = f"≤ {limit:.3g} {row['unit']}", row["vibetensor"] <= limit
            verdict = "" if not asked else "met" if met else "**missed**"
            torch = (
                f"{row['torch']:.3g} {row['unit']} | {row['ratio']:.2f}"
                if "torch" in row
                else " | "
            )
            lines.append(
                f"| {row['case']} | {row['vibetensor']:.3g} {row['unit']} | {torch} | {asked} | {verdict} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
