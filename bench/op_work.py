"""Bytes and flops of a tape's op: what any kernel for it must move and compute.

Bytes: every tensor it reads, once, and every one it writes, once; what is broadcast counts as it lies
in memory. Flops: those of matrix products, attention and convolutions; the arithmetic of all others
hides behind their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vibetensor.graphs.tape import Op, View


@dataclass(frozen=True)
class Work:
    """read, written: bytes. flops by kind: "" for none, else "float16" (with bfloat16), "float32",
    "float64", "int8": what the products' operands are."""

    read: int
    written: int
    flops: int
    kind: str

    @property
    def bytes(self) -> int:
        return self.read + self.written


def view_bytes(view: View) -> int:
    """Bytes of the elements a view has in memory: a broadcast dimension is one element."""
    return view.dtype.itemsize * math.prod(
        1 if stride == 0 and size else size for size, stride in zip(view.sizes, view.strides)
    )


def work_of(op: Op) -> Work:
    """What an op that runs must do."""
    written = _total(op.writes())
    moved = _SPECIAL_BYTES.get(op.name)
    read, written = moved(op, written) if moved else (_total(_reads(op)), written)
    count = _FLOPS.get(op.name)
    flops = count(op) if count else 0
    return Work(read, written, flops, _kind(op) if flops else "")


def _total(views: Iterator[View]) -> int:
    """Of distinct views: a tensor that an op names twice is read once."""
    return sum(view_bytes(view) for view in {_place(v): v for v in views}.values())


def _place(view: View) -> tuple[Any, ...]:
    return (view.buffer, view.dtype, view.offset, view.sizes, view.strides)


def _views(arg: Any) -> Iterator[View]:
    if isinstance(arg, View):
        yield arg
    elif isinstance(arg, list | tuple):
        for item in arg:
            yield from _views(item)


# Arguments that are overwritten without a look at what they hold.
_OVERWRITTEN = {
    "copy_": (0,), "fill_": (0,), "zero_": (0,), "_convert_all_": (0,), "_fused_pointwise": (0,),
    "normal_": (0,), "uniform_": (0,), "bernoulli_": (0,), "random_": (0,),
}  # fmt: skip


def _reads(op: Op) -> Iterator[View]:
    over = _OVERWRITTEN.get(op.name, ())
    # Gradients are written from their sources, where there are any.
    if op.name in ("_scaled_adam_", "_scaled_sgd_") and _sources(op):
        over = (1,)
    for at, arg in enumerate(op.args):
        if at not in over:
            yield from _views(arg)


def _sources(op: Op) -> Any:
    return op.args[6 if op.name == "_scaled_adam_" else 3]


def _gathered(table: int, *others: int) -> Callable[[Op, int], tuple[int, int]]:
    """An op that reads as many bytes of a table as it writes, but no more than all of it."""

    def moved(op: Op, written: int) -> tuple[int, int]:
        rest = sum(_total(_views(op.args[at])) for at in others)
        return rest + min(view_bytes(op.args[table]), written), written

    return moved


def _scattered(op: Op, written: int) -> tuple[int, int]:
    """index_add_ and its like: rows are read and written where the index points."""
    index, source = op.args[2], op.args[3]
    if not isinstance(source, View):
        return _total(_reads(op)), written
    rows = min(written, view_bytes(source))
    return view_bytes(index) + view_bytes(source) + rows, rows


_SPECIAL_BYTES = {
    "embedding": _gathered(0, 1),
    "index_select": _gathered(0, 2),
    "gather": _gathered(0, 2),
    "index_add_": _scattered,
}


def _kind(op: Op) -> str:
    dtype = str(next(op.reads()).dtype).rsplit(".", 1)[-1]
    return "float16" if dtype == "bfloat16" else dtype


def _product(left: int, right: int) -> Callable[[Op], int]:
    """Of (..., m, k) and (..., k, n) at these places."""

    def flops(op: Op) -> int:
        a, b = op.args[left].sizes, op.args[right].sizes
        return 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)

    return flops


def _linear(op: Op) -> int:
    x, weight = op.args[0].sizes, op.args[1].sizes
    return 2 * math.prod(x) * (weight[0] if len(weight) > 1 else 1)


def attended(queries: int, keys: int, causal: bool) -> int:
    """How many pairs of a query and a key attention looks at."""
    if not causal:
        return queries * keys
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + (queries - seen) * keys


def _attention(query: int, causal: int, products: int) -> Callable[[Op], int]:
    """Products of pairs times the head's size; the values' size counts as the keys'."""

    def flops(op: Op) -> int:
        *batch, queries, size = op.args[query].sizes
        keys = op.args[query + 1].sizes[-2]
        pairs = attended(queries, keys, bool(op.args[causal]))
        return 2 * products * math.prod(batch) * pairs * size

    return flops


def _convolution(op: Op, result: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """weight: (out, in / groups, *kernel)."""
    return 2 * math.prod(result) * math.prod(weight[1:])


_FLOPS: dict[str, Callable[[Op], int]] = {
    "mm": _product(0, 1), "bmm": _product(0, 1), "_int_mm": _product(0, 1), "mv": _product(0, 1),
    "addmm": _product(1, 2), "_addmm_activation": _product(1, 2), "baddbmm": _product(1, 2),
    "addmv": _product(1, 2), "linear": _linear, "_linear_activation": _linear,
    "_mm_row_sums": _product(0, 1), "_mm_activation_backward": _product(0, 1),
    "_attention": _attention(0, 5, 2), "_attention_backward": _attention(1, 9, 5),
    "_attention_backward_sums": _attention(1, 9, 5),
    "_convolution": lambda op: _convolution(op, op.outputs[0].sizes, op.args[1].sizes),
    "_convolution_input_grad": lambda op: _convolution(op, op.args[0].sizes, op.args[1].sizes),
    "_convolution_weight_grad": lambda op: _convolution(op, op.args[0].sizes, op.args[2]),
}  # fmt: skip
