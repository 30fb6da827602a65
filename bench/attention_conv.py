"""Attention and convolutions in bf16 on a GPU: cuDNN through us, our own kernels, and torch.

python bench/attention_conv.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as VF

ATTENTION = [(64, 6, 256, 64), (32, 12, 1024, 64), (4, 16, 4096, 128)]  # B, H, T, D; causal
CONVOLUTIONS = [
    ("3x3 64 -> 64, 32x64x56x56", (32, 64, 56, 56), (64, 64, 3, 3), 1, 1),
    ("patches 4x4 3 -> 384, 512x3x32x32", (512, 3, 32, 32), (384, 3, 4, 4), 4, 0),
]


def milliseconds(call: Callable[[], Any], library: Any, rounds: int = 9) -> float:
    """The median over rounds of a call's time on the device."""
    for _ in range(3):
        call()
    library.cuda.synchronize()
    begin, end = (library.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    calls = max(1, min(50, int(5 / max(begin.elapsed_time(end), 1e-3))))
    samples = []
    for _ in range(rounds):
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / calls)
    return statistics.median(samples)


def row(name: str, flops: float, times: dict[str, float]) -> None:
    """One line: milliseconds and TFLOP/s of each."""
    cells = (f"{k} {v:8.4f} ms {flops / v / 1e9:6.1f}" for k, v in times.items())
    print(f"{name:44s} " + " | ".join(cells) + " TFLOP/s", flush=True)


def attention(b: int, h: int, t: int, d: int) -> None:
    """Forward and backward of causal attention, laid out (B, T, H, D) as a model has it."""
    flops = 4 * b * h * t * t * d / 2
    forward, backward = {}, {}
    for name, lib, f in (("cudnn", vt, VF), ("ours", vt, VF), ("torch", torch, TF)):
        if lib is vt:
            vt.backends.cuda.enable_cudnn_sdp(name == "cudnn")
        made = (lib.randn(b, t, h, d, device="cuda").to(lib.bfloat16) for _ in range(4))
        q, k, v, grad = (x.transpose(1, 2) for x in made)
        for x in (q, k, v):
            x.requires_grad_()

        def call(lib: Any = lib, f: Any = f, q: Any = q, k: Any = k, v: Any = v) -> Any:
            with lib.no_grad():
                return f.scaled_dot_product_attention(q, k, v, is_causal=True)

        forward[name] = milliseconds(call, lib)
        y = f.scaled_dot_product_attention(q, k, v, is_causal=True)

        def back(lib: Any = lib, y: Any = y, leaves: Any = (q, k, v), grad: Any = grad) -> Any:
            return lib.autograd.grad(y, leaves, grad, retain_graph=True)

        backward[name] = milliseconds(back, lib)
        if name == "cudnn":
            vt.use_deterministic_algorithms(True)
            backward["cudnn ordered"] = milliseconds(back, lib)
            vt.use_deterministic_algorithms(False)
    shape = f"attention B{b} H{h} T{t} D{d}"
    row(shape + " forward", flops, forward)
    row(shape + " backward", 2.5 * flops, backward)


def convolution(name: str, x_size: Any, w_size: Any, stride: int, padding: int) -> None:
    """Forward and backward of a convolution in both memory formats."""
    for layout in ("contiguous", "channels_last"):
        forward, backward = {}, {}
        for who, lib, f in (("cudnn", vt, VF), ("windows", vt, VF), ("torch", torch, TF)):
            lib.backends.cudnn.enabled = who != "windows"
            lib.backends.cudnn.benchmark = who != "windows"
            x = lib.randn(*x_size, device="cuda").to(lib.bfloat16)
            w = lib.randn(*w_size, device="cuda").to(lib.bfloat16)
            if layout == "channels_last":
                x = x.contiguous(memory_format=lib.channels_last)
                w = w.contiguous(memory_format=lib.channels_last)
            x.requires_grad_()
            w.requires_grad_()

            def call(lib: Any = lib, f: Any = f, x: Any = x, w: Any = w) -> Any:
                with lib.no_grad():
                    return f.conv2d(x, w, None, stride, padding)

            y = f.conv2d(x, w, None, stride, padding)
            grad = lib.randn(*y.shape, device="cuda").to(lib.bfloat16)
            if layout == "channels_last":
                grad = grad.contiguous(memory_format=lib.channels_last)
            forward[who] = milliseconds(call, lib)

            def back(lib: Any = lib, y: Any = y, leaves: Any = (x, w), grad: Any = grad) -> Any:
                return lib.autograd.grad(y, leaves, grad, retain_graph=True)

            backward[who] = milliseconds(back, lib)
        flops = 2.0 * y.numel() * w_size[1] * w_size[2] * w_size[3]
        row(f"conv {name} {layout} fwd", flops, forward)
        row(f"conv {name} {layout} bwd", 2 * flops, backward)
    vt.backends.cudnn.enabled = True


def main() -> None:
    """Prints all rows."""
    print(
        torch.cuda.get_device_name(),
        "torch",
        torch.__version__,
        "cuDNN",
        vt.backends.cudnn.version(),
    )
    for shape in ATTENTION:
        attention(*shape)
    for case in CONVOLUTIONS:
        convolution(*case)


if __name__ == "__main__":
    main()
