"""8-bit floats on the device: conversions equal the CPU's bit by bit, moves, products by cuBLASLt."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.float8 import convert_to_float8_training

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BOTH = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3fn", "e5m2"])
WIDE = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool]
has_products = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="products of 8-bit floats need compute capability 8.9",
)


def bits(t: torch.Tensor) -> np.ndarray:
    """The bytes, with every NaN as the positive one: a device drops the sign of float16's."""
    t = t.cpu().contiguous().clone()
    if t.is_floating_point():
        wide = t.float()
        t[wide.isnan()] = wide.new_tensor(float("nan")).to(t.dtype)
    return t.view(torch.uint8).numpy()


def samples() -> torch.Tensor:
    rng = np.random.default_rng(1)
    any_bits = rng.integers(0, 2**32, 40000, dtype=np.uint32).view(np.float32)
    usual = rng.standard_normal(40001) * np.exp2(rng.uniform(-20, 17, 40001))
    edges = [448, 464, 465, 57344, 61439, 61440, np.inf, np.nan, 0.0, 2**-10, 2**-17]
    x = np.concatenate([any_bits, usual.astype(np.float32), np.float32(edges)])
    return torch.from_numpy(np.concatenate([x, -x]))


@BOTH
def test_conversions_equal_the_cpu(dtype: torch.dtype) -> None:
    x = samples()
    for source in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        host = x.to(source)
        device = host.cuda()
        expected = bits(host.to(dtype))
        np.testing.assert_array_equal(bits(device.to(dtype)), expected, err_msg=str(source))
        np.testing.assert_array_equal(bits(device[1::3].to(dtype)), expected[1::3])
        into = torch.empty(len(x), dtype=dtype, device="cuda").copy_(device)
        np.testing.assert_array_equal(bits(into), expected)
        np.testing.assert_array_equal(
            bits(host.cuda().copy_(into)), bits(host.to(dtype).to(source))
        )
    matrix = x[:65536].reshape(256, 256)
    turned = torch.empty(256, 256, dtype=dtype, device="cuda").copy_(matrix.cuda().t())
    np.testing.assert_array_equal(bits(turned), bits(matrix.to(dtype)).T)
    integers = torch.arange(-500, 500)
    np.testing.assert_array_equal(bits(integers.cuda().to(dtype)), bits(integers.to(dtype)))

    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for target in WIDE[:4]:
        np.testing.assert_array_equal(bits(codes.cuda().to(target)), bits(codes.to(target)))
    finite = codes[codes.float().isfinite()]
    for target in (torch.int32, torch.bool):
        np.testing.assert_array_equal(bits(finite.cuda().to(target)), bits(finite.to(target)))
    other = E5M2 if dtype is E4M3 else E4M3
    np.testing.assert_array_equal(bits(codes.cuda().to(other)), bits(codes.to(other)))


@BOTH
def test_making_moving_and_comparing(dtype: torch.dtype) -> None:
    for value in (0, 1, -2.5, 0.3, torch.finfo(dtype).max, float("nan")):
        for shape in ((7,), (3, 5), ()):
            expected = bits(torch.full(shape, value, dtype=dtype))
            np.testing.assert_array_equal(
                bits(torch.full(shape, value, dtype=dtype, device="cuda")), expected
            )
    with pytest.raises(RuntimeError, match="cannot be converted to type Float8.*without overflow"):
        torch.full((7,), 1e9, dtype=dtype, device="cuda")
    x = torch.zeros(4, 6, dtype=dtype, device="cuda")
    x[1:3, ::2].fill_(-0.3)
    x[0] = 1.0
    expected = torch.zeros(4, 6, dtype=dtype)
    expected[1:3, ::2].fill_(-0.3)
    expected[0] = 1.0
    np.testing.assert_array_equal(bits(x), bits(expected))
    host = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    device, index = host.cuda(), torch.tensor([3, 0, 15])
    moves = [
        lambda t, i: t.t().contiguous(), lambda t, i: t[2:9, ::3].contiguous(), lambda t, i: torch.cat([t, t[:3]]),
        lambda t, i: t[i], lambda t, i: t.index_select(1, i), lambda t, i: t.gather(1, i.expand(16, 3)),
        lambda t, i: t.flip(0), lambda t, i: t.tril(), lambda t, i: t.repeat(2, 3),
        lambda t, i: t.clone().index_copy_(0, i, t[:3]), lambda t, i: t.clone().scatter_(1, i[None], t[:1, :3]),
        lambda t, i: torch.nn.functional.embedding(i, t), lambda t, i: torch.where(t == 1.0, t, t.flip(1)),
    ]  # fmt: skip
    for move in moves:
        np.testing.assert_array_equal(bits(move(device, index.cuda())), bits(move(host, index)))
    np.testing.assert_array_equal(
        (device != device.flip(0)).cpu().numpy(), (host != host.flip(0)).numpy()
    )
    assert repr(device).split(", device")[0] in repr(host).replace(", dtype", ", device=, dtype")
    with pytest.raises(NotImplementedError, match="not implemented for 'Float8"):
        device + device


