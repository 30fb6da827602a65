"""Attention by CuTe kernels on a GPU against float64: every variant and length class, operands and
results between NaN, strange numbers, views that do not fit, captured steps. Skipped without a Hopper
GPU or a build with the DSL."""

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
from vibetensor.torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

if not _cuda.cute_compiled_by():
    pytest.skip("built without the CuTe DSL", allow_module_level=True)
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

FORWARD, BACKWARD = "attention_short_forward", "attention_short_backward"
VARIANTS = registry.load()[FORWARD].variants
ROUNDING = 2.0**-8  # of bfloat16
WIDTH = 64
# One row, around blocks of 64, whole and not; at most what a variant holds.
LENGTHS = (1, 63, 64, 65, 100, 127, 128, 129, 192, 200, 255, 256)
CASES = [(v, t) for v in VARIANTS for t in LENGTHS if t <= v.blocks * 64]


@pytest.fixture
def everywhere() -> Iterator[None]:
    """CuTe kernels wherever one applies."""
    before = _cuda.cute_mode()
    _cuda.set_cute_mode("all")
    yield
    _cuda.set_cute_mode(before)


def numpy(t: Any) -> np.ndarray:
    return t.detach().double().cpu().numpy()


class Between:
    """Tensors (B, H, T, 64) as slices of one that is NaN around them, laid out (B, T, H, 64)."""

    def __init__(self, count: int, b: int, h: int, t: int) -> None:
        nan = torch.full((b + 2, t + 2, count * (h + 1) + 1, WIDTH), float("nan"), device="cuda")
        self.whole = nan.to(torch.bfloat16)
        self.inner = [
            self.whole[1:-1, 1:-1, 1 + i * (h + 1) : 1 + i * (h + 1) + h].transpose(1, 2)
            for i in range(count)
        ]

    def around_is_untouched(self) -> bool:
        """Whether NaN is all there is outside the slices; they are NaN after this."""
        for x in self.inner:
            x.fill_(float("nan"))
        return bool(torch.isnan(self.whole).all())


def operands(count: int, b: int, h: int, t: int) -> Between:
    made = Between(count, b, h, t)
    for x in made.inner:
        x.copy_(torch.randn(b, h, t, WIDTH, device="cuda").to(torch.bfloat16))
    return made


def close(got: Any, want: np.ndarray) -> None:
    """Weights, slopes, the output that slopes are centred by and results are rounded once each."""
    error = np.abs(numpy(got) - want)
    assert error.max() <= 3 * ROUNDING * np.abs(want).max()
    assert np.sqrt((error**2).mean()) <= ROUNDING * np.sqrt((want**2).mean())


def run_forward(variant: Any, q: Any, k: Any, v: Any, scale: float) -> tuple[Between, Any]:
    """The output between NaN, NaN before, and the log-sum-exp."""
    b, h, t, _ = q.shape
    out = Between(1, b, h, t)
    lse = torch.full((b, h, t), float("nan"), device="cuda")
    device.launch(FORWARD, variant.name, q=q, k=k, v=v, o=out.inner[0], lse=lse, scale=scale)
    torch.cuda.synchronize()
    return out, lse


