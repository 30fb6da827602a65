"""What a captured step launches, and what passes are worth: on a GPU.

python bench/launches.py [--workload gpt2] [--scale full] [--without weight_gradients --without late_sums]
python bench/launches.py --products

For each workload the nodes of the step's graph (kernels: fills have become some), by op, with those of the
recorded ops, its time and its memory; then the same with each of the passes named by --without left out,
and with all of them. --products: the products for weights' gradients of several layers, one by one and in
batches of 2, 3, ..., as `weight_gradients` has them.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from train_process import Clock, make_step, nodes_as_recorded
from workloads import SCALES, WORKLOADS

import vibetensor.torch as vt
from vibetensor.graphs import capture, passes

# (rows, results, inputs of the layer, layers) by workload.
PRODUCTS = {
    "minigpt": (16384, [(1152, 384), (384, 384), (1536, 384), (384, 1536)], 6),
    "vit": (33280, [(1152, 384), (384, 384), (1536, 384), (384, 1536)], 6),
    "gpt2": (32768, [(2304, 768), (768, 768), (3072, 768), (768, 3072)], 12),
}


@contextmanager
def left_out(names: list[str]) -> Iterator[None]:
    """Without these passes."""
    every = passes.ALL
    passes.ALL = tuple(one for one in every if name_of(one) not in names)
    try:
        yield
    finally:
        passes.ALL = every


def name_of(one: Any) -> str:
    """How `--without` calls a pass."""
    return str(one.__name__.rpartition(".")[2])


def measured(name: str, scale: str, dtype: str | None, steps: int, recorded: bool) -> None:
    """Captures the workload's step, times it and tells what it launches."""
    workload = WORKLOADS[name]
    config = workload.config(scale)
    vt.manual_seed(0)
    model = workload.make(vt, config).to("cuda")
    optimizer = workload.make_optimizer(vt, model.parameters(), fused=True)
    step = capture(make_step(vt, model, model, optimizer, "cuda", dtype or workload.dtype))
    x, y = (vt.from_numpy(a).to("cuda") for a in workload.batch(config, np.random.default_rng(0)))
    for _ in range(4):
        loss, norm = step(x, y)
    vt.cuda.reset_peak_memory_stats()
    clock = Clock(vt, "cuda")
    for _ in range(steps):
        step(x, y)
        clock.mark()
    times = clock.times()
    variant = max(step.variants, key=lambda v: v.replays)
    program = variant.lowered.program
    kinds = program.node_kinds()
    names = [op.name for op in variant.tape.ops if not op.is_view]
    by_op: Counter[str] = Counter()
    for op, count in zip(names, program.nodes()):
        by_op[op] += count
    plans = variant.lowered.plans.values()
    arena = sum(plan.nbytes for plan in plans) / 2**30
    peak = vt.cuda.max_memory_allocated() / 2**30
    text = f"{sum(kinds.values())} nodes {kinds}, {statistics.median(times):.3f} ms"
    text += f" (least {min(times):.3f}), arena {arena:.3f} GiB, peak {peak:.3f} GiB"
    text += f"; loss {loss.item():.5f}, norm {norm.item():.5f}"
    print(f"  {text}\n    " + ", ".join(f"{op} {n}" for op, n in by_op.most_common()))
    if recorded:
        step.reset()
        print(f"  recorded: {nodes_as_recorded(variant)}")


def products(name: str) -> None:
    """Times of the products for weights' gradients, with memory as cold as in a step."""
    rows, shapes, layers = PRODUCTS[name]
    flush = vt.empty(64 << 20, device="cuda")
    for m, n in shapes:
        left = vt.randn(layers, rows, m, device="cuda").bfloat16().transpose(1, 2)
        right = vt.randn(layers, rows, n, device="cuda").bfloat16()
        out = vt.empty(layers, m, n, device="cuda", dtype=vt.bfloat16)
        parts = [f"{name} {m} x {rows} x {n}:"]
        for size in [1, *(d for d in range(2, layers + 1) if layers % d == 0)]:
            run = partial(in_batches, left, right, out, size)
            ms = timed(run, flush)
            rate = 2 * m * n * rows * layers / ms / 1e9
            parts.append(f"{size}: {ms * 1e3 / layers:.1f} us ({rate:.0f} TFLOP/s)")
        print("  " + "  ".join(parts))


def in_batches(left: Any, right: Any, out: Any, size: int) -> None:
    """The products of all layers, so many at a time."""
    for i in range(0, len(out), size):
        if size == 1:
            vt.mm(left[i], right[i], out=out[i])
        else:
            span = slice(i, i + size)
            vt.bmm(left[span], right[span], out=out[span])


def timed(run: Callable[[], None], flush: Any, repeats: int = 12) -> float:
    """Milliseconds of a graph of what `run` launches, after other memory was written."""
    graph = vt.cuda.CUDAGraph()
    run()
    vt.cuda.synchronize()
    with vt.cuda.graph(graph):
        run()
    found = []
    for _ in range(repeats):
        flush.zero_()
        marks = [vt.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        graph.replay()
        marks[1].record()
        vt.cuda.synchronize()
        found.append(marks[0].elapsed_time(marks[1]))
    return statistics.median(found[2:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the workload's")
    parser.add_argument("--steps", type=int, default=30)
    known = [name_of(one) for one in passes.ALL]
    parser.add_argument("--without", action="append", default=[], choices=known, metavar="PASS")
    parser.add_argument("--products", action="store_true")
    options = parser.parse_args()
    print(vt.cuda.get_device_name(0))
    for name in options.workload or list(PRODUCTS):
        if options.products:
            products(name)
            continue
        trials = [[], *([one] for one in options.without)]
        if len(options.without) > 1:
            trials.append(options.without)
        for index, names in enumerate(trials):
            print(f"{name}, without {', '.join(names) or 'none'}:")
            with left_out(names):
                measured(name, options.scale, options.dtype, options.steps, recorded=index == 0)


if __name__ == "__main__":
    main()
