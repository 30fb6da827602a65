"""Sums left in parts, and many of them added up in one launch, against NumPy in float64: odd sizes,
unaligned memory, parts full of NaN before, and bit for bit what the finished sums are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor import _C
from vibetensor.graphs import capture

ops = _C._ops
HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(F32, BF16), (F32, HALF), (F32, F32), (BF16, BF16), (HALF, HALF), (F64, F64)]
# Rows by a warp, by a block, and on the plain kernels; fewer rows than parts, and more.
SHAPES = [(1, 4), (700, 100), (3001, 384), (1000, 768), (129, 772), (200, 2048), (9, 6912), (40, 7),
          (5, 20000), (1000, 9)]  # fmt: skip


def _made(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> torch.Tensor:
    n = int(np.prod(shape))
    return torch.randn(n + offset, device="cuda").to(dtype)[offset:].view(shape)


def _f64(t: torch.Tensor) -> np.ndarray:
    return t.double().cpu().numpy()


def _poison(bytes_: int) -> None:
    """What is allocated next is full of NaN."""
    torch.full((bytes_ // 4 + 1,), float("nan"), device="cuda")


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def _is_streamed(n: int, dtype: Any, offset: int) -> bool:
    return dtype != F64 and n % 4 == 0 and n <= 16384 and not offset


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("parts", ["as many as multiprocessors", 1, 700])
@pytest.mark.parametrize("offset", [0, 1])
def test_norms(shape: tuple, dtypes: tuple, centred: bool, parts: Any, offset: int) -> None:
    torch.manual_seed(2)
    (m, n), (wide, narrow) = shape, dtypes
    enough = parts != 1
    if isinstance(parts, str):
        parts = min(m, _multiprocessors())
    x, r, dy, w = (_made(s, d, offset) for s, d in ((shape, wide), (shape, wide), (shape, narrow), ((n,), wide)))  # fmt: skip
    low = narrow if wide != narrow else None
    if centred:
        _, mean, rstd = ops.native_layer_norm(x, [n], w, w, 1e-5)
        args = (dy, r, x, [n], mean, rstd, w, w, low, [], True)
        run, sums = ops._residual_layer_norm_backward, (1, 2, 4)
    else:
        _, rstd = ops._rms_norm(x, [n], w, 1e-5)
        args = (dy, r, x, [n], rstd, w, low, [], True)
        run, sums = ops._residual_rms_norm_backward, (1, 3)
    want = run(*args)
    _poison(3 * parts * n * 8)
    made = run(*args, parts)
    for i, (a, b) in enumerate(zip(made, want)):
        if i not in sums:
            assert (a is None and b is None) or bool((a == b).all())
    for i in sums:
        assert made[i].shape == (parts, n) and not bool(made[i].isnan().any())
    targets = [torch.full_like(want[i], float("nan")) for i in sums]
    ops._add_parts_(targets, [made[i] for i in sums])
    for mine, i in zip(targets, sums):
        if enough and _is_streamed(n, wide, offset):
            assert bool((mine == want[i]).all())  # the same order
        exact = _f64(made[i]).sum(0)
        scale = np.abs(_f64(made[i])).sum(0).max() + 1e-30
        eps = max(float(torch.finfo(mine.dtype).eps), 1e-6 if wide != F64 else 1e-15)
        assert np.abs(_f64(mine) - exact).max() <= 2 * eps * scale
        assert np.abs(_f64(want[i]) - exact).max() <= 4 * max(
            eps, 3e-6 if wide != F64 else 0
        ) * max(scale, np.abs(exact).max())


@pytest.mark.parametrize(
    "shape",
    [(64, 8), (1000, 384), (33, 7), (4099, 2304), (3, 16384, 1536), (6, 513, 65), (2, 100, 4104), (12, 70, 768)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16, HALF, F64], ids=str)
@pytest.mark.parametrize("parts", [1, 22, 264])
@pytest.mark.parametrize("layout", ["dense", "unaligned", "apart", "transposed"])
def test_rows(shape: tuple, dtype: Any, parts: int, layout: str) -> None:
    torch.manual_seed(3)
    if layout == "apart":
        x = _made((*shape[:-1], shape[-1] + 8), dtype)[..., : shape[-1]]
    elif layout == "transposed":
        x = _made((*shape[:-2], shape[-1], shape[-2]), dtype).transpose(-1, -2)
    else:
        x = _made(shape, dtype, int(layout == "unaligned"))
    batch = shape[0] if len(shape) == 3 else 1
    _poison(batch * parts * shape[-1] * 8)
    made = ops._row_parts(x, parts)
    assert made.shape == (*shape[:-2], parts, shape[-1])
    assert bool((made == ops._row_parts(x, parts)).all())  # in a fixed order
    want = _f64(x).sum(-2).reshape(batch, shape[-1])
    size = np.abs(_f64(x)).sum(-2).max()
    eps = 1e-15 if dtype == F64 else 1e-6
    rows = made.reshape(batch, parts, shape[-1])
    assert np.abs(_f64(rows).sum(1) - want).max() <= 4 * eps * size
    targets = list(torch.full((batch, shape[-1]), float("nan"), device="cuda").to(dtype))
    ops._add_parts_(targets, list(rows))
    for mine, exact in zip(targets, want):
        bound = 4 * (eps * size + float(torch.finfo(dtype).eps) * np.abs(exact).max())
        assert np.abs(_f64(mine) - exact).max() <= bound


@pytest.mark.parametrize("count", [1, 191, 192, 193, 600])
def test_one_launch_for_many(count: int) -> None:
    torch.manual_seed(4)
    parts, targets, kept = [], [], []
    for i in range(count):
        rows, n = (i * 7) % 141, (i * 37) % 400
        wide = F64 if i % 7 == 6 else F32
        parts.append(torch.randn(rows, n, device="cuda").to(wide))
        around = torch.full((n + 2,), 7.0, device="cuda").to((F32, BF16, HALF, F64)[i % 4])
        kept.append(around)
        targets.append(around[1 : n + 1])
    ops._add_parts_(targets, parts)
    for part, made, around in zip(parts, targets, kept):
        want = _f64(part).sum(0)
        eps = max(float(torch.finfo(made.dtype).eps), float(torch.finfo(part.dtype).eps))
        scale = np.abs(_f64(part)).sum(0).max(initial=1.0)
        assert np.abs(_f64(made) - want).max(initial=0) <= 8 * eps * scale
        assert around[0].item() == around[-1].item() == 7  # nothing beside it is written


def test_an_even_batch_is_one_launch() -> None:
    parts = [torch.randn(132, 768, device="cuda") for _ in range(75)]
    targets = [torch.zeros(768, device="cuda") for _ in range(75)]
    step = capture(lambda: ops._add_parts_(targets, parts))
    for _ in range(3):
        step()
    assert step.variants[0].lowered.program.nodes() == [1]


def _net(layers: int, width: int) -> Any:
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    return nn.Sequential(*(Block() for _ in range(layers)), nn.LayerNorm(width)).cuda()


@pytest.mark.parametrize(("rows", "width"), [(4096, 256), (3000, 136)])
def test_captured_steps(rows: int, width: int) -> None:
    """Six layers: the products for weights' gradients wait for one another, second stages are one
    launch, and three steps train as eager ones do."""
    torch.manual_seed(0)
    x, y = (torch.randn(rows, width, device="cuda") for _ in range(2))

    def made() -> Any:
        torch.manual_seed(1)
        net = _net(6, width)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = F.mse_loss(net(x).float(), y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            return loss, norm

        return step, net

    eager, one = made()
    plain, two = made()
    step = capture(plain)
    for _ in range(5):
        expected, found = eager(x, y), step(x, y)
        for a, b in zip(found, expected):
            assert a.item() == pytest.approx(b.item(), rel=1e-2)
    for a, b in zip(two.parameters(), one.parameters()):
        assert float((a - b).abs().max()) <= 5e-3
        g, h = a.grad, b.grad
        assert float((g - h).abs().max()) <= 2e-2 * float(h.abs().max()) + 1e-6
    names = [op.name for op in step.tape().ops if not op.is_view]
    nodes = step.variants[0].lowered.program.nodes()
    assert names.count("bmm") == 2 and names.count("_add_parts_") == 1
    assert nodes[names.index("_add_parts_")] == 1
    # Twice the same step gives the same bits.
    again, three = made()
    other = capture(again)
    for _ in range(5):
        other(x, y)
    assert all(bool((a == b).all()) for a, b in zip(two.parameters(), three.parameters()))
