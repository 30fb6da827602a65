"""copy.copy, copy.deepcopy and pickle of tensors: memory, strides, gradients and Python attributes."""

from __future__ import annotations

import copy
import pickle

import pytest

import vibetensor.torch as vt
from vibetensor.torch._tensor import _rebuild


@pytest.fixture(params=["vibetensor", pytest.param("torch", marks=pytest.mark.torch)])
def api(request):
    """The library under test: vibetensor.torch, and PyTorch where it is installed."""
    return vt if request.param == "vibetensor" else pytest.importorskip("torch")


def pickled(value):
    return pickle.loads(pickle.dumps(value))


COPIES = [copy.copy, copy.deepcopy, pickled]
LAYOUTS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.t(),
    "stepped": lambda t: t[1:, ::2],
    "expanded": lambda t: t[:1].expand(4, 6),
    "no elements": lambda t: t[:, :0],
    "no dimensions": lambda t: t[1, 2],
}


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_and_strides_stay(api, again, layout) -> None:
    t = LAYOUTS[layout](api.arange(24.0).reshape(4, 6))
    other = again(t)
    assert type(other) is api.Tensor and other is not t and not other._is_view()
    assert (other.tolist(), other.dtype, other.shape) == (t.tolist(), t.dtype, t.shape)
    assert other.stride() == t.stride()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "bfloat16", "float64"])
def test_pickled_dtypes(api, dtype) -> None:
    t = api.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(api, dtype)).t()
    other = pickled(t)
    assert (other.dtype, other.stride(), other.tolist()) == (t.dtype, t.stride(), t.tolist())


def test_pickled_8_bit_floats() -> None:
    t = vt.tensor([[0.5, 1.0], [2.0, -3.0]]).to(vt.float8_e4m3fn).t()
    other = pickled(t)
    assert (other.dtype, other.stride(), other.tolist()) == (t.dtype, t.stride(), t.tolist())


def test_a_pickle_holds_what_the_tensor_spans_and_no_more() -> None:
    row = vt.zeros(1000, 1000)[7]
    assert len(pickle.dumps(row)) < 5000
    assert len(pickle.dumps(vt.zeros(1).expand(100_000))) < 1000


def test_contiguous_bytes_of_older_pickles() -> None:
    t = vt.arange(6, dtype=vt.int32, device="cpu").reshape(2, 3)
    made = _rebuild(vt.Tensor, t.numpy().tobytes(), "int32", (2, 3), False)
    assert made.dtype is vt.int32 and made.tolist() == t.tolist()


def test_a_shallow_copy_is_over_the_same_memory(api) -> None:
    module = api.nn.Linear(2, 2)
    other = copy.copy(module.weight)
    assert type(other) is api.nn.Parameter and other.requires_grad and other.is_leaf
    other.data.zero_()
    assert module.weight.tolist() == [[0.0, 0.0], [0.0, 0.0]]

    t = api.zeros(2, 3).t()
    copy.copy(t).add_(1)
    assert t.tolist() == [[1.0, 1.0]] * 3


def test_a_shallow_copy_is_a_leaf_of_its_own(api) -> None:
    x = api.ones(2, requires_grad=True)
    x.sum().backward()
    other = copy.copy(x)
    assert other.requires_grad and other.grad is None
    (other * 3).sum().backward()
    assert other.grad.tolist() == [3.0, 3.0] and x.grad.tolist() == [1.0, 1.0]

    computed = copy.copy(x * 2)
    assert computed.requires_grad and computed.is_leaf and computed.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("again", COPIES)
def test_python_attributes_stay(api, again) -> None:
    x = api.ones(2)
    x.label, x.parts = "x", [1, 2]
    other = again(x)
    assert other.label == "x" and other.parts == [1, 2]
    assert (other.parts is x.parts) == (again is copy.copy)


@pytest.mark.parametrize("again", [copy.copy, pickled])
def test_python_attributes_of_a_parameter_stay(api, again) -> None:
    p = api.nn.Parameter(api.ones(2))
    p.label = "p"
    other = again(p)
    assert type(other) is api.nn.Parameter and other.label == "p" and other.requires_grad


def test_attributes_that_name_the_tensor(api) -> None:
    x = api.ones(2)
    x.parts = [x]
    assert copy.copy(x).parts[0] is x
    pickle.dumps(x)  # ends


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_a_subclass_stays_one(again) -> None:
    t = Named(vt.arange(3.0))
    t.label = "n"
    other = again(t)
    assert type(other) is Named and other.label == "n" and other.tolist() == [0.0, 1.0, 2.0]


class Named(vt.Tensor):
    """A class that pickle finds by its name."""


def test_gradients_go_with_a_deep_copy_only(api) -> None:
    x = api.ones(2, requires_grad=True)
    x.sum().backward()
    assert copy.deepcopy(x).grad.tolist() == [1.0, 1.0]
    assert copy.copy(x).grad is None and pickled(x).grad is None


def test_a_computed_tensor_has_no_deep_copy(api) -> None:
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(api.ones(2, requires_grad=True) * 2)


def test_strides_stay_on_the_way_to_a_device() -> None:
    device = vt.ones(1).device
    made = vt.ones(2, 3, 4, 5, device="cpu")
    for x in (
        made.contiguous(memory_format=vt.channels_last),
        made[0, 0].t(),
        made.transpose(0, 2),
    ):
        there = x.to(device)
        assert there.stride() == x.stride() and there.tolist() == x.tolist()
        assert there.to("cpu").stride() == x.stride()
    gaps = vt.arange(24.0, device="cpu").reshape(4, 6)[:, ::2].t()
    there = gaps.to(device, copy=True)
    assert there.tolist() == gaps.tolist() and there.stride() == gaps.clone().stride()
    weight = vt.nn.Conv2d(3, 4, 3, device="cpu").to(memory_format=vt.channels_last).weight
    leaf = weight.to(device)
    assert leaf.stride() == (27, 1, 9, 3) and leaf.requires_grad
    leaf.sum().backward()
    assert weight.grad.tolist() == vt.ones(4, 3, 3, 3).tolist()


def test_devices_need_no_hardware() -> None:
    far = vt.device("cuda:90")
    assert (far.type, far.index, str(far)) == ("cuda", 90, "cuda:90")
    assert vt.ones(1).device != far and pickle.loads(pickle.dumps(far)) == far
    assert vt.device("cuda").type == "cuda" and vt.device("cuda").index is not None
    for use in (
        lambda: vt.ones(1, device=far),
        lambda: vt.ones(1).to(far),
        lambda: vt.set_default_device(far),
    ):
        with pytest.raises(RuntimeError, match="CUDA"):
            use()


def test_a_tensor_on_no_gpu_changes_no_current_device() -> None:
    x = vt.ones(1, device="cpu")
    with vt.cuda.device(x.get_device()), vt.cuda.device(None):
        vt.cuda.set_device(x.get_device())
        assert (x + 1).item() == 2
