"""The compiled kernels on a GPU: ops through the launch table against the library's kernels, and
what no op calls against its reference. Skipped without a Hopper GPU or a build with the DSL."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

_cuda = pytest.importorskip("vibetensor._cuda", reason="this build has no CUDA")

import vibetensor.torch as torch  # noqa: E402
import vibetensor.torch.nn.functional as F  # noqa: E402
from vibetensor.cute_kernels import device, registry  # noqa: E402

if not _cuda.cute_compiled_by():
    pytest.skip("built without the CuTe DSL", allow_module_level=True)
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-8, torch.float32: 2e-5}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    before = _cuda.cute_mode()
    yield
    _cuda.set_cute_mode(before)


def both(function, *inputs):
    """Results with the library's kernels and with CuTe's."""
    results = []
    for mode in ("off", "all"):
        _cuda.set_cute_mode(mode)
        torch.manual_seed(5)
        results.append([t.detach().float().cpu().numpy() for t in function(*inputs)])
    return zip(*results)


def check(function, dtype, *inputs) -> None:
    for want, got in both(function, *inputs):
        scale = np.abs(want).max() / 8 + 1e-6
        assert np.allclose(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 72, 256, 384, 768, 1000, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(dtype, n: int, kind: str) -> None:
    m = 67
    x, dy = (torch.randn(m, n, device="cuda").to(dtype) for _ in range(2))
    w, b = (torch.randn(n, device="cuda").to(dtype) for _ in range(2))

    def step(x, dy, w, b):
        leaves = [t.detach().requires_grad_() for t in ((x, w, b) if kind == "layer" else (x, w))]
        if kind == "layer":
            y = F.layer_norm(leaves[0], (n,), leaves[1], leaves[2])
        else:
            y = F.rms_norm(leaves[0], (n,), leaves[1])
        return (y, *torch.autograd.grad(y, leaves, dy))

    check(step, dtype, x, dy, w, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [65, 100, 1024, 4096, 32000, 50304])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(dtype, n: int, smoothing: float) -> None:
    m = 33
    x = (torch.randn(m, n, device="cuda") * 4).to(dtype)
    target = torch.randint(0, n, (m,), device="cuda")
    target[3] = -100

    def step(x):
        leaf = x.detach().requires_grad_()
        loss = F.cross_entropy(leaf, target, label_smoothing=smoothing)
        return (loss, *torch.autograd.grad(loss, leaf))

    check(step, dtype, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 264, 1024, 4096, 16384])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax(dtype, n: int, function) -> None:
    x, dy = (torch.randn(33, n, device="cuda").to(dtype) for _ in range(2))

    def step(x, dy):
        leaf = x.detach().requires_grad_()
        y = function(leaf, -1)
        return (y, *torch.autograd.grad(y, leaf, dy))

    check(step, dtype, x, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 4096, 100_000])
def test_dropout_draws_the_same_numbers(dtype, n: int) -> None:
    x = torch.randn(n, device="cuda").to(dtype)
    for want, got in both(lambda x: torch.native_dropout(x, 0.3, True), x):
        assert np.array_equal(want, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 72, 768, 2048])
def test_embedding_backward(dtype, d: int) -> None:
    weight = torch.randn(50, d, device="cuda").to(dtype)
    indices = torch.randint(0, 50, (16, 65), device="cuda")
    dy = torch.randn(16, 65, d, device="cuda").to(dtype)

    def step(weight, dy):
        leaf = weight.detach().requires_grad_()
        return torch.autograd.grad(F.embedding(indices, leaf, padding_idx=7), leaf, dy)

    check(step, dtype, weight, dy)


@pytest.mark.parametrize("variant", registry.load()["cross_entropy_in_place"].variants,
                         ids=lambda v: v.name)  # fmt: skip
def test_cross_entropy_in_place(variant) -> None:
    m, n = 9, min(variant.most, 1000) // 8 * 8
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[variant.dtype]
    x = torch.randn(m, n, device="cuda").to(dtype)
    target = torch.randint(0, n, (m,), device="cuda")
    before = x.float().cpu().numpy()
    losses, lse = (torch.full((m,), float("nan"), device="cuda") for _ in range(2))
    device.launch("cross_entropy_in_place", variant.name, logits=x, targets=target, losses=losses,
                  lse=lse, record=torch.zeros(3, dtype=torch.int64, device="cuda"),
                  grad=torch.ones(1, device="cuda"), dx=x, ignore_index=-100, smoothing=0.1)  # fmt: skip
    reference = registry.load()["cross_entropy_in_place"].reference
    want = reference(before, target.cpu().numpy(), smoothing=0.1)
    tolerance = TOLERANCE[dtype]
    assert np.allclose(losses.cpu().numpy(), want["losses"], rtol=1e-5)
    assert np.allclose(x.float().cpu().numpy(), want["dx"], rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("variant", registry.load()["adamw_step"].variants, ids=lambda v: v.name)
def test_adamw(variant) -> None:
    dtype = torch.bfloat16 if variant.gradients == "bf16" else torch.float32
    sizes = (3, 8192, 100_003)
    tensors, rows, chunks = [], [], []
    for which, numel in enumerate(sizes):
        w, m = (torch.randn(numel, device="cuda") for _ in range(2))
        g = torch.randn(numel, device="cuda").to(dtype)
        s = torch.rand(numel, device="cuda")
        copy = torch.zeros(numel, device="cuda", dtype=torch.bfloat16)
        tensors.append(((w, g, m, s, copy), [t.float().cpu().numpy().copy() for t in (w, g, m, s)]))
        rows.append([*(t.data_ptr() for t in (w, g, m, s, copy)), numel])
        chunks += [[which, at] for at in range(0, numel, 8192)]
    numbers = torch.tensor([1e-3, 2, 1.0, 0], device="cuda")
    device.launch("adamw_step", variant.name, tensors=torch.tensor(rows, device="cuda"),
                  chunks=torch.tensor(chunks, device="cuda"), numbers=numbers, keep1=0.1,
                  keep2=0.001, log_beta1=float(np.log(0.9)), log_beta2=float(np.log(0.999)),
                  weight_decay=0.1, eps=1e-8)  # fmt: skip
    reference = registry.load()["adamw_step"].reference
    for (w, _, m, s, copy), before in tensors:
        want = reference(*before, [1e-3, 2, 1, 0], 0.9, 0.999, 0.1, 1e-8)
        for got, name in ((w, "weight"), (m, "average"), (s, "square")):
            assert np.allclose(got.cpu().numpy(), want[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(copy, w.to(torch.bfloat16))
