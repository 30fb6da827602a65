"""The default device where there is only the CPU; tests/cuda/test_default_device.py has the rest."""

from __future__ import annotations

import pytest

import vibetensor.torch as vt


@pytest.fixture(autouse=True)
def restored():
    before = vt.get_default_device()
    vt.set_default_device(None)
    yield
    vt.set_default_device(before)


def test_is_the_cpu_at_start_and_after_none() -> None:
    assert vt.get_default_device() == vt.device("cpu")
    for value in ("cpu", vt.device("cpu"), None):
        vt.set_default_device(value)
        assert vt.get_default_device() == vt.device("cpu")
        assert vt.ones(2).device == vt.tensor([1]).device == vt.device("cpu")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("gpu", RuntimeError, "Expected one of cpu, cuda device type .*: gpu"),
        ("cpu:1", RuntimeError, "there is one cpu device"),
        ("cuda:-1", RuntimeError, "Invalid device string: 'cuda:-1'"),
        (1.5, TypeError, "expected a torch.device"),
        ([], TypeError, "expected a torch.device"),
    ],
)
def test_what_is_no_device_is_refused(value, error, message) -> None:
    with pytest.raises(error, match=message):
        vt.set_default_device(value)
    assert vt.get_default_device() == vt.device("cpu")


def test_a_missing_device_is_refused_at_once() -> None:
    index = vt.cuda.device_count()
    with pytest.raises(RuntimeError, match="no CUDA device can be used: |invalid device ordinal"):
        vt.set_default_device(f"cuda:{index}")
    assert vt.ones(2).is_cpu


def test_blocks_restore_also_after_errors() -> None:
    cpu = vt.device("cpu")
    with cpu as entered, cpu:
        assert entered is cpu
        assert vt.zeros(1).is_cpu
    with pytest.raises(KeyError), cpu:
        raise KeyError
    with pytest.raises(RuntimeError, match="without __enter__"):
        cpu.__exit__(None, None, None)


def test_decorator() -> None:
    @vt.device("cpu")
    def make(n: int, *, value: float = 1.0) -> vt.Tensor:
        """Makes one."""
        return vt.full((n,), value)

    assert (make.__name__, make.__doc__) == ("make", "Makes one.")
    assert make(2, value=3.0).tolist() == [3.0, 3.0]
    with pytest.raises(TypeError):
        vt.device("cpu")(1, 2)
    with pytest.raises(TypeError, match="function"):
        vt.device("cpu")(3)