@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (23, 6)], ids=lambda h: f"{h[0]}x{h[1]}")
@pytest.mark.parametrize(
    ("variant", "t"), CASES, ids=[f"{variant.name}-{t}" for variant, t in CASES]
)
def test_against_float64(variant: Any, t: int, heads: tuple[int, int]) -> None:
    """The last has more heads than an H200 has multiprocessors."""
    b, h = heads
    torch.manual_seed(t)
    read = operands(4, b, h, t)
    q, k, v, grad = read.inner
    scale = 0.125
    host = {name: numpy(x) for name, x in zip("qkvg", read.inner)}
    told = {"scale": scale, "causal": variant.causal}
    want = registry.load()[FORWARD].reference(host["q"], host["k"], host["v"], **told)
    out, lse = run_forward(variant, q, k, v, scale)
    close(out.inner[0], want["o"])
    assert np.allclose(lse.double().cpu().numpy(), want["lse"], rtol=1e-5, atol=1e-4)

    again, lse_again = run_forward(variant, q, k, v, scale)
    assert np.array_equal(numpy(out.inner[0]), numpy(again.inner[0]))
    assert np.array_equal(lse.cpu().numpy(), lse_again.cpu().numpy())

    found = []
    for _ in range(2):
        made = Between(3, b, h, t)
        names = ("grad_q", "grad_k", "grad_v")
        device.launch(BACKWARD, variant.name, grad=grad, q=q, k=k, v=v, o=out.inner[0], lse=lse,
                      scale=scale, **dict(zip(names, made.inner)))  # fmt: skip
        torch.cuda.synchronize()
        found.append([numpy(x) for x in made.inner])
        slopes = registry.load()[BACKWARD].reference(host["g"], *(host[n] for n in "qkv"), **told)
        for name, x in zip(names, made.inner):
            if t == 1 and name != "grad_v":  # of one weight that is 1: what is left is rounding
                assert np.abs(numpy(x)).max() <= 8 * ROUNDING * np.abs(host["g"]).max()
            else:
                close(x, slopes[name])
        assert made.around_is_untouched()
    for a, b_ in zip(*found):
        assert np.array_equal(a, b_)
    for name, x in zip("qkvg", read.inner):  # what is read is as it was
        assert np.array_equal(host[name], numpy(x))
    assert out.around_is_untouched() and read.around_is_untouched()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("scale", [2.0**-6, 1.0, 40.0])
def test_scales(variant: Any, scale: float) -> None:
    """From weights that are all alike to one key for each query."""
    torch.manual_seed(1)
    q, k, v = operands(3, 2, 2, 100).inner
    want = registry.load()[FORWARD].reference(
        *map(numpy, (q, k, v)), scale=scale, causal=variant.causal
    )
    out, lse = run_forward(variant, q, k, v, scale)
    # Scores are float32 sums of 64 products, times the scale.
    slack = 3 * ROUNDING + 1e-5 * scale
    assert np.abs(numpy(out.inner[0]) - want["o"]).max() <= slack * np.abs(want["o"]).max()
    assert np.allclose(lse.double().cpu().numpy(), want["lse"], rtol=1e-5, atol=1e-4 * (1 + scale))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_numbers_without_end(variant: Any) -> None:
    """A NaN or an infinite score belongs to its query; a key that scores -inf has no weight."""
    torch.manual_seed(2)
    t, at = 100, 37
    rows = np.arange(t)
    q, k, v = operands(3, 1, 4, t).inner
    q.copy_(q.abs() + 0.5)  # so that the sign of an infinite key is its scores'
    clean = numpy(run_forward(variant, q, k, v, 0.125)[0].inner[0])
    q[0, 0, at, 5] = float("nan")
    k[0, 1, at, 5] = float("nan")
    k[0, 2, at, 5] = float("inf")
    k[0, 3, at, 5] = float("-inf")
    out, lse = run_forward(variant, q, k, v, 0.125)
    got, nan = numpy(out.inner[0]), np.isnan(numpy(out.inner[0]))
    seen = rows >= at if variant.causal else np.ones(t, bool)
    assert np.array_equal(nan[0, 0], np.repeat((rows == at)[:, None], WIDTH, 1))
    for head in (1, 2):
        assert np.array_equal(nan[0, head], np.repeat(seen[:, None], WIDTH, 1))
    assert np.array_equal(got[0, 0][rows != at], clean[0, 0][rows != at])
    host = [numpy(x)[:, 3:] for x in (q, k, v)]
    want = registry.load()[FORWARD].reference(*host, scale=0.125, causal=variant.causal)
    # The first query of a causal head sees itself alone, and `at` is not the first.
    assert np.isfinite(want["o"]).all()
    close(out.inner[0][:, 3:], want["o"])
    assert np.isnan(lse[0, 0].cpu().numpy()).sum() == 1

    # And in gradients a NaN stays in its own head.
    grad, *made = operands(4, 1, 4, t).inner
    device.launch(BACKWARD, variant.name, grad=grad, q=q, k=k, v=v, o=out.inner[0], lse=lse,
                  scale=0.125, **dict(zip(("grad_q", "grad_k", "grad_v"), made)))  # fmt: skip
    for x in made:
        assert np.isnan(numpy(x)[0, 0]).any()
    assert np.isfinite(numpy(made[2])[0, 3]).all()


