"""The allocator's counters as a table, in the form torch prints them."""

from __future__ import annotations

from typing import Any

_WIDTH = 75
_BYTES = (
    ("allocated_bytes", "Allocated memory"),
    ("active_bytes", "Active memory"),
    ("requested_bytes", "Requested memory"),
    ("reserved_bytes", "GPU reserved memory"),
    ("inactive_split_bytes", "Non-releasable memory"),
)
_COUNTS = (
    ("allocation", "Allocations"),
    ("active", "Active allocs"),
    ("segment", "GPU reserved segments"),
    ("inactive_split", "Non-releasable allocs"),
)
_OVERSIZE = (
    ("oversize_allocations", "Oversize allocations"),
    ("oversize_segments", "Oversize GPU segments"),
)


def _scaled(value: int, scale_of: int, step: int, limit: int, units: list[str]) -> tuple[int, str]:
    """`value` in the unit that keeps `scale_of` below `limit`."""
    unit = 0
    while scale_of >= limit and unit + 1 < len(units):
        value //= step
        scale_of //= step
        unit += 1
    return value, units[unit]


def size_text(value: int, scale_of: int | None = None) -> str:
    """Ten characters: a whole number of B, KiB, MiB, ..., in the unit fit for `scale_of`."""
    units = ["B  ", "KiB", "MiB", "GiB", "TiB", "PiB"]
    number, unit = _scaled(value, value if scale_of is None else scale_of, 1024, 768 * 1024, units)
    return f"{number:6d} {unit}"


def count_text(value: int, scale_of: int | None = None) -> str:
    """Ten characters: a count, in thousands or millions where `scale_of` is large."""
    units = [" ", "K", "M"]
    number, unit = _scaled(value, value if scale_of is None else scale_of, 1000, 750_000, units)
    return f"{number:7d} {unit} "


def memory_table(
    stats: dict[str, int], pools: list[dict[str, Any]], device: int, abbreviated: bool
) -> str:
    """The text of memory_summary, from memory_stats and pool_stats; absent counters are 0."""
    lines = ["=" * _WIDTH, f"{f'CUDA memory summary, device ID {device}':^{_WIDTH}}", "-" * _WIDTH]
    ooms, retries = stats.get("num_ooms", 0), stats.get("num_alloc_retries", 0)
    lines.append(f"            CUDA OOMs: {ooms:<12d} |        cudaMalloc retries: {retries:<8d}  ")
    lines.append("=" * _WIDTH)
    lines.append("        Metric         | Cur Usage  | Peak Usage | Tot Alloc  | Tot Freed  ")

    columns = ("current", "peak", "allocated", "freed")

    def rows(key: str, name: str, text: Any, parts: tuple[tuple[str, str], ...]) -> None:
        lines.append("-" * _WIDTH)
        scales = [stats.get(f"{key}{parts[0][0]}.{column}", 0) for column in columns]
        for part, label in parts:
            values = [stats.get(f"{key}{part}.{column}", 0) for column in columns]
            cells = " | ".join(text(v, scale) for v, scale in zip(values, scales))
            lines.append(f" {label or name:<21} | {cells} ")

    pieces: tuple[tuple[str, str], ...] = ((".all", ""),)
    if not abbreviated:
        pieces += (
            (".large_pool", "      from large pool"),
            (".small_pool", "      from small pool"),
        )
    for key, name in _BYTES:
        rows(key, name, size_text, pieces)
    for key, name in _COUNTS:
        rows(key, name, count_text, pieces)
    for key, name in _OVERSIZE:
        rows(key, name, count_text, (("", ""),))
    lines.append("=" * _WIDTH)
    lines += _pool_lines(pools)
    return "\n".join(f"|{line}|" for line in lines) + "\n"


def _pool_lines(pools: list[dict[str, Any]]) -> list[str]:
    """One line a pool and stream, the largest first."""
    if not pools:
        return []
    head = f" {'Pool, stream':<21} | {'Allocated':<10} | {'Pending':<10} | {'Cached':<10} | "
    lines = [f"{head}{'Reserved':<10} ", "-" * _WIDTH]
    for row in sorted(pools, key=lambda row: -row["reserved"]):
        name = "default" if row["pool"] == (0, 0) else "({}, {})".format(*row["pool"])
        stream = f"{row['stream']:#x}" if row["stream"] else "0"
        cells = " | ".join(
            size_text(row[key]) for key in ("allocated", "pending", "cached", "reserved")
        )
        lines.append(f" {f'{name}, {stream}':<21.21} | {cells} ")
    lines.append("=" * _WIDTH)
    return lines
