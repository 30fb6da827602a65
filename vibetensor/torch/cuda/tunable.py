"""torch.cuda.tunable, offline: which of cuBLASLt's algorithms matrix products get.

By default a product gets the library's first answer, or where a row of the tables that ship with
vibetensor names another one for this GPU and product, that. Nothing is timed while a program runs.
For products that no table has::

    train_a_few_steps()
    torch.cuda.tunable.tune()                      # times every product that the process has had
    torch.cuda.tunable.write_file("products.json")

    torch.cuda.tunable.read_file("products.json")  # in later processes, before the first step

What a product gets depends on the GPU's model, the rows and the library's version alone, so runs can be
repeated bit for bit as long as these stay.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vibetensor.torch.cuda import _backend

#: A row is written where an algorithm takes less than the first answer by this fraction, by these
#: microseconds, and in this share of the rounds that compare the two.
LEAST_GAIN, LEAST_MICROSECONDS, LEAST_ROUNDS = 0.03, 0.3, 0.8
#: Rounds over all answers, over the best of these, and over the winner and the first answer.
ROUNDS = (5, 9, 21)
FINALISTS = 4
_FLUSH_BYTES = 128 << 20  # more than any L2 cache
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "tf32": "float32",
           "f64": "float64"}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A product that was planned. strides: between rows of a, b and the result, then between the
    matrices of their batches, in elements. alignment: in bytes, of all that it reads and writes."""

    product: Any
    strides: tuple[int, ...]
    alignment: int
    device: int


@dataclass(frozen=True)
class Result:
    """What was measured of a product, in microseconds. configuration: the algorithm to name in a row,
    or None where the first answer stays. others: what else was timed, by name; beside_us: what the
    product is to get in the same rounds. problem: why nothing was measured."""

    product: Any
    device_name: str
    first_us: float = math.nan
    us: float = math.nan
    answers: int = 0
    configuration: Any = None
    version: int = 0
    others: dict[str, float] = field(default_factory=dict)
    beside_us: float = math.nan
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.product}: {self.problem}"
        best = f"{self.us:.2f} us" if self.configuration else "the first stays"
        rest = "".join(f", {name} {us:.2f} us" for name, us in self.others.items())
        return f"{self.product}: first {self.first_us:.2f} us, of {self.answers} {best}{rest}"


_results: dict[tuple[str, Any], Result] = {}


def enable(val: bool = True) -> None:
    """Whether rows are looked at, those that ship with vibetensor too. Steps that were captured before
    keep their kernels. Off from the start with VT_MEASURED_PRODUCTS=0."""
    _backend.required().enable_measured_products(bool(val))


def is_enabled() -> bool:
    """Whether rows are looked at."""
    return _backend.required().measured_products_enabled()


def seen(device: Any = None) -> list[Seen]:
    """The products that cuBLASLt computed for this process on a device, largest first. Those that have
    kernels of our own are not among them."""
    from vibetensor.cute_kernels.product_table import Product

    index = _backend.device_index(device)
    found = [
        Seen(Product.of_native(product), tuple(strides), alignment, on)
        for product, strides, alignment, on in _backend.required().seen_products()
        if on == index
    ]

    def order(s: Seen) -> tuple[Any, ...]:
        p = s.product
        return -p.batch * p.m * p.n * p.k, p, -s.alignment, s.strides

    return sorted(found, key=order)