def test_what_breaks_the_contract_is_refused() -> None:
    q, k, v = operands(3, 1, 2, 64).inner
    long = operands(3, 1, 2, 257).inner
    shifted = torch.zeros(2 * 64 * WIDTH + 1, device="cuda", dtype=torch.bfloat16)[1:]
    out, lse = torch.empty_like(v), torch.empty(1, 2, 64, device="cuda")
    with pytest.raises(ValueError):
        device.launch(FORWARD, VARIANTS[0].name, q=shifted.view(1, 2, 64, WIDTH), k=k, v=v, o=out,
                      lse=lse, scale=0.125)  # fmt: skip
    for variant in VARIANTS:
        with pytest.raises(ValueError):
            run_forward(variant, *long, 0.125)
    with pytest.raises(ValueError):  # 32 values a row
        narrow = [x[..., :32] for x in (q, k, v)]
        device.launch(FORWARD, VARIANTS[0].name, q=narrow[0], k=narrow[1], v=narrow[2],
                      o=out[..., :32], lse=lse, scale=0.125)  # fmt: skip


def laid_out(how: str, b: int, h: int, t: int) -> Any:
    """A (B, H, T, 64) tensor of random numbers in one of several layouts."""
    values = torch.randn(b, h, t, WIDTH, device="cuda").to(torch.bfloat16)
    if how == "heads inside":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "shifted":  # not aligned
        flat = torch.empty(values.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:]
        return flat.view(b, h, t, WIDTH).copy_(values)
    if how == "odd rows":  # strides that are no multiples of 8
        return torch.empty(b, h, t, WIDTH + 3, device="cuda", dtype=torch.bfloat16)[
            ..., :WIDTH
        ].copy_(values)
    if how == "turned":  # the last dimension is not dense
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "expanded":
        return values[:1].expand(b, h, t, WIDTH)
    return values


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("t", [1, 65, 256, 300])
@pytest.mark.parametrize(
    "how", ["dense", "heads inside", "shifted", "odd rows", "turned", "expanded"]
)
def test_the_op(how: str, t: int, causal: bool) -> None:
    """What does not fit a CuTe kernel goes to the library's: right either way."""
    torch.manual_seed(t)
    made = [laid_out(how, 2, 3, t) for _ in range(4)]
    leaves = [x.detach().requires_grad_() for x in made[:3]]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        grads = torch.autograd.grad(y, leaves, made[3])
    host = [numpy(x) for x in made]
    want = registry.load()[FORWARD].reference(*host[:3], scale=0.125, causal=causal)
    slopes = registry.load()[BACKWARD].reference(host[3], *host[:3], scale=0.125, causal=causal)
    close(y, want["o"])
    for x, name in zip(grads, ("grad_q", "grad_k", "grad_v")):
        if t == 1 and name != "grad_v":
            assert np.abs(numpy(x)).max() <= 8 * ROUNDING * np.abs(host[3]).max()
        else:
            close(x, slopes[name])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_in_a_captured_step(causal: bool) -> None:
    """A replay has the bits of the step outside, with new inputs too."""
    torch.manual_seed(3)
    b, h, t = 3, 4, 200

    def step(x: Any) -> tuple[Any, Any]:
        leaf = (x * 1).requires_grad_()
        q, k, v = (z.view(b, t, h, WIDTH).transpose(1, 2) for z in leaf.split(h * WIDTH, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        y.float().square().sum().backward()
        return y * 1, leaf.grad * 1

    captured = capture(step)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for _ in range(4):
            x = torch.randn(b, t, 3 * h * WIDTH, device="cuda").to(torch.bfloat16)
            expected = [numpy(r) for r in step(x)]
            for got, want in zip(captured(x), expected):
                assert np.array_equal(numpy(got), want)
