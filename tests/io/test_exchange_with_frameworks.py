"""DLPack exchange with PyTorch and JAX: shared memory where it can be, dtypes, refusals."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor import _C

DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64"]
DTYPES += ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jnp():
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield pytest.importorskip("jax.numpy")
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_shared_with_torch(torch, dtype, shape) -> None:
    theirs = torch.ones(shape, dtype=getattr(torch, dtype))
    ours = vt.from_dlpack(theirs)
    assert str(ours.dtype) == str(theirs.dtype) and tuple(ours.shape) == tuple(theirs.shape)
    theirs.zero_()
    assert ours.tolist() == theirs.tolist()
    back = torch.from_dlpack(ours)
    ours.fill_(1)
    assert back.tolist() == theirs.tolist() == ours.tolist()
    if back.numel():
        assert back.data_ptr() == theirs.data_ptr() == ours.data_ptr()


def test_strides_and_offsets_are_kept_with_torch(torch) -> None:
    theirs = torch.arange(24.0).reshape(4, 6)[1::2, ::3].t()
    ours = vt.from_dlpack(theirs)
    assert ours.stride() == theirs.stride() and ours.tolist() == theirs.tolist()
    expanded = vt.arange(3.0).expand(2, 3)
    assert torch.from_dlpack(expanded).stride() == (0, 1)


@pytest.mark.parametrize("first", ["torch", "vibetensor"])
def test_memory_outlives_its_first_owner_with_torch(torch, first) -> None:
    a, b = (torch, vt) if first == "torch" else (vt, torch)
    gc.collect()
    before = _C._live_counts()["storages"]
    kept = b.from_dlpack(b.from_dlpack(a.arange(1000)) if first == "torch" else a.arange(1000))
    gc.collect()
    assert kept.sum().item() == 499500
    del kept
    gc.collect()
    assert _C._live_counts()["storages"] == before


def test_what_torch_cannot_share_is_refused(torch) -> None:
    with pytest.raises(BufferError, match="grad"):
        torch.from_dlpack(vt.ones(2, requires_grad=True))
    with pytest.raises((BufferError, RuntimeError), match="grad"):
        vt.from_dlpack(torch.ones(2, requires_grad=True))
    with pytest.raises(TypeError, match="unsupported dtype"):
        vt.from_dlpack(torch.ones(2, dtype=torch.complex64))
    assert vt.from_dlpack(torch.ones(2)).tolist() == [1, 1]


def test_copies_are_made_when_asked_for(torch) -> None:
    ours = vt.ones(3)
    copied = torch.from_dlpack(ours, copy=True)
    copied.zero_()
    assert ours.tolist() == [1.0, 1.0, 1.0]
    shared = torch.from_dlpack(ours, copy=False)
    shared.zero_()
    assert ours.tolist() == [0.0, 0.0, 0.0]


def test_read_only_memory_stays_read_only() -> None:
    array = np.arange(3.0)
    array.flags.writeable = False
    ours = vt.from_dlpack(array)
    with pytest.raises(RuntimeError, match="read-only"):
        ours.add_(1)
    assert (ours + 1).tolist() == [1.0, 2.0, 3.0]
    again = np.from_dlpack(ours)
    assert not again.flags.writeable


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_go_to_jax_and_back(jnp, dtype, shape) -> None:
    name = "bool_" if dtype == "bool" else dtype
    theirs = jnp.ones(shape, dtype=getattr(jnp, name))
    ours = vt.from_dlpack(theirs)
    assert str(ours.dtype) == f"torch.{dtype}" and tuple(ours.shape) == shape
    assert ours.tolist() == theirs.tolist()
    values = (vt.arange(max(ours.numel(), 1))[: ours.numel()] % 2).reshape(shape).to(ours.dtype)
    back = jnp.from_dlpack(values)
    assert back.dtype == theirs.dtype and back.tolist() == values.tolist()


def test_memory_given_to_jax_outlives_its_tensor(jnp) -> None:
    array = jnp.from_dlpack(vt.arange(1000))
    gc.collect()
    assert int(array.sum()) == 499500