def tune(
    products: Iterable[Seen] | None = None,
    *,
    device: Any = None,
    report: Callable[[str], object] | None = None,
    others: Callable[[Seen, dict[str, Any]], dict[str, Callable[[], object]]] | None = None,
) -> list[Result]:
    """Times the library's answers for products, by default all that the process has had on the device.

    Each is timed on random operands with the L2 cache emptied before, answers in turns. The best of
    several rounds is compared with the first answer anew: it wins where it takes 3% and 0.3 us less,
    and less in 80% of these rounds. What products get in this process does not change: `write_file` and
    `read_file` do that.

    products: from `seen`; of several with one shape the first is measured. report: called with a line
    for each. others: further launches of a product to time beside, given its tensors.

    Raises RuntimeError without a device, or while the stream is captured.
    """
    import vibetensor.torch as torch
    from vibetensor.cute_kernels.product_table import Configuration

    index = _backend.device_index(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("cuda.tunable.tune: products cannot be timed while they are captured")
    chosen: dict[Any, Seen] = {}
    for s in seen(index) if products is None else products:
        if s.device != index:
            raise ValueError(f"cuda.tunable.tune: {s.product} is of device {s.device}, not {index}")
        chosen.setdefault(s.product, s)
    native, name = _backend.required(), torch.cuda.get_device_name(index)
    made = []
    with torch.cuda.device(index), torch.no_grad():
        flush = _flush(index)
        for s in chosen.values():
            try:
                tensors, trial = _trial(s)
                configurations = [Configuration(*c) for c in trial.configurations]
                every = [lambda i=i, t=trial: t.run(i) for i in range(len(configurations))]
                runs = [i for i in range(len(every)) if i == 0 or _runs(every[i])]
                launches = [every[i] for i in runs]
                configurations = [configurations[i] for i in runs]
                beside = others(s, tensors) if others else {}
                result = Result(s.product, name, version=native.cublaslt_version(),
                                **_compared(launches, configurations, beside, flush))  # fmt: skip
            except RuntimeError as error:
                memory = isinstance(error, torch.cuda.OutOfMemoryError)
                if not memory and not str(error).startswith("cuBLASLt"):
                    raise
                result = Result(s.product, name, problem=str(error).partition("\n")[0])
            tensors = trial = every = launches = beside = None
            _results[name, s.product] = result
            made.append(result)
            if report:
                report(str(result))
    return made


def get_results() -> tuple[Result, ...]:
    """What this process has measured, the latest of each product."""
    return tuple(_results.values())


def write_file(filename: str, device: Any = None) -> bool:
    """Merges what this process has measured on GPUs of the device's model into a file, which is made
    where there is none: rows of products that were measured again are replaced (or removed, where the
    first answer stays), others are kept. Processes may share the file.

    Raises ValueError where the file is no table, or of other GPUs.
    """
    import vibetensor.torch as torch
    from vibetensor.cute_kernels import product_table

    gpu = torch.cuda.get_device_name(_backend.device_index(device))
    measured = [r for r in _results.values() if r.device_name == gpu and not r.problem]
    product_table.update(Path(filename), gpu, rows_of(measured), [r.product for r in measured])
    return True


def read_file(filename: str, device: Any = None) -> bool:
    """Takes the rows of a file for GPUs of the device's model: for products from now on, before those
    that ship with vibetensor and those of files read earlier. A row that the library does not offer
    for a product (another version, operands that are less aligned) has no effect; VT_KERNEL_LOG=1
    tells. Read files before the first step: captured steps keep their kernels, so that an eager step
    may then differ from them in the last bits.

    Raises ValueError, naming file and row, where the file is wrong or of other GPUs: no row is taken
    then.
    """
    import vibetensor.torch as torch
    from vibetensor.cute_kernels import product_table

    gpu = torch.cuda.get_device_name(_backend.device_index(device))
    rows = product_table.read_rows(Path(filename), gpu)
    given = [(row.product.native, row.algorithm.native) for row in rows]
    _backend.required().add_measured_products(gpu, given)
    return True


def rows_of(results: Iterable[Result]) -> list[Any]:
    """The rows of tables that results ask for."""
    from vibetensor.cute_kernels.product_table import ProductRow

    return [
        ProductRow(r.product, r.configuration, r.us, r.first_us, r.version)
        for r in results
        if r.configuration is not None
    ]


def _flush(index: int) -> Any:
    """A tensor that empties the L2 cache when it is written."""
    import vibetensor.torch as torch

    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=f"cuda:{index}")


