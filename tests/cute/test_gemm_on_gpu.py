"""Every compiled matrix product on a GPU against float64: odd sizes, batches, padded rows, poisoned
results. Skipped without a Hopper GPU or a build with the DSL."""

from __future__ import annotations

import numpy as np
import pytest

_cuda = pytest.importorskip("vibetensor._cuda", reason="this build has no CUDA")

import vibetensor.torch as torch  # noqa: E402
from vibetensor import _C  # noqa: E402
from vibetensor.cute_kernels import device, registry  # noqa: E402
from vibetensor.cute_kernels.gemm import epilogue as math  # noqa: E402

if not _cuda.cute_compiled_by():
    pytest.skip("built without the CuTe DSL", allow_module_level=True)
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

CASES = [(k, v) for k in registry.load().values() if k.family == "gemm" for v in k.variants]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Of the smallest numbers of a binade.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Of gelu's tail, relative (epilogue.LOWER_TAIL): of gelu at most that, of its slope half of it in all.
TAIL = {torch.bfloat16: 4.4e-4, torch.float16: 3e-6}
# m, n, k: one tile and less, several with ragged edges, more tiles than blocks, a long sum.
SIZES = [(8, 8, 8), (136, 264, 200), (1000, 520, 64), (4104, 1544, 392), (256, 128, 4096)]


def padded(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers with NaN in the rows' padding."""
    whole = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), device="cuda")
    whole = whole.to(dtype)
    whole[..., : shape[-1]] = torch.randn(*shape, device="cuda").to(dtype)
    return whole[..., : shape[-1]]


def numpy(t: torch.Tensor) -> np.ndarray:
    return t.float().cpu().numpy().astype(np.float64)


def sums_slack(k: int) -> float:
    """How far float32 sums of k products of normal numbers may be off: tensor cores cut off what they add
    16 products at a time to, half a unit of sums that are k**0.5 large; and what other roundings make."""
    return k**0.5 * (8e-6 + k / 16 * 2.0**-24) + 1e-6


def close(
    got: torch.Tensor, want: np.ndarray, slack: float | np.ndarray, roundings: int = 1
) -> None:
    half = HALF_ULP[got.dtype]
    got = numpy(got)
    assert not np.isnan(got).any()
    wrong = np.abs(got - want) - (1.05 * roundings * half * np.abs(want) + slack)
    assert wrong.max() <= 0, f"off by {wrong.max()} more than it may be, {(wrong > 0).sum()} times"


def without_epilogue(kernel: registry.Kernel, given: dict[str, np.ndarray]) -> np.ndarray:
    """The product alone, by the kernel of the same layout that has no epilogue."""
    plain = registry.load()[f"gemm_{kernel.name.rpartition('_')[2]}"]
    return plain.reference(a=given["a"], b=given["b"])["d"]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kernel, variant", CASES, ids=[f"{k.name}-{v.name}" for k, v in CASES])
