"""Rows of tuning tables that name an algorithm of cuBLASLt for one product: read, checked, merged and
written. The file of a user (``torch.cuda.tunable``) and the tables of ``tuning/`` have them alike, as
the list "cublaslt".
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "f16", "f32", "tf32", "f64")
#: Transposed ("t") or not: the second operand, then the first. "tn" is a linear layer's product, "nn"
#: the gradient of its input, "nt" that of its weight.
LAYOUTS = ("tn", "nn", "nt", "tt")
EPILOGUES = ("", "relu", "gelu_tanh", "gelu_tanh_backward")
#: Reduction schemes of the library that keep the parts of 16-bit results in float32.
WIDE_REDUCTIONS = (0, 2)
_LARGEST = 2**62
_MOST_ROWS = 100_000
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, order=True)
class Product:
    """batch matrices m x n, each a sum over k. bias: a number for each column is added. accumulate: to
    what the result held. "tf32" is float32 whose operands may be rounded to TF32."""

    dtype: str
    layout: str
    batch: int
    m: int
    n: int
    k: int
    epilogue: str = ""
    bias: bool = False
    accumulate: bool = False

    @property
    def native(self) -> tuple[Any, ...]:
        """As vibetensor._cuda takes it."""
        return (self.dtype, self.layout, self.epilogue, self.bias, self.accumulate,
                self.batch, self.m, self.n, self.k)  # fmt: skip

    @classmethod
    def of_native(cls, given: Iterable[Any]) -> Product:
        """From vibetensor._cuda."""
        dtype, layout, epilogue, bias, accumulate, batch, m, n, k = given
        return cls(dtype, layout, batch, m, n, k, epilogue, bias, accumulate)

    def __str__(self) -> str:
        batch = f"{self.batch}x" if self.batch != 1 else ""
        parts = [f"{self.dtype} {self.layout} {batch}{self.m}x{self.n}x{self.k}"]
        parts += [w for w, there in (("bias", self.bias), (self.epilogue, self.epilogue),
                                     ("added", self.accumulate)) if there]  # fmt: skip
        return ", ".join(parts)


@dataclass(frozen=True)
class Configuration:
    """An algorithm as the library describes it (cublasLtMatmulAlgoConfigAttributes_t)."""

    id: int
    tile: int = 0
    stages: int = 0
    split_k: int = 0
    reduction: int = 0
    swizzle: int = 0
    custom: int = 0
    inner: int = 0
    cluster: int = 0

    @property
    def native(self) -> tuple[int, ...]:
        """As vibetensor._cuda takes it."""
        return tuple(asdict(self).values())


_LIMITS = {name: 2**31 for name in ("id", "split_k")} | {
    name: 2**16 for name in ("inner", "cluster")
}


@dataclass(frozen=True)
class ProductRow:
    """`algorithm` took us microseconds, the library's first answer first_us, by version `version` of
    the library."""

    product: Product
    algorithm: Configuration
    us: float = field(default=0.0, compare=False)
    first_us: float = field(default=0.0, compare=False)
    version: int = field(default=0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """What is not said is as by default."""
        p = self.product
        row: dict[str, Any] = {"dtype": p.dtype, "layout": p.layout, "at": [p.batch, p.m, p.n, p.k]}
        row |= {k: v for k, v in (("epilogue", p.epilogue), ("bias", p.bias),
                                  ("accumulate", p.accumulate)) if v}  # fmt: skip
        algorithm = asdict(self.algorithm)
        row["algorithm"] = {k: v for k, v in algorithm.items() if v or k == "id"}
        row |= {k: round(v, 2) for k, v in (("us", self.us), ("first_us", self.first_us)) if v}
        return row | ({"version": self.version} if self.version else {})


def rows_from(given: Any, where: str) -> tuple[ProductRow, ...]:
    """The rows of a list as JSON has it. Raises ValueError naming the row and what is wrong."""
    if not isinstance(given, list) or len(given) > _MOST_ROWS:
        raise ValueError(f"{where}: 'cublaslt' is a list of at most {_MOST_ROWS} rows")
    rows: dict[Product, ProductRow] = {}
    for at, item in enumerate(given):
        row = _row(item, f"{where}, cublaslt row {at}")
        if row.product in rows:
            raise ValueError(f"{where}, cublaslt row {at}: {row.product} has a row already")
        rows[row.product] = row
    return tuple(rows.values())


def _row(given: Any, where: str) -> ProductRow:
    known = {"dtype", "layout", "at", "epilogue", "bias", "accumulate", "algorithm", "us",
             "first_us", "version"}  # fmt: skip
    _check_names(given, known, {"dtype", "layout", "at", "algorithm"}, where)
    for name, values in (("dtype", DTYPES), ("layout", LAYOUTS), ("epilogue", EPILOGUES)):
        value = given.get(name, "")
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"{where}: {name} is one of {', '.join(values)}, not {value!r:.50}")
    for name in ("bias", "accumulate"):
        if not isinstance(given.get(name, False), bool):
            raise ValueError(f"{where}: {name} is true or false")
    shape = given["at"]
    if not isinstance(shape, list) or len(shape) != 4:
        raise ValueError(f"{where}: 'at' is batch, m, n, k")
    batch, m, n, k = (_integer(v, 1, _LARGEST, "an extent", where) for v in shape)
    product = Product(given["dtype"], given["layout"], batch, m, n, k, given.get("epilogue", ""),
                      given.get("bias", False), given.get("accumulate", False))  # fmt: skip
    algorithm = given["algorithm"]
    names = set(Configuration.__dataclass_fields__)
    _check_names(algorithm, names, {"id"}, f"{where}, algorithm")
    configuration = Configuration(
        **{name: _integer(v, 0, _LIMITS.get(name, 2**32) - 1, name, where)
           for name, v in algorithm.items()}
    )  # fmt: skip
    if product.dtype in ("bf16", "f16") and configuration.reduction not in WIDE_REDUCTIONS:
        raise ValueError(f"{where}: reduction {configuration.reduction} rounds the parts of sums")
    times = {name: _microseconds(given.get(name, 0.0), name, where) for name in ("us", "first_us")}
    version = _integer(given.get("version", 0), 0, 2**31, "version", where)
    return ProductRow(product, configuration, **times, version=version)


def _check_names(given: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: is no object")
    if missing := needed - set(given):
        raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}")
    if unknown := set(given) - known:
        raise ValueError(f"{where}: {min(unknown)!r:.50} is not known")


def _integer(value: Any, low: int, high: int, what: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{where}: {what} is an integer from {low} to {high}, not {value!r:.50}")
    return value


def _microseconds(value: Any, what: str, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e12:  # false for nan, too
        raise ValueError(f"{where}: {what} is a number of microseconds, not {value!r:.50}")
    return float(value)


def read_record(path: Path) -> dict[str, Any]:
    """A tuning table as JSON has it, its GPUs and product rows checked, of the rest the types alone.
    Raises ValueError naming the file; OSError where it cannot be read."""
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{path}: is larger than {_MOST_BYTES} bytes")
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also of what is no UTF-8
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is no object")
    gpus = record.get("gpus")
    if not isinstance(gpus, list) or not gpus or not all(isinstance(g, str) and g for g in gpus):
        raise ValueError(f"{path}: needs 'gpus', a list of names")
    if unknown := set(record) - {"gpus", "multiprocessors", "library", "rows", "cublaslt"}:
        raise ValueError(f"{path}: {min(unknown)!r:.50} is not known")
    for name, kind, what in (("rows", list, "a list"), ("library", dict, "an object of lists")):
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(f"{path}: '{name}' is {what}")
    rows_from(record.get("cublaslt", []), str(path))
    return record


def read_rows(path: Path, gpu: str) -> tuple[ProductRow, ...]:
    """The rows of a file for a GPU. Raises ValueError where the file is wrong, or for other GPUs."""
    record = read_record(path)
    if gpu not in record["gpus"]:
        raise ValueError(f"{path}: its rows are of {', '.join(record['gpus'])}, this is {gpu}")
    return rows_from(record.get("cublaslt", []), str(path))


def merged(
    old: Iterable[ProductRow], new: Iterable[ProductRow], measured: Iterable[Product]
) -> list[ProductRow]:
    """Old rows stay, save those of products that were measured again. Sorted by product, so that a
    table's text changes where its rows do."""
    again = set(measured)
    rows = {row.product: row for row in old if row.product not in again}
    rows |= {row.product: row for row in new}
    return [rows[product] for product in sorted(rows)]


