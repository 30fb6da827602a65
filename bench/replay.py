"""What a replay of a captured step costs the host besides its kernels.

python bench/replay.py [--device cuda] [--save]

Two steps with AdamW: a tiny one, and one with the modules and the 148 parameters of GPT-2 at tiny
widths. "kernels" is the program alone and "whole call" a replay. The host's part is measured with a
program that is empty, so that it is not the small difference of two large numbers: the call then
matches its arguments, checks the guards, stages, reads learning rates, looks after gradients and
makes its result, and no kernel runs.

On a GPU the kernels run beside the host, so it is the time until the call returns, of single calls:
"idle" when the device has nothing to do, "busy" when it still has work before the call. Two steps
of bench/workloads at full size are measured too. "graph" is the program alone: the control block's
upload and the graph's launch. Rounds are taken on cores that nobody else keeps busy (quiet_core.py); how
many had to be taken elsewhere is printed and saved.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from quiet_core import QuietCore
from side_by_side import report
from train_process import build
from workloads import WORKLOADS

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor import _C
from vibetensor.graphs import capture

# Microseconds, for the host's part of any step.
GOALS = {
    "guard": 2.0,
    "without staging": 8.0,
    "with staging": 25.0,
    "with staging of arrays": 25.0,
    "Graph.replay without kernels": 8.0,
}


class Block(vt.nn.Module):
    """GPT-2's block: 12 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = vt.nn.LayerNorm(width)
        self.qkv = vt.nn.Linear(width, 3 * width)
        self.out = vt.nn.Linear(width, width)
        self.ln_2 = vt.nn.LayerNorm(width)
        self.fc = vt.nn.Linear(width, 4 * width)
        self.proj = vt.nn.Linear(4 * width, width)
        self.drop = vt.nn.Dropout(0.1)

    def forward(self, x: Any) -> Any:
        b, t, d = x.shape
        parts = self.qkv(self.ln_1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.proj(F.gelu(self.fc(self.ln_2(x)))))


class Gpt(vt.nn.Module):
    """GPT-2's tree of modules: 12 blocks and 148 parameters with a tied head."""

    def __init__(self, width: int = 8, heads: int = 2, vocabulary: int = 16, length: int = 4):
        super().__init__()
        self.wte = vt.nn.Embedding(vocabulary, width)
        self.wpe = vt.nn.Embedding(length, width)
        self.blocks = vt.nn.ModuleList([Block(width, heads) for _ in range(12)])
        self.ln_f = vt.nn.LayerNorm(width)
        self.places = vt.arange(length)

    def forward(self, x: Any) -> Any:
        x = self.wte(x) + self.wpe(self.places)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def tiny() -> tuple[Callable[..., Any], list[Any]]:
    """A linear layer; two inputs."""
    vt.manual_seed(0)
    model = vt.nn.Linear(4, 4)
    optimizer = vt.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step, [vt.randn(2, 4), vt.randn(2, 4)]


def gpt() -> tuple[Callable[..., Any], list[Any]]:
    """148 parameters in two groups, as they are trained; tokens and targets."""
    vt.manual_seed(0)
    model = Gpt()
    assert len(list(model.parameters())) == 148
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = vt.optim.AdamW(groups, lr=1e-3)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))
        loss.backward()
        vt.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step, [vt.randint(0, 16, (1, 4)), vt.randint(0, 16, (1, 4))]


def microseconds(
    function: Callable[[], Any], calls: int, rounds: int = 15, core: QuietCore | None = None
) -> float:
    """The median of several rounds, a call."""

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    function()
    times = [core.measure(one_round) if core else one_round() for _ in range(rounds)]
    return statistics.median(times) * 1e6


def without_kernels(step: Any, staging: bool) -> None:
    """Takes the program out of a captured step, and if asked the inputs."""
    for variant in step.variants:
        variant.lowered.program = _C.graphs.Program()
        if not staging:
            variant.inputs = [None for _ in variant.inputs]
        variant.__post_init__()
    step._forget_replays()


def measure(make: Callable[[], tuple[Callable[..., Any], list[Any]]]) -> dict[str, float]:
    """The parts of one step's replay, in microseconds."""
    function, tensors = make()
    arrays = [np.array(t) for t in tensors]
    step = capture(function)
    for _ in range(4):
        step(*tensors)
        step(*arrays)
    variant, _ = step.variants  # of tensors, of arrays
    found: dict[str, float] = {}
    found["kernels"] = microseconds(variant.lowered.program.run, 200)
    found["whole call"] = microseconds(lambda: step(*tensors), 200)
    without_kernels(step, staging=True)
    found["guard"] = microseconds(variant.native.holds, 5000)
    note_change, holds = _C._note_change, variant.native.holds
    found["guard after a change"] = microseconds(lambda: (note_change(), holds()), 1000)
    found["with staging"] = microseconds(lambda: step(*tensors), 5000)
    found["with staging of arrays"] = microseconds(lambda: step(*arrays), 5000)
    without_kernels(step, staging=False)
    found["without staging"] = microseconds(lambda: step(*tensors), 5000)
    step._replays.clear()
    found["in Python, without staging"] = microseconds(lambda: in_python(step, tensors), 200)
    return found | measure_graph(make)