def _trial(s: Seen) -> tuple[dict[str, Any], Any]:
    """The tensors of a product, flat, and what runs its answers."""
    import vibetensor.torch as torch

    p = s.product
    lda, ldb, ldc, step_a, step_b, step_c = s.strides
    dtype = getattr(torch, _DTYPES[p.dtype])
    device = f"cuda:{s.device}"
    size = torch.finfo(dtype).bits // 8
    # Operands that are less aligned than memory is begin that much later.
    late = 0 if s.alignment >= 256 else s.alignment // size

    def flat(rows: int, columns: int, ld: int, step: int) -> Any:
        numel = (p.batch - 1) * step + (rows - 1) * ld + columns
        return torch.randn(late + numel, device=device, dtype=dtype)[late:]

    a = (p.k, p.m) if p.layout[1] == "t" else (p.m, p.k)
    b = (p.n, p.k) if p.layout[0] == "t" else (p.k, p.n)
    tensors = {"a": flat(*a, lda, step_a), "b": flat(*b, ldb, step_b)}
    tensors["c"] = flat(p.m, p.n, ldc, step_c)
    if p.bias:
        tensors["bias"] = flat(1, p.n, p.n, 0)
    if p.epilogue.startswith("gelu_tanh"):
        tensors["aux"] = flat(p.m, p.n, ldc, step_c)
    places = [tensors[t].data_ptr() if t in tensors else 0 for t in ("a", "b", "c", "bias", "aux")]
    trial = _backend.required().ProductTrial(p.native, list(s.strides), places, s.device)
    return tensors, trial


def _runs(launch: Callable[[], object]) -> bool:
    """Whether the library does what it has offered."""
    try:
        launch()
    except RuntimeError as error:
        if not str(error).startswith("cuBLASLt"):
            raise
        return False
    return True


def _compared(
    launches: Sequence[Callable[[], object]],
    configurations: Sequence[Any],
    others: dict[str, Callable[[], object]],
    flush: Any,
) -> dict[str, Any]:
    """The fields of a result: of all launches the best few, of these the best, and that one beside the
    first."""
    everything = [*launches, *others.values()]
    own = range(len(launches))
    times = _rounds(everything, range(len(everything)), ROUNDS[0], flush)
    best = sorted(own, key=lambda i: statistics.median(times[i]))[:FINALISTS]
    beside = [len(launches) + i for i in range(len(others))]
    times = _rounds(everything, [*dict.fromkeys([0, *best]), *beside], ROUNDS[1], flush)
    winner = min((i for i in times if i < len(launches)), key=lambda i: statistics.median(times[i]))
    timed = {name: statistics.median(times[i]) for name, i in zip(others, beside)}
    found: dict[str, Any] = {"answers": len(launches), "others": timed}
    first_us = us = found["beside_us"] = statistics.median(times[0])
    if winner != 0:
        final = _rounds(everything, [0, winner], ROUNDS[2], flush)
        first_us, us = (statistics.median(final[i]) for i in (0, winner))
        if wins(final[0], final[winner]):
            found["configuration"] = configurations[winner]
            found["beside_us"] = statistics.median(times[winner])
    return {**found, "first_us": first_us, "us": min(us, first_us)}


def wins(first: Sequence[float], other: Sequence[float]) -> bool:
    """Whether times of an algorithm are below those of the first answer by more than noise; both in
    microseconds, round by round."""
    was, now = statistics.median(first), statistics.median(other)
    faster = sum(b < a for a, b in zip(first, other))
    least = max(LEAST_GAIN * was, LEAST_MICROSECONDS)
    return was - now >= least and faster >= LEAST_ROUNDS * len(first)


def _rounds(
    launches: Sequence[Callable[[], object]], which: Iterable[int], rounds: int, flush: Any
) -> dict[int, list[float]]:
    """Microseconds on the device of some of the launches, in turns, each after the L2 cache was
    emptied. The order changes from round to round, so that none always follows the same other."""
    import vibetensor.torch as torch

    which = list(which)
    times: dict[int, list[float]] = {i: [] for i in which}
    for i in which:  # what is loaded or allocated at a first launch
        launches[i]()
    marks = {i: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for i in which}
    for turn in range(rounds):
        # The device starts behind the host and stays so: emptying the cache takes longer than
        # issuing what follows.
        for _ in range(4):
            flush.zero_()
        at = turn // 2 % len(which)
        order = which[at:] + which[:at]
        for i in order if turn % 2 == 0 else reversed(order):
            flush.zero_()
            marks[i][0].record()
            launches[i]()
            marks[i][1].record()
        torch.cuda.synchronize()
        for i in which:
            times[i].append(marks[i][0].elapsed_time(marks[i][1]) * 1000)
    return times
