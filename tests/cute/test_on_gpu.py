"""The compiled kernels on a GPU against float64: ops through the launch table, with strange numbers,
views that do not fit and in captured steps; and what no op calls against its reference. Skipped without
a Hopper GPU or a build with the DSL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

_cuda = pytest.importorskip("vibetensor._cuda", reason="this build has no CUDA")

import vibetensor.torch as torch  # noqa: E402
import vibetensor.torch.nn.functional as F  # noqa: E402
from vibetensor.cute_kernels import device, registry  # noqa: E402
from vibetensor.graphs import capture  # noqa: E402

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


def results(function: Any, mode: str, *inputs: Any) -> list[np.ndarray]:
    """What the function returns, with the library's kernels ("off") or CuTe's ("all")."""
    _cuda.set_cute_mode(mode)
    torch.manual_seed(5)
    return [t.detach().double().cpu().numpy() for t in function(*inputs)]


def exact(function: Any, *inputs: Any) -> list[np.ndarray]:
    """The same in float64 on the CPU, from the same numbers."""
    moved = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in inputs]
    return [t.detach().numpy() for t in function(*moved)]


def close(got: list[np.ndarray], want: list[np.ndarray], dtype: Any, slack: float = 1.0) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        scale = np.abs(b).max() / 8 + 1e-6
        atol = TOLERANCE[dtype] * scale * slack
        assert np.allclose(a, b, rtol=TOLERANCE[dtype], atol=atol)


def check(function: Any, dtype: Any, *inputs: Any, slack: float = 1.0) -> None:
    """CuTe's kernels and the library's against float64, and CuTe's bits each time."""
    want = exact(function, *inputs)
    got = results(function, "all", *inputs)
    close(got, want, dtype, slack)
    close(results(function, "off", *inputs), want, dtype, slack)
    for a, b in zip(got, results(function, "all", *inputs)):
        assert np.array_equal(a, b)


def norm_inputs(dtype: Any, m: int, n: int) -> list[Any]:
    """x, dy, weight, bias."""
    shapes = ((m, n), (m, n), (n,), (n,))
    return [torch.randn(*shape, device="cuda").to(dtype) for shape in shapes]


def norm_step(kind: str) -> Any:
    def step(x: Any, dy: Any, w: Any, b: Any) -> tuple[Any, ...]:
        leaves = [t.detach().requires_grad_() for t in ((x, w, b) if kind == "layer" else (x, w))]
        if kind == "layer":
            y = F.layer_norm(leaves[0], w.shape, leaves[1], leaves[2], 1e-5)
        else:
            y = F.rms_norm(leaves[0], w.shape, leaves[1], 1e-5)
        return (y, *torch.autograd.grad(y, leaves, dy))

    return step


def loss_inputs(dtype: Any, m: int, n: int) -> list[Any]:
    """Logits and targets, of which one is ignored."""
    target = torch.randint(0, n, (m,), device="cuda")
    target[3] = -100
    return [(torch.randn(m, n, device="cuda") * 4).to(dtype), target]


def loss_step(smoothing: float = 0.0, reduction: str = "mean") -> Any:
    def step(x: Any, target: Any) -> tuple[Any, ...]:
        leaf = x.detach().requires_grad_()
        loss = F.cross_entropy(leaf, target, label_smoothing=smoothing, reduction=reduction)
        return (loss, *torch.autograd.grad(loss.sum(), leaf))

    return step


def softmax_step(function: Any) -> Any:
    def step(x: Any, dy: Any) -> tuple[Any, ...]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, -1)
        return (y, *torch.autograd.grad(y, leaf, dy))

    return step


def embedding_step(weight: Any, indices: Any, dy: Any) -> tuple[Any, ...]:
    leaf = weight.detach().requires_grad_()
    return torch.autograd.grad(F.embedding(indices, leaf, padding_idx=7), leaf, dy)