def test_product(kernel, variant, size) -> None:
    m, n, k = size
    names = [t.name for t in kernel.contract(variant).tensors]
    shapes = {t.name: t.shape for t in kernel.contract(variant).tensors}
    for l in (1,) if "sums" in names or m > 1000 else (1, 3):
        torch.manual_seed(m + l)
        extents = {"l": l, "m": m, "n": n, "k": k, "parts": -(-m // 128) * 4}
        dtype = DTYPES[variant.dtype]
        given = {
            x: padded(*(extents[e] for e in shapes[x]), dtype=dtype) for x in names if x != "sums"
        }
        written = [t.name for t in kernel.contract(variant).tensors if t.access == "write"]
        for name in written:
            if name != "sums":
                given[name].fill_(float("nan"))
        if "sums" in names:
            given["sums"] = torch.full((extents["parts"], n), float("nan"), device="cuda")
        before = {x: numpy(t) for x, t in given.items() if x not in written}
        device.launch(kernel.name, variant.name, **given, max_blocks=132)
        torch.cuda.synchronize()
        want = kernel.reference(**before)
        slack = sums_slack(k)
        tail = TAIL[dtype] if "gelu" in kernel.name and "tanh" not in kernel.name else 0.0
        inexact: float | np.ndarray = 0.0
        if "z" in written:
            close(given["z"], want["z"], slack)
            activation = "gelu_tanh" if "tanh" in kernel.name else "gelu"
            want["d"] = math.reference_activation(numpy(given["z"]), activation)
            inexact = tail * np.abs(want["d"])
        elif tail:
            inexact = tail / 2 * np.abs(without_epilogue(kernel, before))
        close(given["d"], want["d"], slack + inexact)
        if "y" in written:
            close(given["y"], want["y"], 1e-6 + tail * np.abs(want["y"]))
        if "sums" in names:
            sums = given["sums"].cpu().numpy().sum(0)
            each = slack + np.max(inexact)
            assert np.allclose(sums, want["sums"], rtol=1e-5, atol=each * m**0.5 * 4)
        for name in (*before, *written):  # the padding is as it was
            if name != "sums" and given[name].dim() == 3:
                whole = given[name].as_strided((l, given[name].shape[1], 8),
                                               given[name].stride(), given[name].shape[-1])  # fmt: skip
                assert bool(torch.isnan(whole).all())


def test_adds_in_place() -> None:
    m, n, k = 264, 136, 72
    for name in ("gemm_add_tn", "gemm_add_nn", "gemm_add_nt"):
        kernel = registry.load()[name]
        for variant in kernel.variants:
            torch.manual_seed(1)
            sizes = {"l": 1, "m": m, "n": n, "k": k}
            shapes = {t.name: t.shape for t in kernel.contract(variant).tensors}
            dtype = DTYPES[variant.dtype]
            a, b, c = (padded(*(sizes[e] for e in shapes[x]), dtype=dtype) for x in "abc")
            want = kernel.reference(a=numpy(a), b=numpy(b), c=numpy(c))["d"]
            device.launch(name, variant.name, a=a, b=b, c=c, d=c, max_blocks=132)
            close(c, want, 2e-5)


def test_products_are_the_same_each_time() -> None:
    numbers = [torch.randn(1, 512, 512, device="cuda") for _ in range(2)]
    for kernel, variant in CASES:
        if [t.name for t in kernel.contract(variant).tensors] != ["a", "b", "d"]:
            continue
        a, b = (x.to(DTYPES[variant.dtype]) for x in numbers)
        results = []
        for _ in range(3):
            d = torch.full((1, 512, 512), float("nan"), device="cuda").to(a.dtype)
            device.launch(kernel.name, variant.name, a=a, b=b, d=d, max_blocks=132)
            results.append(numpy(d))
        assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.fixture
def everywhere():
    """CuTe kernels wherever one applies."""
    before = _cuda.cute_mode()
    _cuda.set_cute_mode("all")
    yield
    _cuda.set_cute_mode(before)


def operand(rows: int, columns: int, how: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A matrix in memory of its own: dense, its transpose dense, rows apart, or not aligned."""
    if how == "turned":
        return torch.randn(columns, rows, device="cuda").to(dtype).t()
    if how == "apart":
        return padded(rows, columns, dtype=dtype)
    if how == "shifted":
        flat = torch.randn(rows * columns + 1, device="cuda").to(dtype)
        return flat[1:].view(rows, columns)
    return torch.randn(rows, columns, device="cuda").to(dtype)


HOW = ("dense", "turned", "apart", "shifted")


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("right", HOW)
@pytest.mark.parametrize("left", HOW)
@pytest.mark.parametrize("size", [(264, 136, 72), (129, 65, 200), (512, 384, 33), (1, 256, 128)])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_ops(dtype, size, left: str, right: str) -> None:
    m, n, k = size
    torch.manual_seed(3)
    a, b = operand(m, k, left, dtype), operand(k, n, right, dtype)
    bias, c = operand(1, n, "dense", dtype)[0], operand(m, n, "dense", dtype)
    want, slack = numpy(a) @ numpy(b), sums_slack(k)
    # What does not fit a CuTe kernel goes to the library, which rounds parts of a sum.
    largest = 2 * HALF_ULP[dtype] * float(np.abs(want).max())
    for got, expected in (
        (torch.mm(a, b), want),
        (torch.bmm(a.expand(3, m, k), b.expand(3, k, n))[2], want),
        (torch.nn.functional.linear(a, b.t(), bias), want + numpy(bias)),
        (torch.addmm(c, a, b), want + numpy(c)),
        (torch.addmm(c, a, b, beta=0.5, alpha=2.0), 2 * want + 0.5 * numpy(c)),
        (c.clone().addmm_(a, b), want + numpy(c)),
    ):
        close(got, expected, slack + largest, 2)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("left", HOW)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", [(264, 136, 72), (129, 65, 200), (3, 256, 128)])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_activation_ops(dtype, size, activation: str, left: str) -> None:
    m, n, k = size
    half = HALF_ULP[dtype]
    torch.manual_seed(4)
    x, w, bias = (
        operand(m, k, left, dtype),
        operand(n, k, "dense", dtype),
        operand(1, n, "dense", dtype)[0],
    )
    slack = sums_slack(k)
    tail = TAIL[dtype] if activation == "gelu" else 0.0
    for b in (bias, None):
        y, z = _C._ops._linear_activation(x, w, b, activation, True)
        linear = numpy(x) @ numpy(w).T + (0 if b is None else numpy(b))
        close(z, linear, slack + 2 * half * float(np.abs(linear).max()), 2)
        # The library's own epilogue takes the tanh of sums that are not rounded.
        exact = activation == "gelu" or left in ("dense", "apart")
        loose = 0 if exact else 2 * half * float(np.abs(linear).max())
        want = math.reference_activation(numpy(z), activation)
        close(y, want, 1e-6 + loose + tail * np.abs(want))
    grad, back = operand(m, k, left, dtype), operand(k, n, "dense", dtype)
    slope = math.reference_slope(numpy(z), activation)
    dz, sums, _ = _C._ops._mm_activation_backward(grad, back, z, activation, True)
    assert bool((_C._ops._mm_activation_backward(grad, back, z, activation, False)[0] == dz).all())
    for wanted in (True, False):
        same, _, again = _C._ops._mm_activation_backward(grad, back, z, activation, wanted, True)
        assert bool((same == dz).all())
        want = math.reference_activation(numpy(z), activation)
        close(again, want, 1e-6 + tail * np.abs(want))
    product = numpy(grad) @ numpy(back)
    # Without a kernel of its own the product is rounded once more.
    slack += 2 * half * float(np.abs(product).max())
    want = (product * slope).sum(0)
    # Each rounded, or what they are made of; then the sum.
    loose = m**0.5 * slack + 1.05 * half * np.abs(want)
    assert (np.abs(numpy(sums) - want) <= loose).all()
    dz = numpy(dz)
    assert (np.abs(dz - product * slope) <= 2.1 * half * np.abs(product * slope) + slack).all()


def test_slope_and_gelu_far_out() -> None:
    """The activation beside the slope is the forward's, bit for bit, also of what is no number."""
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.9, -5.9, 6.1, -6.1, 60.0, -60.0, 3e38, -3e38,
                           float("inf"), float("nan"), -1.0, 1.0], device="cuda")  # fmt: skip
    for kernel, variant in ((k, v) for k, v in CASES if k.name == "gemm_slope_gelu_again_nn"):
        dtype = DTYPES[variant.dtype]
        z = values.to(dtype).expand(1, 16, 16).contiguous()
        x, w = (torch.ones(1, 16, 16, device="cuda", dtype=dtype) for _ in range(2))
        dz, y, saved, forward = (torch.empty_like(x) for _ in range(4))
        sums = torch.empty(4, 16, device="cuda")
        device.launch(
            kernel.name, variant.name, a=x, b=w, z=z, y=y, d=dz, sums=sums, max_blocks=132
        )
        device.launch("gemm_bias_gelu_tn", f"{variant.dtype}_{variant.dtype}_128x128x5_turns",
                      a=x * 0, b=w, bias=z[0, 0], z=saved, d=forward, max_blocks=132)  # fmt: skip
        assert np.array_equal(numpy(y), numpy(forward), equal_nan=True)
        finite = [i for i in range(16) if abs(float(values[i])) < 100]
        want = 16 * math.reference_slope(numpy(z)[..., finite], "gelu")
        assert np.allclose(numpy(dz)[..., finite], want, rtol=2 * HALF_ULP[dtype], atol=1e-4)


def test_gelu_far_out() -> None:
    """Zeros, infinities, NaN and the tails, as the identity's product."""
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.9, -5.9, 6.1, -6.1, 60.0, -60.0, 3e38, -3e38,
                           float("inf"), float("nan"), -1.0, 1.0], device="cuda")  # fmt: skip
    for kernel, variant in ((k, v) for k, v in CASES if k.name == "gemm_bias_gelu_tn"):
        dtype = DTYPES[variant.dtype]
        z = values.to(dtype).expand(16, 16).contiguous()
        x, w = (torch.zeros(1, 16, 16, device="cuda", dtype=dtype) for _ in range(2))
        got, saved = torch.empty_like(x), torch.empty_like(x)
        device.launch(kernel.name, variant.name, a=x, b=w, bias=z[0], z=saved, d=got,
                      max_blocks=132)  # fmt: skip
        want = torch.nn.functional.gelu(z.double()).cpu().numpy()
        want[numpy(z) == -np.inf] = 0  # the limit, where the formula gives a NaN
        assert np.array_equal(numpy(saved[0]), numpy(z), equal_nan=True)
        rtol = HALF_ULP[dtype] + TAIL[dtype]
        assert np.allclose(numpy(got[0]), want, rtol=rtol, atol=5e-8, equal_nan=True)
