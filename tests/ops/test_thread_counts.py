"""The results of our own kernels do not depend on the number of threads: bit for bit, forward and
backward, on sizes that are split. OpenBLAS's products are not ours and are compared closely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def x(*shape: int, seed: int = 0) -> Any:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randn(shape, generator=generator)


LABELS = torch.arange(700) * 7 % 500

# name → (function of tensors, their shapes)
OPS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "gelu": (F.gelu, ((700, 500),)),
    "broadcast mul": (lambda a, b: a * b, ((700, 500), (500,))),
    "strided add": (lambda a, b: a.t() + b, ((700, 500), (500, 700))),
    "where": (lambda a, b: torch.where(a > 0, a, b), ((700, 500), (700, 1))),
    "sum of all": (lambda a: a.sum(), ((700, 500),)),
    "sum of rows": (lambda a: a.sum(1), ((700, 500),)),
    "sum of columns": (lambda a: a.sum(0), ((700, 500),)),
    "sum of the middle": (lambda a: a.sum(1), ((20, 700, 25),)),
    "mean of few columns": (lambda a: a.mean(0), ((200_000, 2),)),
    "prod": (lambda a: (a * 0.01 + 1).prod(0), ((700, 500),)),
    "var": (lambda a: a.var(1), ((700, 500),)),
    "std of all": (lambda a: a.std(), ((700, 500),)),
    "norm": (lambda a: a.norm(), ((700, 500),)),
    "logsumexp": (lambda a: a.logsumexp(0), ((700, 500),)),
    "amax": (lambda a: a.amax(0), ((700, 500),)),
    "cumsum": (lambda a: a.cumsum(0), ((700, 500),)),
    "softmax": (lambda a: a.softmax(1), ((700, 500),)),
    "log_softmax of columns": (lambda a: a.log_softmax(0), ((700, 500),)),
    "cross_entropy": (lambda a: F.cross_entropy(a, LABELS), ((700, 500),)),
    "layer_norm": (
        lambda a, w, b: F.layer_norm(a, (500,), w, b),
        ((700, 500), (500,), (500,)),
    ),
    "rms_norm": (lambda a, w: F.rms_norm(a, (500,), w), ((700, 500), (500,))),
    "group_norm": (lambda a: F.group_norm(a, 4), ((8, 16, 30, 90),)),
    "batch_norm": (lambda a: F.batch_norm(a, None, None, training=True), ((8, 16, 30, 90),)),
    "conv2d": (
        lambda a, w, b: F.conv2d(a, w, b, padding=1),
        ((4, 8, 40, 40), (16, 8, 3, 3), (16,)),
    ),
    "conv1d": (lambda a, w: F.conv1d(a, w, stride=2), ((4, 8, 3000), (16, 8, 5))),
    "max_pool2d": (lambda a: F.max_pool2d(a, 2), ((8, 16, 60, 90),)),
    "avg_pool2d": (lambda a: F.avg_pool2d(a, 3, 2), ((8, 16, 60, 90),)),
    "embedding": (lambda w: F.embedding(LABELS % 11, w), ((11, 600),)),
    "index_add": (
        lambda a, b: a.index_add(0, LABELS % 5, b),
        ((5, 500), (700, 500)),
    ),
    "scatter_add": (
        lambda a, b: a.scatter_add(0, (LABELS % 5)[:, None].expand(700, 500), b),
        ((5, 500), (700, 500)),
    ),
    "index": (lambda a: a[LABELS % 9], ((9, 500),)),
    "sort": (lambda a: a.sort(1)[0], ((700, 500),)),
    "topk": (lambda a: a.topk(7)[0], ((700, 500),)),
    "cat": (lambda a, b: torch.cat([a, b], 1), ((700, 500), (700, 300))),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 4, 300, 32), (2, 4, 300, 32), (2, 4, 300, 32)),
    ),
}


def everything(name: str, dtype: Any, threads: int) -> list[Any]:
    """Value and gradients."""
    torch.set_num_threads(threads)
    function, shapes = OPS[name]
    inputs = [x(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(shapes)]
    out = function(*inputs)
    (out * x(*out.shape, seed=9).to(dtype)).sum().backward()
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_results_do_not_depend_on_the_threads(name: str, dtype: Any) -> None:
    expected = everything(name, dtype, 1)
    for threads in (2, 3, 4):
        for part, (a, b) in enumerate(zip(everything(name, dtype, threads), expected)):
            assert torch.equal(a, b), (threads, part, (a.float() - b.float()).abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_of_several_threads(dtype: Any) -> None:
    a, b = x(300, 257).to(dtype), x(257, 190, seed=1).to(dtype)
    torch.set_num_threads(1)
    expected = (a @ b).double()
    bound = {"torch.float32": 1e-4, "torch.float64": 1e-11}.get(str(dtype), 0.5)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert ((a @ b).double() - expected).abs().max().item() < bound
