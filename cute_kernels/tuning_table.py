"""Reads the measured choices of tuning/*.json. A file that is wrong stops the build by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import product_table
from .model import EXTENTS, Model, Point, Shape, is_product, tile_of
from .product_table import ProductRow
from .registry import ROOT, Kernel

#: In the place of a variant: the library's kernel is the fastest for operands of the row's dtype.
LIBRARY = "library"
LEAST_WON = 5  # shapes that a model is fitted to
#: How rows call dtypes, and how contracts do.
DTYPES = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Row:
    """On `gpu`, with every extent of the call in its closed range, `variant` is launched. dtype: of
    rows of the library alone, as in contracts."""

    gpu: str
    kernel: str
    variant: str
    extents: dict[str, tuple[int, int]]
    dtype: str = ""


@dataclass(frozen=True)
class Table:
    """A file: the GPUs it holds for, their multiprocessors, its rows (of the first GPU) and, of
    products, the shapes that were measured and the algorithms of cuBLASLt that won."""

    gpus: tuple[str, ...]
    multiprocessors: int
    rows: tuple[Row, ...]
    points: tuple[Point, ...] = field(default=())
    products: tuple[ProductRow, ...] = field(default=())


def read_tables(kernels: dict[str, Kernel], folder: Path = ROOT / "tuning") -> tuple[Table, ...]:
    """All files, in order. Raises ValueError naming file and row."""
    return tuple(_table(kernels, path) for path in sorted(folder.glob("*.json")))


def rows_of(tables: tuple[Table, ...]) -> tuple[Row, ...]:
    """All rows, for each GPU that they hold for."""
    return tuple(
        Row(gpu, row.kernel, row.variant, row.extents, row.dtype)
        for table in tables
        for gpu in table.gpus
        for row in table.rows
    )


def models(kernels: dict[str, Kernel], tables: tuple[Table, ...]) -> dict[str, tuple[str, Model]]:
    """By kernel the model of the first GPU on which variants won often enough for a fit, and that GPU's name."""
    found: dict[str, tuple[str, Model]] = {}
    for table in tables:
        for name in dict.fromkeys(p.kernel for p in table.points):
            points = [p for p in table.points if p.kernel == name]
            if name in found or sum(bool(p.variant) for p in points) < LEAST_WON:
                continue
            tiles = {v.name: tile_of(v) for v in kernels[name].variants}
            model = Model.of(points, tiles, table.multiprocessors)
            found[name] = (table.gpus[0], model)
    return found


def _table(kernels: dict[str, Kernel], path: Path) -> Table:
    record = product_table.read_record(path)
    gpus, rows = record["gpus"], record.get("rows", [])
    multiprocessors = record.get("multiprocessors", 0)
    made, points = [], []
    for at, row in enumerate(rows):
        where = f"{path}, row {at}"
        kernel = _kernel(kernels, row["kernel"], where)
        dtype = ""
        if row["variant"] == LIBRARY:
            dtype = DTYPES.get(row.get("dtype"), "")
            if not dtype or not is_product(kernel):
                raise ValueError(f"{where}: the library's rows are of products, with a 'dtype'")
        elif all(v.name != row["variant"] for v in kernel.variants):
            raise ValueError(f"{where}: {kernel.name} has no variant '{row['variant']}'")
        known = {e.name for e in kernel.contract(kernel.variants[0]).extents}
        extents = {name: (int(low), int(high)) for name, (low, high) in row["extents"].items()}
        if unknown := set(extents) - known:
            raise ValueError(f"{where}: {kernel.name} has no extent {sorted(unknown)}")
        if any(low > high for low, high in extents.values()):
            raise ValueError(f"{where}: a range ends before it begins")
        made.append(Row(gpus[0], kernel.name, row["variant"], extents, dtype))
        if "at" in row:
            shape = _shape(kernel, row["at"], where)
            won = "" if row["variant"] == LIBRARY else row["variant"]
            points.append(Point(gpus[0], kernel.name, shape, won, row["us"], row["library_us"]))
    for name, shapes in record.get("library", {}).items():
        where = f"{path}, library"
        kernel = _kernel(kernels, name, where)
        points += [Point(gpus[0], name, _shape(kernel, s, where), "") for s in shapes]
    if points and not (isinstance(multiprocessors, int) and multiprocessors > 0):
        raise ValueError(f"{path}: measured shapes need 'multiprocessors', a number")
    products = product_table.rows_from(record.get("cublaslt", []), str(path))
    return Table(tuple(gpus), multiprocessors, tuple(made), tuple(points), products)


def _kernel(kernels: dict[str, Kernel], name: str, where: str) -> Kernel:
    if name not in kernels:
        raise ValueError(f"{where}: no kernel is called '{name}'")
    return kernels[name]


def _shape(kernel: Kernel, given: Any, where: str) -> Shape:
    if not is_product(kernel):
        raise ValueError(f"{where}: measured shapes are kept of products, not of {kernel.name}")
    if not isinstance(given, list) or len(given) != len(EXTENTS) or min(given) < 1:
        raise ValueError(f"{where}: {given} is no shape, {', '.join(EXTENTS)}")
    batch, m, n, k = (int(g) for g in given)
    return batch, m, n, k