def text_of(record: dict[str, Any]) -> str:
    """A table as text, a line a row."""

    def lines(items: Iterable[str]) -> str:
        return ",\n".join(items)

    parts = [f'{{"gpus": {json.dumps(record["gpus"])}']
    if "multiprocessors" in record:
        parts[0] += f', "multiprocessors": {json.dumps(record["multiprocessors"])}'
    if record.get("library"):
        kept = (f"{json.dumps(n)}: {json.dumps(shapes)}" for n, shapes in record["library"].items())
        parts.append(f'"library": {{\n{lines(kept)}\n}}')
    for name in ("rows", "cublaslt"):
        if name in record:
            rows = record[name]
            text = f"\n{lines(json.dumps(row) for row in rows)}\n" if rows else ""
            parts.append(f'"{name}": [{text}]')
    return ",\n".join(parts) + "}\n"


def write(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file at once: who reads it meanwhile has the old or the new one."""
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text_of(record))
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process or thread is in here for the folder. What locks is the folder: a
    file's place is taken by others, and a lock file would stay behind."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # gives the lock back


def update(
    path: Path, gpu: str, new: Iterable[ProductRow], measured: Iterable[Product]
) -> list[ProductRow]:
    """Merges rows into a table, or a new one; all product rows that are there then. Processes that
    share the file, such as the ranks of a training, take turns."""
    with _alone_in(path.parent):
        if path.exists():
            record = read_record(path)
            if gpu not in record["gpus"]:
                of = ", ".join(record["gpus"])
                raise ValueError(f"{path}: its rows are of {of}, not of {gpu}")
        else:
            record = {"gpus": [gpu]}
        old = rows_from(record.get("cublaslt", []), str(path))
        rows = merged(old, new, measured)
        write(path, {**record, "cublaslt": [row.to_json() for row in rows]})
        return rows