@has_products
@pytest.mark.parametrize("pair", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)], ids=str)
@pytest.mark.parametrize(
    "size", [(32, 64, 48), (256, 512, 128), (17, 16, 16), (1, 32, 16), (7, 13, 5), (3, 0, 4), (0, 16, 16)], ids=str
)  # fmt: skip
def test_products(size: tuple[int, int, int], pair: tuple[torch.dtype, torch.dtype]) -> None:
    m, k, n = size
    rng = np.random.default_rng(m + k + n)
    a = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)).to(pair[0])
    b = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)).to(pair[1]).t()
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    one = [torch.tensor(0.5), torch.tensor([1.7])]
    rows = [torch.from_numpy(rng.uniform(0.1, 2, s).astype(np.float32)) for s in ((m, 1), (1, n))]
    for scales in (one, rows):
        for out in (torch.float32, torch.bfloat16, torch.float16, E4M3, E5M2):
            for added in (None, bias, bias.to(torch.bfloat16)):
                last = torch.tensor(2.0)
                expected = (
                    torch._scaled_mm(a, b, *scales, added, last, torch.float32).double().numpy()
                )
                if out in (E4M3, E5M2):
                    expected = np.clip(expected / 2, torch.finfo(out).min, torch.finfo(out).max)
                for left in (a.cuda(), a.cuda().t().contiguous().t()):
                    for right in (b.cuda(), b.cuda().contiguous()):
                        got = torch._scaled_mm(
                            left, right, *(s.cuda() for s in scales),
                            None if added is None else added.cuda(), last.cuda(), out,
                        )  # fmt: skip
                        assert got.dtype is out and got.is_cuda and tuple(got.shape) == (m, n)
                        # The sums of tensor cores keep about 13 bits of the largest term.
                        terms = np.abs(a.double().numpy()) @ np.abs(b.double().numpy())
                        step = {
                            torch.float32: 0,
                            torch.bfloat16: 2**-8,
                            torch.float16: 2**-11,
                            E4M3: 2**-4,
                            E5M2: 2**-3,
                        }
                        bound = (
                            step[out] * np.abs(expected)
                            + 2e-3 * terms
                            + 2**-10
                            + (bias.abs().max().item() * 2**-8 if n else 0)
                        )
                        assert (np.abs(got.double().cpu().numpy() - expected) <= bound).all()


@has_products
def test_fast_sums_and_errors() -> None:
    a, b = torch.ones(32, 64).to(E4M3).cuda(), torch.ones(48, 64).to(E4M3).cuda().t()
    one = torch.tensor(1.0, device="cuda")
    for fast in (False, True):
        got = torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)
        assert (got == 64).all().item()
    with pytest.raises(RuntimeError, match="same device"):
        torch._scaled_mm(a, b, one.cpu(), one)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9), reason="has them"
)
def test_older_devices_say_so() -> None:
    a, one = torch.ones(16, 16).to(E4M3).cuda(), torch.tensor(1.0, device="cuda")
    with pytest.raises(RuntimeError, match="compute capability 8.9"):
        torch._scaled_mm(a, a.t(), one, one)


@has_products
def test_training_captured_equals_eager() -> None:
    def training():
        torch.manual_seed(4)
        model = torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)
        ).cuda()
        convert_to_float8_training(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

        def step(x, y):
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return model, step

    (first, eager), (second, step) = training(), training()
    captured = torch.cuda.capture(step)
    torch.manual_seed(1)
    x, y = torch.randn(64, 32, device="cuda"), torch.randn(64, 16, device="cuda")
    losses = []
    for _ in range(20):
        losses.append(eager(x, y).item())
        assert captured(x, y).item() == pytest.approx(losses[-1], rel=1e-3)
    assert losses[-1] < losses[0]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        np.testing.assert_allclose(a.detach().cpu().numpy(), b.detach().cpu().numpy(), atol=1e-3)
