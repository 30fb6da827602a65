"""The kernels that bench/kernels.py measures: shapes, our call and torch's, work and goal of each.

A case makes its inputs as tensors of vibetensor; torch gets the same memory. `ours` and each of
`peers` turn the inputs into a call that is timed; what the call returns is compared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as TF
from op_work import Work, attended
from torch.nn.attention import SDPBackend, sdpa_kernel

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as VF
from vibetensor import _C

Prepare = Callable[..., Callable[[], Any]]


@dataclass(frozen=True)
class Goal:
    """What is asked: at least `speed` times the fastest peer's, at most `us` microseconds (on an
    H200), or at least `bandwidth` of a copy's."""

    speed: float | None = None
    us: float | None = None
    bandwidth: float | None = None

    def __str__(self) -> str:
        if self.speed is not None:
            return f"≥ {self.speed:g}x torch"
        return f"≤ {self.us:g} us" if self.us is not None else f"≥ {self.bandwidth:.0%} of copy"


@dataclass(frozen=True)
class Case:
    """make: the inputs. together: whether one set of inputs is enough, as it is larger than any
    cache and the call changes it. tolerance: of results, relative to the largest element."""

    kernel: str
    shape: str
    make: Callable[[], list[Any]]
    ours: Prepare
    peers: dict[str, Prepare]
    work: Work
    goal: Goal
    tolerance: float = 2e-2
    together: bool = False
    notes: str = ""


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    """All of them, in the order of the table. tiny: the same with small shapes, for tests."""

    def size(n: int) -> int:
        return max(8, n // 512 // 8 * 8) if tiny else n

    yield from _gemms(device, size)
    yield from _attentions(device, tiny)
    yield from _norms(device, size)
    yield from _cross_entropies(device, size)
    yield from _updates(device, size)


def _random(device: str, *shape: int, dtype: Any = vt.bfloat16, scale: float = 1.0) -> Any:
    return (vt.randn(*shape, device=device) * scale).to(dtype)


def _bf16(read: int, written: int, flops: int = 0) -> Work:
    """Work from numbers of elements of two bytes."""
    return Work(2 * read, 2 * written, flops, "float16" if flops else "")


GEMMS = [  # rows, columns and terms of the forward product; the goal, speed beside torch's
    (8192, 8192, 8192, 1.05),
    (32768, 3072, 768, 1.0),
    (32768, 768, 3072, 1.0),
    (32768, 2304, 768, 1.0),
    (32768, 768, 768, 1.0),
    (32768, 50304, 768, 1.05),
    (16384, 1536, 384, 1.15),
    (16384, 384, 1536, 1.1),
]


def _gemms(device: str, size: Callable[[int], int]) -> Iterator[Case]:
    ops = _C._ops
    for rows, columns, terms, speed in GEMMS:
        m, n, k = size(rows), size(columns), size(terms)
        shape, flops = f"{m}x{n}x{k}", 2 * m * n * k

        def x_w(m: int = m, n: int = n, k: int = k) -> list[Any]:
            return [_random(device, m, k), _random(device, n, k, scale=k**-0.5)]

        def dy_w(m: int = m, n: int = n, k: int = k) -> list[Any]:
            return [_random(device, m, n), _random(device, n, k, scale=n**-0.5)]

        def dy_x(m: int = m, n: int = n, k: int = k) -> list[Any]:
            return [_random(device, m, n, scale=m**-0.5), _random(device, m, k)]

        forward = {"cuBLAS": lambda x, w: lambda: TF.linear(x, w)}
        dgrad = {"cuBLAS": lambda dy, w: lambda: dy @ w}
        wgrad = {"cuBLAS": lambda dy, x: lambda: dy.T @ x}
        goal = Goal(speed=speed)
        yield Case("GEMM forward", shape, x_w, lambda x, w: lambda: VF.linear(x, w), forward,
                   _bf16(m * k + n * k, m * n, flops), goal)  # fmt: skip
        yield Case("GEMM dgrad", shape, dy_w, lambda dy, w: lambda: dy @ w, dgrad,
                   _bf16(m * n + n * k, m * k, flops), goal)  # fmt: skip
        yield Case("GEMM wgrad", shape, dy_x, lambda dy, x: lambda: dy.T @ x, wgrad,
                   _bf16(m * n + m * k, n * k, flops), goal)  # fmt: skip
        if (rows, columns) != (32768, 3072):
            continue
        free = Goal(speed=1.0)
        alone = "torch's product alone"
        yield Case(
            "GEMM forward, bias and GELU inside", shape,
            lambda make=x_w, n=n: [*make(), _random(device, n)],
            lambda x, w, b: lambda: ops._linear_activation(x, w, b, "gelu", False)[0],
            {"cuBLAS": lambda x, w, b: lambda: TF.linear(x, w)},
            _bf16(m * k + n * k + n, m * n, flops), free, math.inf, notes=alone,
        )  # fmt: skip
        yield Case(
            "GEMM dgrad, GELU's slope and bias gradient inside", f"{m}x{k}x{n}",
            lambda m=m, n=n, k=k: [
                _random(device, m, k), _random(device, k, n, scale=k**-0.5), _random(device, m, n)
            ],
            lambda dy, w, z: lambda: ops._mm_activation_backward(dy, w, z, "gelu", True)[0],
            {"cuBLAS": lambda dy, w, z: lambda: dy @ w},
            _bf16(m * k + n * k + m * n, m * n + n, flops), free, math.inf, notes=alone,
        )  # fmt: skip
        yield Case(
            "GEMM wgrad, bias gradient inside", shape, dy_x,
            lambda dy, x: lambda: ops._mm_row_sums(dy.T, x)[0], wgrad,
            _bf16(m * n + m * k, n * k + n, flops), free, notes=alone,
        )  # fmt: skip


ATTENTIONS = [  # batch, heads, time, size of a head, causal; goals of forward and backward
    (64, 6, 256, 64, True, 1.5, 1.5),
    (512, 6, 65, 64, False, 1.5, 1.5),
    (32, 12, 1024, 64, True, 1.1, 1.2),
    (8, 32, 2048, 64, True, 1.1, 1.1),
    (4, 16, 4096, 128, True, 1.1, 1.1),
]


def _attention_peer(backend: Any, causal: bool, backward: bool) -> Prepare:
    def prepare(q: Any, k: Any, v: Any, grad: Any) -> Callable[[], Any]:
        return _attention_call(torch, TF, (q, k, v), grad, causal, backward, backend)

    return prepare


def _attention_call(
    lib: Any, f: Any, leaves: tuple[Any, ...], grad: Any, causal: bool, backward: bool, backend: Any
) -> Callable[[], Any]:
    # Laid out (B, T, H, D), as a model has it.
    leaves = tuple(x.detach().transpose(1, 2).requires_grad_() for x in leaves)
    grad = grad.transpose(1, 2)

    def forward() -> Any:
        if backend is None:
            return f.scaled_dot_product_attention(*leaves, is_causal=causal)
        with sdpa_kernel(backend):
            return f.scaled_dot_product_attention(*leaves, is_causal=causal)

    if not backward:

        def call() -> Any:
            with lib.no_grad():
                return forward()

        return call
    y = forward()
    return lambda: lib.autograd.grad(y, leaves, grad, retain_graph=True)


def _attentions(device: str, tiny: bool) -> Iterator[Case]:
    kinds: dict[str, Any] = {"math": None}
    if device != "cpu":
        kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for b, h, t, d, causal, forward, backward in ATTENTIONS:
        if tiny:
            b, h, t, d = 2, 2, max(8, t // 64) + t % 2, 16
        elements = b * t * h * d

        def make(b: int = b, h: int = h, t: int = t, d: int = d) -> list[Any]:
            return [_random(device, b, t, h, d) for _ in range(4)]

        flops = 4 * b * h * attended(t, t, causal) * d
        shape = f"B{b} H{h} T{t} D{d}" + (" causal" if causal else "")
        for back, speed in ((False, forward), (True, backward)):

            def ours(
                q: Any, k: Any, v: Any, grad: Any, causal: bool = causal, back: bool = back
            ) -> Any:
                return _attention_call(vt, VF, (q, k, v), grad, causal, back, None)

            yield Case(
                "attention backward" if back else "attention forward", shape, make, ours,
                {name: _attention_peer(kind, causal, back) for name, kind in kinds.items()},
                _bf16(5 * elements, 3 * elements, flops * 5 // 2) if back
                else _bf16(3 * elements, elements, flops),
                Goal(speed=speed),
            )  # fmt: skip


NORMS = [  # kind, rows, columns; goals of forward and backward in us
    ("layer_norm", 32768, 768, 28, 45),
    ("layer_norm", 16384, 384, 9, 14),
    ("rms_norm", 16384, 2048, 38, 58),
    ("rms_norm", 32768, 4096, 140, 210),
]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # A backward that is timed again and again may not take the saved tensors' memory for its results.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def _sum_and_layer_norm(x: Any, r: Any, w: Any, b: Any) -> Any:
    s = x + r
    return TF.layer_norm(s, w.shape, w, b, 1e-5), s


def _sum_and_rms_norm(x: Any, r: Any, w: Any, b: Any) -> Any:
    s = x + r
    return TF.rms_norm(s, w.shape, w, 1e-5), s


def _norm_peer(function: Callable[..., Any], backward: bool, compiled: bool) -> Prepare:
    def prepare(*tensors: Any) -> Callable[[], Any]:
        run = _compiled(function) if compiled else function
        x, r, w, b, dy, ds = tensors
        leaves = [t.detach().requires_grad_() for t in (x, r, w, b)]
        if not backward:

            def call() -> Any:
                with torch.no_grad():
                    return run(x, r, w, b)

            return call
        results = run(*leaves)
        wanted = leaves if function is _sum_and_layer_norm else leaves[:3]
        return lambda: torch.autograd.grad(results, wanted, (dy, ds), retain_graph=True)[0]

    return prepare


def _our_norm(kind: str, backward: bool) -> Prepare:
    ops = _C._ops

    def prepare(x: Any, r: Any, w: Any, b: Any, dy: Any, ds: Any) -> Callable[[], Any]:
        n = [x.shape[-1]]
        centred = kind == "layer_norm"
        extra = (w, b) if centred else (w,)
        forward = ops._residual_layer_norm if centred else ops._residual_rms_norm
        if not backward:
            return lambda: forward(x, r, n, *extra, 1e-5, x.dtype)[:2]
        _, s, *statistics = forward(x, r, n, *extra, 1e-5, x.dtype)
        back = ops._residual_layer_norm_backward if centred else ops._residual_rms_norm_backward
        return lambda: back(dy, ds, s, n, *statistics, *extra, None, [], False)[0]

    return prepare


def _norms(device: str, size: Callable[[int], int]) -> Iterator[Case]:
    for kind, rows, columns, forward, backward in NORMS:
        m, n = size(rows), size(columns)

        def make(m: int = m, n: int = n) -> list[Any]:
            return [_random(device, *s) for s in ((m, n), (m, n), (n,), (n,), (m, n), (m, n))]

        function = _sum_and_layer_norm if kind == "layer_norm" else _sum_and_rms_norm
        modes = {"eager": False} if device == "cpu" else {"eager": False, "compiled": True}
        name = "LayerNorm" if kind == "layer_norm" else "RMSNorm"
        for back, us in ((False, forward), (True, backward)):
            elements, per_row = m * n, m * (2 if kind == "layer_norm" else 1)
            weights = n * (2 if kind == "layer_norm" else 1)
            # Statistics are float32: two elements each.
            work = (
                _bf16(3 * elements + 2 * per_row + weights, elements + weights) if back
                else _bf16(2 * elements + weights, 2 * elements + 2 * per_row)
            )  # fmt: skip
            yield Case(
                f"{name} {'backward' if back else 'forward'}, residual add inside", f"{m}x{n}",
                make, _our_norm(kind, back),
                {mode: _norm_peer(function, back, compiled) for mode, compiled in modes.items()},
                work, Goal(us=us), 4e-2,
            )  # fmt: skip


def _cross_entropy(logits: Any, target: Any) -> Any:
    return TF.cross_entropy(logits.float(), target)


def _cross_entropies(device: str, size: Callable[[int], int]) -> Iterator[Case]:
    m, n = size(32768), size(50304)

    def make() -> list[Any]:
        return [_random(device, m, n), vt.randint(0, n, (m,), device=device)]

    def ours(logits: Any, target: Any) -> Callable[[], Any]:
        one = vt.ones((), device=logits.device)
        return lambda: _C._ops._cross_entropy_index_gradient(
            logits, target, None, 1, -100, 0.0, one, vt.float32
        )

    def peer(compiled: bool) -> Prepare:
        def prepare(logits: Any, target: Any) -> Callable[[], Any]:
            leaf = logits.detach().requires_grad_()
            run = _compiled(_cross_entropy) if compiled else _cross_entropy

            def call() -> Any:
                loss = run(leaf, target)
                return loss.detach(), torch.autograd.grad(loss, leaf)[0]

            return call

        return prepare

    modes = {"eager": False} if device == "cpu" else {"eager": False, "compiled": True}
    yield Case(
        "cross-entropy forward and backward", f"{m}x{n}", make, ours,
        {mode: peer(compiled) for mode, compiled in modes.items()},
        Work(2 * m * n + 8 * m, 2 * m * n + 4, 0, ""), Goal(us=2500),
    )  # fmt: skip


def _gpt2_shapes(size: Callable[[int], int]) -> list[tuple[int, ...]]:
    d = size(768)
    layer = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (3 * d,), (d,), (4 * d,), *[(d,)] * 5]
    return [(size(50304), d), (size(1024), d), *layer * 12, (d,), (d,)]


def _llama_shapes(size: Callable[[int], int]) -> list[tuple[int, ...]]:
    d, keys, wide = size(2048), size(512), size(8192)
    layer = [(d, d), (keys, d), (keys, d), (d, d), (wide, d), (wide, d), (d, wide), (d,), (d,)]
    return [(size(32000), d), *layer * 16, (d,), (size(32000), d)]


def _update(lib: Any, tensors: tuple[Any, ...]) -> Callable[[], Any]:
    """Of parameters and their gradients, which come one after the other."""
    half = len(tensors) // 2
    parameters = [lib.nn.Parameter(t.clone()) for t in tensors[:half]]
    for parameter, grad in zip(parameters, tensors[half:]):
        parameter.grad = grad
    optimizer = lib.optim.AdamW(parameters, lr=1e-4, fused=True)

    def call() -> Any:
        optimizer.step()
        return parameters[0].detach()

    return call


def _updates(device: str, size: Callable[[int], int]) -> Iterator[Case]:
    for shapes in (_gpt2_shapes(size), _llama_shapes(size)):
        count = sum(math.prod(s) for s in shapes)

        def make(shapes: list[tuple[int, ...]] = shapes) -> list[Any]:
            return [vt.randn(*s, device=device) for s in (*shapes, *shapes)]

        yield Case(
            "AdamW", f"{count / 1e6:.4g}M parameters", make,
            lambda *t: _update(vt, t), {"fused": lambda *t: _update(torch, t)},
            # The parameter, two moments and the gradient are read; all but the last are written.
            Work(16 * count, 12 * count, 0, ""), Goal(bandwidth=0.9), 1e-5, together=True,
        )  # fmt: skip