def same_rows(got: np.ndarray, want: np.ndarray, but: int) -> None:
    """All rows but one have the same bits."""
    others = np.arange(len(want)) != but
    assert np.array_equal(got[others], want[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 72, 256, 384, 768, 1000, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(dtype, n: int, kind: str) -> None:
    check(norm_step(kind), dtype, *norm_inputs(dtype, 67, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [65, 100, 1024, 4096, 32000, 50304])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(dtype, n: int, smoothing: float) -> None:
    check(loss_step(smoothing), dtype, *loss_inputs(dtype, 33, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 264, 1024, 4096, 16384])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax(dtype, n: int, function) -> None:
    x, dy = (torch.randn(33, n, device="cuda").to(dtype) for _ in range(2))
    # The gradient takes the rounded result: for logarithms its exponential, times a sum over the row.
    check(softmax_step(function), dtype, x, dy, slack=8.0 if function is torch.log_softmax else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 4096, 100_000])
def test_dropout_draws_the_same_numbers(dtype, n: int) -> None:
    x = torch.randn(n, device="cuda").to(dtype)
    (want, want_mask), (got, mask) = (
        results(lambda x: torch.native_dropout(x, 0.3, True), mode, x) for mode in ("off", "all")
    )
    assert np.array_equal(want, got) and np.array_equal(want_mask, mask)
    scaled = x.double().cpu().numpy() / 0.7 * mask  # a rounding each of the factor and the product
    assert np.allclose(got, scaled, rtol=2 * TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 72, 768, 2048])
def test_embedding_backward(dtype, d: int) -> None:
    weight = torch.randn(50, d, device="cuda").to(dtype)
    indices = torch.randint(0, 50, (16, 65), device="cuda")
    dy = torch.randn(16, 65, d, device="cuda").to(dtype)

    check(embedding_step, dtype, weight, indices, dy)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [72, 768, 4096, 16384])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_numbers_without_end(kind: str, n: int, dtype: Any, value: float) -> None:
    """They stay in their row, and reach the gradients of the weights."""
    inputs = norm_inputs(dtype, 9, n)
    clean = results(norm_step(kind), "all", *inputs)
    inputs[0][4, n // 2] = value
    got = results(norm_step(kind), "all", *inputs)
    want = exact(norm_step(kind), *inputs)
    for which in (0, 1):  # y, dx
        same_rows(got[which], clean[which], but=4)
        assert np.array_equal(np.isnan(got[which][4]), np.isnan(want[which][4]))
    assert np.array_equal(np.isnan(got[2]), np.isnan(want[2]))  # the weight's


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [264, 4096, 16384])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax_of_numbers_without_end(function: Any, n: int, dtype: Any) -> None:
    """NaN and inf make their row NaN; -inf has the weight 0, and a row of nothing else is NaN."""
    x, dy = (torch.randn(6, n, device="cuda").to(dtype) for _ in range(2))
    clean = results(softmax_step(function), "all", x, dy)
    x[1, n - 1], x[2, 0], x[3, 5] = float("nan"), float("inf"), float("-inf")
    x[4] = float("-inf")
    y, dx = results(softmax_step(function), "all", x, dy)
    for row in (1, 2, 4):
        assert np.isnan(y[row]).any() and np.isnan(dx[row]).any()
    assert np.isnan(y[1]).all() and np.isnan(y[4]).all()
    assert y[3, 5] == (0.0 if function is torch.softmax else -np.inf)
    assert np.isfinite(np.delete(y[3], 5)).all()
    for row in (0, 5):
        assert np.array_equal(y[row], clean[0][row]) and np.array_equal(dx[row], clean[1][row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [100, 4096, 50304])
def test_cross_entropy_of_numbers_without_end(dtype: Any, n: int) -> None:
    """Each row has a loss of its own; a class of -inf that is not the target counts for nothing."""
    x, target = loss_inputs(dtype, 8, n)
    target[5] = 1
    clean = results(loss_step(reduction="none"), "all", x, target)
    x[1, n - 1], x[2, 0], x[5, n // 2] = float("nan"), float("inf"), float("-inf")
    x[3, 7] = float("nan")  # the ignored one
    loss, dx = results(loss_step(reduction="none"), "all", x, target)
    assert np.isnan(loss[[1, 2]]).all() and loss[3] == 0 and np.isfinite(loss[5])
    assert np.isnan(dx[1]).all() and np.isnan(dx[2]).any() and dx[5, n // 2] == 0
    want = exact(loss_step(reduction="none"), x[5:6], target[5:6])
    close([loss[5:6], dx[5:6]], want, dtype)
    for row in (0, 4, 6, 7):
        assert loss[row] == clean[0][row] and np.array_equal(dx[row], clean[1][row])


def shifted(t: Any) -> Any:
    """The same values, one element off the alignment of the memory."""
    return torch.empty(t.numel() + 1, device="cuda", dtype=t.dtype)[1:].view(t.shape).copy_(t)


def padded(t: Any) -> Any:
    """The same values with NaN after each row, in rows of an odd length."""
    whole = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), device="cuda").to(t.dtype)
    return whole[..., : t.shape[-1]].copy_(t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", [shifted, padded])
def test_views_that_do_not_fit(move: Any, dtype: Any) -> None:
    """The library's kernels take them, and what is copied may be CuTe's again."""
    m, n = 17, 768
    for kind in ("layer", "rms"):
        check(norm_step(kind), dtype, *(move(t) for t in norm_inputs(dtype, m, n)))
    x, dy = (torch.randn(m, n, device="cuda").to(dtype) for _ in range(2))
    for function, slack in ((torch.softmax, 1.0), (torch.log_softmax, 8.0)):
        check(softmax_step(function), dtype, move(x), move(dy), slack=slack)
    logits, target = loss_inputs(dtype, m, 1000)
    check(loss_step(0.1), dtype, move(logits), target)
    weight, grad = (torch.randn(*s, device="cuda").to(dtype) for s in ((50, 72), (9, 5, 72)))
    indices = torch.randint(0, 50, (9, 5), device="cuda")
    check(embedding_step, dtype, move(weight), indices, move(grad))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["layer_norm", "rms_norm", "softmax", "cross_entropy", "embedding"]
)
def test_in_captured_steps(name: str, dtype: Any, optimize: bool) -> None:
    """A replay of the recorded ops has their bits; passes stay within float64's bounds. New inputs
    are seen."""

    def inputs() -> list[Any]:
        if name.endswith("norm"):
            return norm_inputs(dtype, 33, 768)
        if name == "softmax":
            return [torch.randn(33, 1024, device="cuda").to(dtype) for _ in range(2)]
        if name == "cross_entropy":
            return loss_inputs(dtype, 33, 4096)
        table, grad = (torch.randn(*s, device="cuda").to(dtype) for s in ((50, 72), (16, 65, 72)))
        return [table, torch.randint(0, 50, (16, 65), device="cuda"), grad]

    step = {
        "layer_norm": norm_step("layer"), "rms_norm": norm_step("rms"),
        "softmax": softmax_step(torch.softmax), "cross_entropy": loss_step(0.1),
        "embedding": embedding_step,
    }[name]  # fmt: skip
    _cuda.set_cute_mode("all")
    captured = capture(step, optimize=optimize)
    for _ in range(4):
        given = inputs()
        got = [t.detach().double().cpu().numpy() for t in captured(*given)]
        close(got, exact(step, *given), dtype)
        if not optimize:
            for a, b in zip(got, results(step, "all", *given)):
                assert np.array_equal(a, b)
