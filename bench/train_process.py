"""One workload in one library and one mode: started by train.py, one process each.

Prints a JSON object as its last line: losses and gradient norms of the first steps, step times, time
to the first steady step, peak memory, and for a capture its ops and its arena; on a GPU also the nodes
of its graph, with and without the passes, and that timed steps neither waited nor asked the driver for
memory.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from workloads import WORKLOADS, load_initial_weights

WARM_UP = 3  # eager steps before torch records a graph


def make_step(t: Any, call: Any, model: Any, optimizer: Any, device: str, dtype: str) -> Any:
    """A whole training step. call: the model, or its compiled form."""
    parameters = list(model.parameters())

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        if dtype == "bfloat16":
            with t.autocast(device_type=device, dtype=t.bfloat16):
                loss = call(x, y)
        else:
            loss = call(x, y)
        loss.backward()
        norm = t.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss, norm

    return step


class GraphedStep:
    """The step in a torch.cuda.CUDAGraph, as torch's documentation has it: a few eager steps on a side
    stream, then one recording; inputs are copied into static tensors. Every call trains."""

    def __init__(self, t: Any, step: Callable[..., Any]) -> None:
        self.t, self.step = t, step
        self.graph: Any = None
        self.eager_steps = 0
        self.side = t.cuda.Stream()

    def __call__(self, *inputs: Any) -> Any:
        cuda = self.t.cuda
        if self.eager_steps < WARM_UP:
            self.eager_steps += 1
            self.side.wait_stream(cuda.current_stream())
            with cuda.stream(self.side):
                results = self.step(*inputs)
            cuda.current_stream().wait_stream(self.side)
            return results
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = cuda.CUDAGraph()
            with cuda.graph(self.graph):
                self.results = self.step(*self.inputs)
        for place, x in zip(self.inputs, inputs):
            place.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.results


def build(options: dict[str, Any], t: Any) -> tuple[Any, Callable[[], bool]]:
    """The step in the mode asked for, and whether it has reached its steady form."""
    workload = WORKLOADS[options["workload"]]
    device, mode = options["device"], options["mode"]
    model = workload.make(t, workload.config(options["scale"])).to(device)
    load_initial_weights(t, model)
    settings = {"fused": True}
    if "graph" in mode and workload.optimizer == "AdamW":
        settings["capturable"] = True
    optimizer = workload.make_optimizer(t, model.parameters(), **settings)
    call = t.compile(model) if mode.startswith("compile") else model
    step = make_step(t, call, model, optimizer, device, options["dtype"])
    if "graph" in mode:
        graphed = GraphedStep(t, step)
        return graphed, lambda: graphed.graph is not None
    if mode == "capture":
        captured = importlib.import_module("vibetensor.graphs").capture(step)
        return captured, lambda: any(v.replays for v in captured.variants)
    return step, lambda: True


class Clock:
    """Times of single steps: on a GPU between events in the stream, so that the host may run ahead."""

    def __init__(self, t: Any, device: str) -> None:
        self.cuda = t.cuda if device == "cuda" else None
        self.marks: list[Any] = []

    def mark(self) -> None:
        """The end of one step and the start of the next."""
        if self.cuda is None:
            self.marks.append(time.perf_counter())
            return
        event = self.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def times(self) -> list[float]:
        """Milliseconds of each step."""
        if self.cuda is None:
            return [(b - a) * 1e3 for a, b in zip(self.marks, self.marks[1:])]
        self.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]


def resident() -> int:
    """The most memory the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes(t: Any, device: str, data: list[Any], start: int) -> int:
    """The most memory since the last call, without the prepared data: what tensors took on a GPU; on
    a CPU what the process grew by since `start`."""
    kept = sum(a.numel() * a.element_size() for pair in data for a in pair)
    if device != "cuda":
        return resident() - start - kept
    peak = t.cuda.max_memory_allocated()
    t.cuda.reset_peak_memory_stats()
    return peak - kept


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Trains and measures."""
    ours = options["library"] == "vibetensor"
    t = importlib.import_module("vibetensor.torch" if ours else "torch")
    t.set_num_threads(options["threads"])
    device, workload = options["device"], WORKLOADS[options["workload"]]
    config = workload.config(options["scale"])
    start_bytes = resident()
    step, steady = build(options, t)
    rng = np.random.default_rng(1)

    def batches(count: int) -> list[Any]:
        """Random data, different in every step, on the device before the clock runs."""
        arrays = [workload.batch(config, rng) for _ in range(count)]
        return [tuple(t.from_numpy(a).to(device) for a in pair) for pair in arrays]

    for x, _ in batches(1):  # what libraries do once: contexts, handles
        (x.float() @ x.float().transpose(-1, -2)).sum().item()
    losses: list[tuple[float, float]] = []
    first_seconds = 0.0
    ready = False
    data = batches(options["check"])
    for x, y in data:
        start = time.perf_counter()
        loss, norm = step(x, y)
        losses.append((loss.item(), norm.item()))
        if not ready:
            first_seconds += time.perf_counter() - start
            ready = steady()
    if not ready:
        raise RuntimeError(f"no steady step in {options['check']} steps: is --check too small?")
    peaks = [peak_bytes(t, device, data, start_bytes)]
    data = batches(options["steps"] + 1)
    clock = Clock(t, device)
    counts = driver_counts(t) if ours and device == "cuda" else {}
    for index, (x, y) in enumerate(data):
        if index:  # the first one fills the queue
            clock.mark()
        loss, norm = step(x, y)
    clock.mark()
    if counts:
        counts = {key: now - counts[key] for key, now in driver_counts(t).items()}
    times = clock.times()
    losses.append((loss.item(), norm.item()))
    peaks.append(peak_bytes(t, device, data, start_bytes))
    result = {
        "times": times,
        "ms": statistics.median(times),
        "first_s": first_seconds,
        "losses": losses,
        "peak_bytes": max(peaks),
    }
    if options["mode"] == "capture":
        if any(counts.values()):
            raise RuntimeError(f"replays waited or asked the driver for memory: {counts}")
        result["capture"] = describe(step)
    return result


def driver_counts(t: Any) -> dict[str, int]:
    """How often vibetensor has waited for the device unasked, and asked the driver for memory."""
    stats = t.cuda.memory_stats()
    native = importlib.import_module("vibetensor._cuda")
    return {
        "waits": native.implicit_syncs(),
        "allocations": stats["num_device_alloc"],
        "frees": stats["num_device_free"],
    }


def describe(step: Any) -> dict[str, Any]:
    """What the capture is: ops recorded and run, bytes of its arena and the least possible, and the
    nodes of its graph."""
    variant = max(step.variants, key=lambda v: v.replays)
    plans = variant.lowered.plans.values()
    found: dict[str, Any] = {
        "recorded": sum(not op.is_view for op in variant.recording.tape.ops),
        "ops": sum(not op.is_view for op in variant.tape.ops),
        "arena_bytes": sum(plan.nbytes for plan in plans),
        "lower_bound": sum(plan.lower_bound for plan in plans),
    }
    if variant.lowered.device is not None:
        found["nodes"] = variant.lowered.program.node_kinds()
        step.reset()
        found["nodes_recorded"] = nodes_as_recorded(variant)
    return found


def nodes_as_recorded(variant: Any) -> dict[str, int] | None:
    """The nodes of the graph without the passes, which are what eager launches; None if there is no
    memory for it. The variant cannot be replayed afterwards."""
    lower = importlib.import_module("vibetensor.graphs.lower").lower
    t = importlib.import_module("vibetensor.torch")
    variant.native = variant.lowered = None  # and with them the arena
    t.cuda.synchronize()
    try:
        recording = variant.recording
        return lower(recording.tape, recording, {}).program.node_kinds()
    except t.cuda.OutOfMemoryError:
        return None


if __name__ == "__main__":
    answer = run(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os.write(1, ("\n" + json.dumps(answer) + "\n").encode())
