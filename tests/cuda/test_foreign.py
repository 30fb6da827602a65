"""Kernels of Triton and CuPy, and memory that they are handed, in captured steps on the hardware."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.graphs import capture, foreign


def draw(*shape: int, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.tensor(values, device="cuda")


def compare(kernel: Any, nodes: int) -> None:
    """Replays of a step around out = kernel(a, b) = a * 2 + b, on memory of the plan."""
    calls = 0

    def counted(a: Any, b: Any, out: Any) -> None:
        nonlocal calls
        calls += 1
        kernel(a, b, out)

    def step(x: Any, state: Any) -> Any:
        hidden = (x * 0.5).tanh()
        out = torch.empty_like(hidden)
        foreign(counted, hidden, state, out, writes=[out])
        state.add_(out.mean())
        return out + hidden

    states = [draw(33, 65, seed=9), draw(33, 65, seed=9)]
    inputs = [draw(33, 65, seed=seed) for seed in range(6)]
    expected = [step(x, states[0]) for x in inputs]  # compiles, too
    calls = 0
    captured = capture(lambda x: step(x, states[1]))
    for x, y in zip(inputs, expected):
        np.testing.assert_array_equal(captured(x).cpu().numpy(), y.cpu().numpy())
    np.testing.assert_array_equal(states[1].cpu().numpy(), states[0].cpu().numpy())
    assert calls == 1
    (variant,) = captured.variants
    ops = [op.name for op in variant.tape.ops if not op.is_view]
    found = variant.lowered.program.nodes()[ops.index("_foreign")]
    assert found == nodes


def test_ops_of_our_own() -> None:
    def kernel(a: Any, b: Any, out: Any) -> None:
        torch.add(a * 2, b, out=out)  # with an allocation, from the step's pool

    compare(kernel, 3)


def test_triton() -> None:
    triton = pytest.importorskip("triton")
    tl = pytest.importorskip("triton.language")

    @triton.jit
    def add(a, b, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        tl.store(out + at, tl.load(a + at, inside) * 2 + tl.load(b + at, inside), inside)

    driver = triton.runtime.driver.active
    before = driver.get_current_stream
    # Triton asks torch for it.
    driver.get_current_stream = lambda index: torch.cuda.current_stream(index).cuda_stream

    def kernel(a: Any, b: Any, out: Any) -> None:
        add[(triton.cdiv(a.numel(), 256),)](a, b, out, a.numel(), BLOCK=256)

    try:
        compare(kernel, 1)
    finally:
        driver.get_current_stream = before


@pytest.mark.parametrize("door", ["array interface", "DLPack"])
def test_cupy(door: str) -> None:
    cupy = pytest.importorskip("cupy")
    take = cupy.asarray if door == "array interface" else cupy.from_dlpack
    multiply_add = cupy.ElementwiseKernel(
        "float32 a, float32 b", "float32 out", "out = a * 2 + b", "vt_ma"
    )

    def kernel(a: Any, b: Any, out: Any) -> None:
        current = torch.cuda.current_stream()
        if hasattr(cupy.cuda.Stream, "from_external"):  # through __cuda_stream__; since CuPy 14
            stream = cupy.cuda.Stream.from_external(current)
        else:
            stream = cupy.cuda.ExternalStream(current.cuda_stream)
        with stream:
            multiply_add(take(a), take(b), take(out))

    compare(kernel, 1)


def test_a_kernel_launched_through_the_stream_s_protocol() -> None:
    """cuda.core takes objects that have __cuda_stream__."""
    pytest.importorskip("cuda.core")
    try:
        core = importlib.import_module("cuda.core.experimental")
    except ImportError:  # since 1.0
        core = importlib.import_module("cuda.core")
    source = """extern "C" __global__ void add(const float* a, const float* b, float* out, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) out[i] = a[i] * 2 + b[i]; }"""
    device = core.Device()
    device.set_current()
    arch = "".join(str(part) for part in device.compute_capability)
    program = core.Program(source, code_type="c++", options=core.ProgramOptions(arch=f"sm_{arch}"))
    add = program.compile("cubin").get_kernel("add")

    def kernel(a: Any, b: Any, out: Any) -> None:
        stream = device.create_stream(torch.cuda.current_stream())
        config = core.LaunchConfig(grid=(a.numel() + 255) // 256, block=256)
        pointers = [t.data_ptr() for t in (a, b, out)]
        core.launch(stream, config, add, *pointers, np.int32(a.numel()))

    compare(kernel, 1)


def test_waiting_for_the_device_is_refused_and_harms_nothing() -> None:
    waits = True

    def kernel(a: Any, out: Any) -> None:
        out.copy_(a)
        if waits:
            a.sum().item()

    def step(x: Any) -> Any:
        out = torch.empty_like(x)
        foreign(kernel, x * 1.5, out, writes=[out])
        return out

    captured = capture(step)
    free = torch.cuda.memory_allocated()
    with pytest.raises(RuntimeError, match=r"(?s)_foreign, cannot be part of a CUDA graph.*kernel"):
        captured(draw(8))
    assert not captured.variants
    torch.cuda.synchronize()
    captured.reset()
    assert torch.cuda.memory_allocated() <= free + 4096
    waits = False
    for seed in range(4):
        x = draw(8, seed=seed)
        np.testing.assert_array_equal(captured(x).cpu().numpy(), x.cpu().numpy() * np.float32(1.5))
