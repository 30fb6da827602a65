"""Convolutions and attention on cuDNN: against the CPU in float64, and without the library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor.torch.backends import cuda as cuda_backend
from vibetensor.torch.backends import cudnn
from vibetensor.torch.cuda import _backend
from vibetensor.torch.nn.attention import SDPBackend, sdpa_kernel

# Bounds of |error| over the largest magnitude of the reference: a few roundings of the result for
# 16-bit floats, the length of the sums for the others.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
TF32 = 4e-3


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    cuda_backend.enable_cudnn_sdp(True)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    if torch.cuda.is_available() and not cudnn.is_available():
        pytest.skip(_backend.native().cudnn_problem())


def _close(actual: Any, expected: Any, bound: float) -> None:
    a, e = actual.detach().double().cpu().numpy(), expected.detach().double().cpu().numpy()
    assert a.shape == e.shape
    assert np.array_equal(np.isnan(a), np.isnan(e))
    error = np.nanmax(np.abs(a - e), initial=0) / max(np.nanmax(np.abs(e), initial=0), 1e-30)
    assert error <= bound, f"error {error:.3g} > {bound:.3g}"


def _conv(
    ndim: int,
    x: Any,
    w: Any,
    b: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    transposed: bool,
) -> Any:
    if transposed:
        f = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[ndim]
        return f(x, w, b, stride, padding, 0, groups, dilation)
    f = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    return f(x, w, b, stride, padding, dilation, groups)


# ndim, input, weight, stride, padding, dilation, groups, transposed
CONVOLUTIONS = [
    (2, (2, 8, 9, 10), (16, 8, 3, 3), 1, 1, 1, 1, False),
    (2, (3, 3, 32, 32), (24, 3, 4, 4), 4, 0, 1, 1, False),
    (2, (2, 6, 13, 11), (9, 2, 3, 2), (2, 1), (1, 0), 1, 3, False),
    (2, (2, 4, 15, 14), (8, 4, 3, 3), 1, 2, 2, 1, False),
    (2, (2, 5, 7, 7), (5, 1, 3, 3), 1, 1, 1, 5, False),
    (2, (4, 16, 8, 8), (8, 16, 1, 1), 1, 0, 1, 1, False),
    (2, (1, 3, 6, 7), (4, 3, 2, 3), (1, 2), (2, 1), (2, 1), 1, False),
    (1, (2, 6, 33), (8, 6, 5), 2, 2, 1, 1, False),
    (1, (3, 8, 20), (8, 2, 3), 1, 2, 2, 4, False),
    (3, (2, 4, 6, 7, 8), (8, 4, 3, 3, 3), 1, 1, 1, 1, False),
    (3, (1, 4, 5, 6, 7), (6, 2, 2, 3, 1), (2, 1, 1), (1, 0, 0), (1, 2, 1), 2, False),
    (2, (2, 8, 5, 4), (8, 3, 3, 2), 2, 1, 1, 1, True),
    (2, (2, 8, 5, 6), (8, 2, 3, 3), 1, 1, 2, 2, True),
    (1, (2, 4, 9), (4, 3, 4), 2, 1, 1, 1, True),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution_and_gradients(case: Any, layout: str, dtype: Any) -> None:
    ndim, x_size, w_size, stride, padding, dilation, groups, transposed = case
    if layout == "channels_last" and ndim != 2:
        pytest.skip("channels_last is a format of 4-D tensors")
    torch.manual_seed(0)
    channels = w_size[1] * groups if transposed else w_size[0]
    inputs = [torch.randn(size).to(dtype) for size in (x_size, w_size, (channels,))]

    def run(tensors: list[Any]) -> list[Any]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = _conv(ndim, *leaves, stride, padding, dilation, groups, transposed)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(dtype).to(y.dtype).to(y.device))
        return [y, *(leaf.grad for leaf in leaves)]

    expected = run([t.double() for t in inputs])
    device = [t.cuda() for t in inputs]
    if layout == "channels_last":
        device[0] = device[0].contiguous(memory_format=torch.channels_last)
    actual = run(device)
    for a, e in zip(actual, expected):
        assert a.dtype == dtype
        _close(a, e, TOLERANCE[dtype])
    if layout == "channels_last":
        assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_convolutions_run_on_the_library() -> None:
    """Else the tests above would compare products over windows. Windows that tile the input stay
    products, on 16-bit floats."""
    native = _backend.native()
    x = torch.randn(2, 3, 8, 8, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(6, 3, 4, 4, device="cuda", dtype=torch.bfloat16)
    before = native.cudnn_runs()
    F.conv2d(x, w, stride=4)
    assert native.cudnn_runs() == before
    F.conv2d(x.float(), w.float(), stride=4)
    assert native.cudnn_runs() == before + 1
    for dtype in TOLERANCE:
        x = torch.randn(2, 8, 9, 9, device="cuda").to(dtype).requires_grad_()
        w = torch.randn(8, 8, 3, 3, device="cuda").to(dtype).requires_grad_()
        before = native.cudnn_runs()
        F.conv2d(x, w, padding=1).sum().backward()
        assert native.cudnn_runs() == before + 3, (dtype, native.cudnn_refusal())


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_second_gradients(case: Any) -> None:
    ndim, x_size, w_size, stride, padding, dilation, groups, transposed = case
    torch.manual_seed(0)
    x, w = torch.randn(x_size, dtype=torch.float64), torch.randn(w_size, dtype=torch.float64)

    def run(device: str) -> list[Any]:
        leaves = [t.detach().to(device).requires_grad_() for t in (x, w)]
        y = _conv(ndim, *leaves, None, stride, padding, dilation, groups, transposed)
        torch.manual_seed(1)
        weights = [torch.randn(s, dtype=torch.float64) for s in (y.shape, x_size, w_size)]
        grad, u, v = (t.to(device) for t in weights)
        grad.requires_grad_()
        first = torch.autograd.grad(y, leaves, grad, create_graph=True)
        return list(
            torch.autograd.grad((first[0] * u).sum() + (first[1] * v).sum(), [grad, *leaves])
        )

    for a, e in zip(run("cuda"), run("cpu")):
        _close(a, e, 1e-11)


def test_tf32_is_a_switch() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(8, 64, 28, 28), torch.randn(64, 64, 3, 3)
    expected = F.conv2d(x.double(), w.double(), padding=1)
    exact = F.conv2d(x.cuda(), w.cuda(), padding=1)
    _close(exact, expected, TOLERANCE[torch.float32])
    with cudnn.flags(enabled=True, allow_tf32=True):
        _close(F.conv2d(x.cuda(), w.cuda(), padding=1), expected, TF32)


def test_deterministic_convolution_repeats_its_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 32, 28, 28, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(32, 32, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with cudnn.flags(enabled=True, deterministic=True):
        runs = []
        for _ in range(3):
            grads = torch.autograd.grad(F.conv2d(x, w, padding=1).float().square().sum(), (x, w))
            runs.append([g.float().cpu().numpy() for g in grads])
    for other in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], other))


def test_benchmark_chooses_a_correct_plan() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 16, 20, 20), torch.randn(16, 16, 3, 3)
    with cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        for _ in range(2):
            y = F.conv2d(x.cuda().half(), w.cuda().half(), padding=1)
    expected = F.conv2d(x.half().double(), w.half().double(), padding=1)
    _close(y, expected, TOLERANCE[torch.float16])


def test_convolution_without_the_library() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)
    with cudnn.flags(enabled=False):
        leaf = x.cuda().requires_grad_()
        before = _backend.native().cudnn_runs()
        y = F.conv2d(leaf, w.cuda(), padding=1)
        y.sum().backward()
        assert _backend.native().cudnn_runs() == before
        volume = F.conv3d(x.cuda()[:, :, None], w.cuda()[:, :, None], padding=(0, 1, 1))
    reference = x.double().requires_grad_()
    F.conv2d(reference, w.double(), padding=1).sum().backward()
    _close(leaf.grad, reference.grad, 1e-5)
    _close(volume[:, :, 0], y, 1e-5)


def test_unaligned_views_are_convolved() -> None:
    torch.manual_seed(0)
    whole = torch.randn(1 + 2 * 4 * 8 * 8, device="cuda")
    x = whole[1:].view(2, 4, 8, 8)
    w = torch.randn(4, 4, 3, 3, device="cuda")
    _close(F.conv2d(x, w), F.conv2d(x.cpu().double(), w.cpu().double()), 1e-5)


def test_wrong_convolutions_are_refused_by_name() -> None:
    x, w = torch.randn(2, 4, 5, 5, device="cuda"), torch.randn(6, 4, 3, 3, device="cuda")
    with pytest.raises(RuntimeError, match="channels"):
        F.conv2d(x[:, :3], w)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        F.conv2d(x[..., :2], w)
    with pytest.raises(RuntimeError, match="dilation"):
        F.conv2d(x, w, dilation=0)
    with pytest.raises(RuntimeError, match="negative padding"):
        F.conv2d(x, w, padding=-1)
    assert F.conv2d(x[:0], w).shape == (0, 6, 3, 3)


CUDNN, OURS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION

# ---- attention -----------------------------------------------------------------------------------


def _attention(
    q: Any, k: Any, v: Any, grad: Any, causal: bool, scale: float | None = None
) -> list[Any]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=scale, enable_gqa=gqa)
    y.backward(grad)
    return [y, *(leaf.grad for leaf in leaves)]


def _operands(
    b: int, h: int, kv: int, t: int, s: int, d: int, dv: int, dtype: Any, layout: str
) -> list[Any]:
    torch.manual_seed(t * 1000 + s + d)

    def make(heads: int, length: int, width: int) -> Any:
        if layout == "bthd":
            return torch.randn(b, length, heads, width).to(dtype).transpose(1, 2)
        return torch.randn(b, heads, length, width).to(dtype)

    return [make(h, t, d), make(kv, s, d), make(kv, s, dv), make(h, t, dv)]


def _to_device(t: Any) -> Any:
    """A copy on the device, in the same layout."""
    if t.is_contiguous():
        return t.cuda()
    return t.transpose(1, 2).contiguous().cuda().transpose(1, 2)


SHAPES = [
    # B, H, KV heads, T, S, D, Dv
    (2, 4, 4, 64, 64, 64, 64),
    (2, 3, 3, 128, 128, 64, 64),
    (1, 2, 2, 65, 65, 64, 64),
    (2, 2, 2, 77, 77, 128, 128),
    (1, 4, 2, 77, 65, 64, 64),
    (2, 8, 1, 130, 130, 64, 64),
    (1, 2, 2, 33, 257, 32, 32),
    (1, 2, 2, 257, 33, 96, 96),
    (1, 2, 2, 96, 96, 72, 40),
    (1, 2, 2, 80, 80, 192, 192),
    (1, 2, 2, 2, 3, 8, 8),
    (1, 6, 3, 256, 256, 64, 64),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_gradients(shape: Any, layout: str, causal: bool, dtype: Any) -> None:
    operands = _operands(*shape, dtype, layout)
    expected = _attention(*(t.double() for t in operands), causal)
    device = [_to_device(t) for t in operands]
    for a, e in zip(device, operands):
        assert all(x == y or n == 1 for x, y, n in zip(a.stride(), e.stride(), e.shape))
    for kernels, runs in ((CUDNN, 2), (OURS, 0)):
        before = _backend.native().cudnn_runs()
        with sdpa_kernel(kernels):
            actual = _attention(*device, causal)
        assert _backend.native().cudnn_runs() == before + runs, _backend.native().cudnn_refusal()
        for a, e in zip(actual, expected):
            assert a.dtype == dtype
            _close(a, e, 4e-3 if dtype == torch.float16 else 3e-2)


@pytest.mark.parametrize(("forward", "backward"), [(CUDNN, OURS), (OURS, CUDNN)])
def test_one_forward_goes_with_the_other_backward(
    forward: SDPBackend, backward: SDPBackend
) -> None:
    """The saved statistics are the same."""
    operands = _operands(2, 4, 2, 96, 96, 64, 64, torch.float16, "bhtd")
    expected = _attention(*(t.double() for t in operands), True)
    q, k, v, grad = (t.cuda() for t in operands)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    before = _backend.native().cudnn_runs()
    with sdpa_kernel(forward):
        y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    with sdpa_kernel(backward):
        y.backward(grad)
    assert _backend.native().cudnn_runs() == before + 1
    for a, e in zip([y, *(leaf.grad for leaf in leaves)], expected):
        _close(a, e, 4e-3)


@pytest.mark.parametrize("kernels", [CUDNN, OURS])
def test_attention_scale_expanded_gradient_and_large_scores(kernels: SDPBackend) -> None:
    operands = _operands(1, 2, 2, 64, 64, 64, 64, torch.bfloat16, "bhtd")
    q, k, v, grad = operands
    for scale in (0.25, 40.0):
        expected = _attention(*(t.double() for t in operands), True, scale)
        with sdpa_kernel(kernels):
            actual = _attention(*(t.cuda() for t in operands), True, scale)
        for a, e in zip(actual, expected):
            _close(a, e, 5e-2)
    ones = torch.ones((), dtype=torch.bfloat16)
    expected = _attention(
        q.double(), k.double(), v.double(), ones.double().expand(grad.shape), False
    )
    expanded = ones.cuda().expand(grad.shape)
    with sdpa_kernel(kernels):
        actual = _attention(q.cuda(), k.cuda(), v.cuda(), expanded, False)
    for a, e in zip(actual, expected):
        _close(a, e, 3e-2)


def test_infinite_scores_give_what_our_kernels_give() -> None:
    q, k, v, _ = _operands(1, 1, 1, 64, 64, 64, 64, torch.bfloat16, "bhtd")
    q[0, 0, 5, 0] = float("inf")
    k[0, 0, 3, 0] = float("nan")
    outs = []
    for kernels in (CUDNN, OURS):
        with sdpa_kernel(kernels):
            y = F.scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), is_causal=True)
        outs.append(y.float().cpu().numpy())
    assert np.array_equal(np.isnan(outs[0]), np.isnan(outs[1]))
    assert np.isnan(outs[0][0, 0, 5:]).all() and not np.isnan(outs[0][0, 0, :3]).any()


def test_deterministic_attention_repeats_its_bits() -> None:
    operands = [_to_device(t) for t in _operands(4, 4, 4, 512, 512, 64, 64, torch.bfloat16, "bthd")]
    torch.use_deterministic_algorithms(True)
    assert torch.are_deterministic_algorithms_enabled()
    runs = [
        [g.detach().float().cpu().numpy() for g in _attention(*operands, True)] for _ in range(4)
    ]
    for other in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], other))
    expected = _attention(*(t.cpu().double() for t in operands), True)
    for a, e in zip(runs[0], expected):
        _close(torch.from_numpy(a), e, 3e-2)


def test_dropout_and_masks_stay_with_our_kernels() -> None:
    q, k, v, _ = (t.cuda() for t in _operands(1, 2, 2, 64, 64, 64, 64, torch.float16, "bhtd"))
    both = []
    for kernels in (CUDNN, OURS):
        torch.manual_seed(3)
        with sdpa_kernel(kernels):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        both.append(y.float().cpu().numpy())
    assert np.array_equal(*both)


def test_growing_lengths_are_left_to_our_kernels() -> None:
    """Sampling sees a new length at every token; planning each would take longer than the text."""
    native = _backend.native()
    with sdpa_kernel(CUDNN):
        counts = []
        for length in range(64, 64 + 40):
            x = torch.randn(1, 3, length, 16, device="cuda", dtype=torch.float16)
            before = native.cudnn_runs()
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
            counts.append(native.cudnn_runs() - before)
    assert sum(counts[:8]) == 8 and sum(counts[-8:]) == 0


def test_steady_state_needs_nothing_from_the_driver() -> None:
    operands = [_to_device(t) for t in _operands(2, 4, 4, 256, 256, 64, 64, torch.bfloat16, "bthd")]
    x = torch.randn(4, 16, 32, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(16, 16, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        with sdpa_kernel(CUDNN):
            _attention(*operands, True)
        torch.autograd.grad(F.conv2d(x, w, padding=1).sum(), (x, w))

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    native = _backend.native()
    before = torch.cuda.memory_stats()
    syncs = native.implicit_syncs()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert native.implicit_syncs() == syncs


def test_streams_and_threads_have_their_own_handles() -> None:
    import threading

    operands = _operands(2, 2, 2, 128, 128, 64, 64, torch.bfloat16, "bhtd")
    expected = _attention(*(t.double() for t in operands), True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                device = [t.cuda() for t in operands]
                for _ in range(5):
                    actual = _attention(*device, True)
            stream.synchronize()
            for a, e in zip(actual, expected):
                _close(a, e, 3e-2)
        except BaseException as error:
            failures.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=work) for _ in range(4)]
        with sdpa_kernel(CUDNN):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not failures


def test_switches_are_torch_s() -> None:
    assert cudnn.version() >= 90000
    for name, value in itertools.product(
        ("benchmark", "deterministic", "allow_tf32"), (True, False)
    ):
        setattr(cudnn, name, value)
        assert getattr(cudnn, name) is value
    with cudnn.flags(enabled=False):
        assert cudnn.enabled is False
    assert cudnn.enabled is True
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not cuda_backend.cudnn_sdp_enabled()
    assert cuda_backend.cudnn_sdp_enabled()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        assert cuda_backend.cudnn_sdp_enabled()


# ---- run-time compilation ------------------------------------------------------------------------


def test_nvrtc_compiles_and_launches_a_kernel() -> None:
    native = _backend.native()
    source = """
    extern "C" __global__ void triple(float* x, long long n) {
      const long long i = blockIdx.x * 128ll + threadIdx.x;
      if (i < n) x[i] *= FACTOR;
    }"""
    try:
        code, _ = native.nvrtc_compile(
            source, "triple.cu", native.architecture_of(0), ["-DFACTOR=3"]
        )
    except RuntimeError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise
    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    native.Module(code).launch("triple", 8, 128, [x.data_ptr(), 1000], 0)
    assert np.array_equal(x.cpu().numpy(), 3 * np.arange(1000, dtype=np.float32))
    with pytest.raises(RuntimeError, match=r"(?s)compiling bad.cu for sm_.*undefined_name"):
        native.nvrtc_compile(
            "void f() { undefined_name; }", "bad.cu", native.architecture_of(0), []
        )
    with pytest.raises(RuntimeError, match="absent"):
        native.Module(code).launch("absent", 1, 1, [], 0)
