"""New tensors that name no device go to the default one, and only they."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt

CUDA, CPU = "cuda", vt.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    vt.set_default_device(None)
    yield
    vt.set_default_device(None)


MAKERS: list[Callable[..., vt.Tensor]] = [
    lambda **o: vt.empty(2, **o),
    lambda **o: vt.empty_strided((2, 2), (1, 2), **o),
    lambda **o: vt.zeros(2, **o),
    lambda **o: vt.ones(2, **o),
    lambda **o: vt.full((2,), 1.5, **o),
    lambda **o: vt.scalar_tensor(2.0, **o),
    lambda **o: vt.arange(3, **o),
    lambda **o: vt.arange(1, 3, 0.5, **o),
    lambda **o: vt.linspace(0, 1, 5, **o),
    lambda **o: vt.linspace(0, 1, 1, **o),
    lambda **o: vt.logspace(0, 1, 5, **o),
    lambda **o: vt.eye(3, **o),
    lambda **o: vt.tril_indices(3, 3, **o),
    lambda **o: vt.triu_indices(3, 3, **o),
    lambda **o: vt.rand(2, **o),
    lambda **o: vt.randn(2, **o),
    lambda **o: vt.randint(0, 5, (2,), **o),
    lambda **o: vt.randperm(5, **o),
    lambda **o: vt.normal(0.0, 1.0, (2,), **o),
    lambda **o: vt.tensor([1, 2], **o),
    lambda **o: vt.tensor(3.0, **o),
    lambda **o: vt.tensor(np.ones(2), **o),
    lambda **o: vt.tensor(vt.ones(2, device="cpu").detach(), **o),
    lambda **o: vt.as_tensor([1, 2], **o),
    lambda **o: vt.as_tensor(np.ones(2), **o),
    lambda **o: vt.as_tensor(vt.ones(2, device="cpu"), **o),
]


@pytest.mark.parametrize("make", MAKERS)
def test_makers(make: Callable[..., vt.Tensor]) -> None:
    with vt.device(CUDA):
        assert make().is_cuda
        assert make(device="cpu").is_cpu
        with vt.device("cpu"):
            assert make().is_cpu
        assert make().is_cuda
    assert make().is_cpu


def test_sources_that_have_a_device_keep_it() -> None:
    here, there = vt.ones(2), vt.ones(2, device=CUDA)
    with vt.device(CUDA):
        kept: list[vt.Tensor] = [
            here.new_zeros(2), here.new_tensor([1]), vt.zeros_like(here), vt.rand_like(here),
            vt.from_numpy(np.ones(2)), vt.from_dlpack(np.ones(2)), vt.Tensor([1.0]),
            vt.Generator().get_state(), vt.get_rng_state(), here + 1, here.clone(),
            vt.nn.functional.one_hot(vt.tensor([1], device="cpu")), here.unique(dim=0),
        ]  # fmt: skip
        assert [t.device for t in kept] == [CPU] * len(kept)
        assert vt.Generator().device == CPU
    # Nobody chose the CPU: a copy stays where its source is. As a chosen default, it moves.
    assert vt.tensor(there.detach()).is_cuda
    with vt.device("cpu"):
        assert vt.tensor(there.detach()).is_cpu and vt.as_tensor(there).is_cpu


def test_modules_and_optimizers() -> None:
    vt.set_default_device(CUDA)
    model = vt.nn.Sequential(
        vt.nn.Embedding(5, 4), vt.nn.LSTM(4, 4) if hasattr(vt.nn, "LSTM") else vt.nn.Identity(),
        vt.nn.Linear(4, 4), vt.nn.LayerNorm(4), vt.nn.PReLU(), vt.nn.BatchNorm1d(4),
        vt.nn.MultiheadAttention(4, 2), vt.nn.Conv1d(4, 4, 1),
    )  # fmt: skip
    assert all(t.is_cuda for t in model.state_dict().values())
    weight = vt.nn.Parameter(vt.ones(3))
    optimizer = vt.optim.AdamW([weight], fused=True)
    weight.sum().backward()
    optimizer.step()
    assert all(v.is_cuda for v in optimizer.state[weight].values())


def test_follows_the_current_device_and_names_it() -> None:
    vt.set_default_device("cuda")
    for index in range(vt.cuda.device_count()):
        with vt.cuda.device(index):
            assert vt.ones(1).device == vt.get_default_device() == vt.device("cuda", index)
    last = vt.cuda.device_count() - 1
    vt.set_default_device(f"cuda:{last}")
    assert vt.ones(1).device == vt.get_default_device() == vt.device("cuda", last)


def test_is_the_threads_own() -> None:
    vt.set_default_device(CUDA)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.extend([vt.ones(1).device, vt.tensor(1).device]))
    thread.start()
    thread.join()
    assert seen == [CPU, CPU]
    assert vt.ones(1).is_cuda


def test_data_loaders_shuffle_and_their_workers_stay_on_the_cpu() -> None:
    class Squares(vt.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> vt.Tensor:
            return vt.tensor(i * i)

    orders = []
    for device in ("cpu", CUDA):
        vt.set_default_device(device)
        vt.manual_seed(3)
        loader = vt.utils.data.DataLoader(Squares(), batch_size=4, shuffle=True)
        batches = list(loader)
        assert {str(b.device.type) for b in batches} == {device}
        orders.append([b.tolist() for b in batches])
        batches = list(vt.utils.data.DataLoader(Squares(), batch_size=4, num_workers=1))
        assert all(b.is_cpu for b in batches)
    assert orders[0] == orders[1]


def test_checkpointed_dropout_draws_again_what_it_drew() -> None:
    vt.set_default_device(CUDA)
    x = vt.ones(1000, requires_grad=True)

    def region(t: vt.Tensor) -> vt.Tensor:
        return vt.nn.functional.dropout(t, 0.5) * t

    for reentrant in (False, True):
        x.grad = None
        y = vt.utils.checkpoint.checkpoint(region, x, use_reentrant=reentrant)
        y.sum().backward()
        # y = mask * x * x, so that at 1 the gradient is twice the mask that the first run drew.
        assert vt.equal(x.grad, 2 * y.detach())


def test_fork_rng_restores_devices() -> None:
    vt.set_default_device(CUDA)
    vt.manual_seed(0)
    with vt.random.fork_rng():
        first = vt.rand(4)
    assert vt.equal(vt.rand(4), first)
    with vt.random.fork_rng(devices=[]):
        second = vt.rand(4)
    assert not vt.equal(vt.rand(4), second)
