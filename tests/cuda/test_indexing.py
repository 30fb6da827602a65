"""Indexing, gathering and scattering on the device against the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch

RNG = np.random.default_rng(6)


def same(there: torch.Tensor, here: torch.Tensor) -> None:
    assert there.is_cuda and there.shape == here.shape and there.dtype == here.dtype
    if here.dtype.is_floating_point:
        step = 2e-2 if here.dtype in (torch.float16, torch.bfloat16) else 1e-5
        np.testing.assert_allclose(
            there.double().cpu().numpy(), here.double().numpy(), rtol=step, atol=step
        )
    else:
        assert there.cpu().tolist() == here.tolist()


def floats(*shape: int) -> torch.Tensor:
    return torch.tensor(RNG.standard_normal(shape).astype("float32"))


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.tensor(RNG.integers(0, high, shape))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"), [((50,), 0), ((40, 64), 0), ((40, 63), 1), ((5, 9, 7), 1)]
)
def test_slices_by_index(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x = (floats(*shape) * 3).to(dtype)
    index = ints(shape[dim], 1000)  # many repeats: sums and the last write show the order
    same(x.cuda().index_select(dim, index.cuda()), x.index_select(dim, index))
    same(x.cuda().index_select(dim, index.int().cuda()), x.index_select(dim, index))
    sizes = list(shape)
    sizes[dim] = 1000
    source = (floats(*sizes) / 16).to(dtype)
    wide = torch.float64 if dtype.is_floating_point else dtype
    got = x.cuda().index_add_(dim, index.cuda(), source.cuda(), alpha=2)
    same(got, x.to(wide).index_add_(dim, index, source.to(wide), alpha=2).to(dtype))
    same(
        x.cuda().index_copy_(dim, index.cuda(), source.cuda()),
        x.clone().index_copy_(dim, index, source),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_elements_by_index(dim: int, dtype: torch.dtype) -> None:
    x = (floats(6, 7, 8) * 3).to(dtype)
    index = ints(x.shape[dim], 5, 6, 7)
    src = (floats(6, 7, 9) * 3).to(dtype)
    a, b, c = x.cuda(), index.cuda(), src.cuda()
    same(a.gather(dim, b), x.gather(dim, index))
    same(a.scatter(dim, b, c), x.scatter(dim, index, src))
    same(a.scatter(dim, b, 2), x.scatter(dim, index, 2))
    same(a.scatter_add(dim, b, c), x.scatter_add(dim, index, src))
    for reduce in ("sum", "prod", "amax", "amin", "mean"):
        for include_self in (True, False):
            same(
                a.scatter_reduce(dim, b, c, reduce, include_self=include_self),
                x.scatter_reduce(dim, index, src, reduce, include_self=include_self),
            )


def test_few_elements_into_many_places() -> None:
    x, index, src = floats(200, 1000), ints(1000, 200, 2), floats(200, 2)
    same(x.cuda().scatter(1, index.cuda(), src.cuda()), x.scatter(1, index, src))


def test_transposed_targets() -> None:
    x, index = floats(30, 20), ints(20, 50)
    source = floats(50, 30)
    there = x.cuda()
    there.t().index_add_(0, index.cuda(), source.cuda())
    same(there, (x.t().clone().index_add_(0, index, source)).t())


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "n"), [(10, 8, 3000), (500, 768, 700), (50, 7, 1), (9, 33, 0)]
)
def test_gradient_of_embedding(
    rows: int, width: int, n: int, by_frequency: bool, padding_idx: int | None
) -> None:
    table, index, grad = floats(rows, width), ints(rows, n), floats(n, width)
    results = []
    for device in ("cpu", "cuda"):
        weight = table.clone().to(device).requires_grad_()
        out = torch.nn.functional.embedding(
            index.to(device), weight, padding_idx, scale_grad_by_freq=by_frequency
        )
        out.backward(grad.to(device))
        results.append((out.detach(), weight.grad))
    same(results[1][0], results[0][0])
    np.testing.assert_allclose(
        results[1][1].cpu().numpy(), results[0][1].numpy(), rtol=1e-5, atol=2e-5
    )


def test_sums_do_not_depend_on_timing() -> None:
    index, grad = ints(7, 20000).cuda(), floats(20000, 96).cuda()
    zero = torch.zeros(7, 96, device="cuda")
    first = zero.index_add(0, index, grad)
    assert all(torch.equal(zero.index_add(0, index, grad), first) for _ in range(4))


@pytest.mark.parametrize("shape", [(0,), (1,), (100003,), (50, 41), (3, 4, 5, 6), ()])
def test_nonzero(shape: tuple[int, ...]) -> None:
    mask = torch.tensor(RNG.random(shape) < 0.3)
    same(mask.cuda().nonzero(), mask.nonzero())
    values = torch.tensor(RNG.standard_normal(shape).astype("float32"))
    same(values.cuda().masked_select(mask.cuda()), values.masked_select(mask))
    same(values.cuda()[mask.cuda()], values[mask])


def test_indices_in_host_memory_follow_the_tensor() -> None:
    x, index, mask = floats(6, 5), ints(6, 4), torch.tensor([True, False, True, True, False, True])
    there = x.cuda()
    same(there[index], x[index])
    same(there[[0, -1], [1, -2]], x[[0, -1], [1, -2]])
    same(there[mask], x[mask])
    there[index] = 1.5
    there[mask, 0] = torch.tensor(2.0)
    x[index] = 1.5
    x[mask, 0] = torch.tensor(2.0)
    same(there, x)
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        x[index.cuda()]
    with pytest.raises(RuntimeError):
        there[index] = floats(4, 5)


def test_what_reads_sizes_from_values() -> None:
    x = ints(5, 40)
    counts = torch.tensor([0, 3, 0, 1, 0])
    for name, call in {
        "repeat_interleave": lambda t, c: torch.repeat_interleave(t[:5], c),
        "bincount": lambda t, c: torch.bincount(t, minlength=9),
        "unique": lambda t, c: torch.unique(t),
        "one_hot": lambda t, c: torch.nn.functional.one_hot(t),
        "take": lambda t, c: t.take(-c - 1),
        "topk": lambda t, c: torch.topk(t, 3).values,
    }.items():
        assert call(x.cuda(), counts.cuda()).cpu().tolist() == call(x, counts).tolist(), name
    image = floats(1, 2, 4, 5)
    for mode in ("reflect", "replicate", "circular"):
        pad = torch.nn.functional.pad
        same(pad(image.cuda(), (2, 1, 3, 2), mode=mode), pad(image, (2, 1, 3, 2), mode=mode))


def test_resize_keeps_what_was_there() -> None:
    x = torch.arange(6.0, device="cuda")
    x.resize_(4000)
    assert x[:6].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