def measure_graph(make: Callable[[], tuple[Callable[..., Any], list[Any]]]) -> dict[str, float]:
    """The same of a Graph in torch's manner."""
    function, tensors = make()
    for _ in range(2):
        function(*tensors)
    g = vt.Graph()
    with vt.graph(g):
        function(*tensors)
    found = {"Graph.replay": microseconds(g.replay, 200)}
    captured = g._captured
    assert captured is not None
    captured.lowered.program = _C.graphs.Program()
    captured.__post_init__()
    found["Graph.replay without kernels"] = microseconds(g.replay, 5000)
    return found


def in_python(step: Any, tensors: list[Any]) -> Any:
    """The same by the long way, which takes over where something is out of the ordinary."""
    step._replays.clear()
    return step(*tensors)


def workload(name: str) -> tuple[Callable[..., Any], list[Any]]:
    """A step of bench/workloads at full size, in the dtype that results are published for."""
    known = WORKLOADS[name]
    options = {
        "workload": name, "scale": "full", "device": "cuda", "dtype": known.dtype, "mode": "eager"
    }  # fmt: skip
    step, _ = build(options, vt)
    arrays = known.batch(known.config("full"), np.random.default_rng(0))
    return step, [vt.from_numpy(a).cuda() for a in arrays]


def host_microseconds(
    function: Callable[[], Any], busy: bool, core: QuietCore, seconds: float = 0.5
) -> float:
    """The median time until a call returns, the device idle or at work."""
    vt.cuda.synchronize()
    start = time.perf_counter()
    function()
    vt.cuda.synchronize()
    rounds = max(5, min(40, int(seconds / 2 / (time.perf_counter() - start))))
    a = vt.ones(4096, 4096)

    def one_round() -> float:
        vt.cuda.synchronize()
        if busy:
            for _ in range(4):
                a @ a  # some milliseconds each
        function()  # what the host has not touched for a while
        if not busy:
            vt.cuda.synchronize()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    times = [core.measure(one_round) for _ in range(rounds)]
    vt.cuda.synchronize()
    return statistics.median(times) * 1e6


def measure_on_gpu(
    make: Callable[[], tuple[Callable[..., Any], list[Any]]], core: QuietCore
) -> dict[str, float]:
    """The same on a GPU, by what the device has to do."""
    function, tensors = make()
    step = capture(function)
    for _ in range(4):
        step(*tensors)
    (variant,) = step.variants
    found: dict[str, float] = {}
    note_change, holds = _C._note_change, variant.native.holds
    found["guard"] = microseconds(variant.native.holds, 5000, core=core)
    found["guard after a change"] = microseconds(lambda: (note_change(), holds()), 1000, core=core)
    states = (("idle", False), ("busy", True))
    for state, busy in states:
        found[f"graph, {state}"] = host_microseconds(variant.lowered.program.run, busy, core)
        found[f"with staging, {state}"] = host_microseconds(lambda: step(*tensors), busy, core)
    variant.inputs = [None for _ in variant.inputs]
    variant.__post_init__()
    step._forget_replays()
    for _ in range(3):
        step(*tensors)
    for state, busy in states:
        found[f"without staging, {state}"] = host_microseconds(lambda: step(*tensors), busy, core)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", action="store_true", help="write bench/results/replay*.json")
    options = parser.parse_args()
    vt.set_num_threads(1)
    on_gpu = options.device == "cuda"
    cases: list[tuple[str, Callable[[], Any]]] = [("tiny", tiny), ("148 parameters", gpt)]
    if on_gpu:
        vt.set_default_device("cuda")
        cases += [(name, functools.partial(workload, name)) for name in ("minigpt", "gpt2")]
    rows = []
    core = None
    if on_gpu:
        vt.zeros(1).item()  # starts the driver's threads
        core = QuietCore()
    for name, make in cases:
        for case, value in (measure_on_gpu(make, core) if core else measure(make)).items():
            row = {"case": f"{name}: {case}", "vibetensor": value, "unit": "us"}
            goal = GOALS.get(case.partition(",")[0])
            rows.append({**row, "limit": goal} if goal else row)
    name = "replay_cuda" if on_gpu else "replay"
    return 0 if report(name, rows, 1, options.save, core) else 1


if __name__ == "__main__":
    raise SystemExit(main())
