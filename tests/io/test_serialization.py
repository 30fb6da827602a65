"""torch.save and torch.load without pickle."""

import io
import pickle
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.io import safetensors as st
from vibetensor.torch import nn
from vibetensor.torch.serialization import load, save


def through_file(value, tmp_path):
    save(value, tmp_path / "x.pt")
    return load(tmp_path / "x.pt")


PLAIN = [
    None,
    True,
    -7,
    2**70,
    1.5,
    float("inf"),
    1 + 2j,
    "tëxt\n",
    b"\x00\xff",
    [],
    (),
    {},
    [1, [2, (3, None)]],
    {"a": {"b": [1.0]}, "$": "dollar"},
    {1: "int", (1, 2): "tuple", None: 0, False: 2.5},
    {1, 2},
    frozenset({"x"}),
    OrderedDict([("b", 1), ("a", 2)]),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values(value, tmp_path):
    loaded = through_file(value, tmp_path)
    assert loaded == value and type(loaded) is type(value)
    if isinstance(value, dict):
        assert list(loaded) == list(value)


def test_torch_values(tmp_path):
    value = [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu"), float("nan")]
    loaded = through_file(value, tmp_path)
    assert loaded[:3] == value[:3] and loaded[3] != loaded[3]
    assert isinstance(loaded[0], torch.Size)
    plain = through_file(
        {"d": defaultdict(list, a=[1]), "n": np.float64(2.5), "i": np.int32(3)}, tmp_path
    )
    assert plain == {"d": {"a": [1]}, "n": 2.5, "i": 3} and type(plain["n"]) is float
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    loaded = through_file(array, tmp_path)
    assert isinstance(loaded, np.ndarray) and loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


def test_tensors_keep_values_strides_and_roles(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    value = {
        "t": base.t(),
        "sparse": torch.arange(100.0)[::10],
        "scalar": torch.tensor(2, dtype=torch.int64),
        "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
        "leaf": torch.ones(2, requires_grad=True),
        "parameter": nn.Parameter(torch.zeros(3)),
    }
    loaded = through_file(value, tmp_path)
    for name, tensor in value.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].tolist() == tensor.tolist()
        assert loaded[name].requires_grad == tensor.requires_grad
        assert isinstance(loaded[name], nn.Parameter) == isinstance(tensor, nn.Parameter)
    assert loaded["t"].stride() == (1, 4)
    assert loaded["sparse"].stride() == (1,)  # the elements between are not written


def test_shared_memory_is_shared_again(tmp_path):
    base = torch.zeros(4, 4)
    value = {
        "base": base,
        "row": base[1],
        "column": base[:, 2],
        "same": base,
        "other": torch.zeros(4),
    }
    loaded = through_file(value, tmp_path)
    assert loaded["same"] is loaded["base"]
    loaded["base"].fill_(3)
    assert loaded["row"].tolist() == loaded["column"].tolist() == [3.0] * 4
    assert loaded["other"].tolist() == [0.0] * 4
    with st.safe_open(tmp_path / "x.pt") as file:
        assert len(file) == 2


def test_model_and_optimizer_checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    loaded = through_file(checkpoint, tmp_path)
    assert list(loaded["model"]) == list(checkpoint["model"])
    assert loaded["optimizer"]["param_groups"] == checkpoint["optimizer"]["param_groups"]
    moments = loaded["optimizer"]["state"][0]
    assert moments["exp_avg"].tolist() == checkpoint["optimizer"]["state"][0]["exp_avg"].tolist()
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(loaded["model"])
    torch.optim.AdamW(other.parameters()).load_state_dict(loaded["optimizer"])
    assert other[0].weight.tolist() == model[0].weight.tolist()


def test_file_objects_and_map_location(tmp_path):
    stream = io.BytesIO()
    save({"w": torch.ones(2)}, stream)
    stream.seek(0)
    assert load(stream, map_location="cpu", weights_only=True)["w"].tolist() == [1.0, 1.0]
    for place in (
        torch.device("cpu"),
        {"cuda:0": "cpu"},
        lambda tensor, _: tensor,
        lambda t, _: None,
    ):
        stream.seek(0)
        assert load(stream, map_location=place)["w"].sum().item() == 2.0
    st.save_file({"w": torch.ones(3)}, tmp_path / "plain.safetensors")
    assert load(tmp_path / "plain.safetensors")["w"].tolist() == [1.0] * 3


class Config:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, Config()]}, r"obj\['a'\]\[1\] is a .*Config; .*vars\(\)"),
        (nn.Linear(1, 1), r"state_dict\(\)"),
        (print, "not pickled"),
    ],
)
def test_objects_are_refused_with_their_place(value, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        save(value, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_cycles_are_refused(tmp_path):
    value = []
    value.append(value)
    with pytest.raises(ValueError, match="contains itself"):
        save(value, tmp_path / "x")


def test_torch_files_and_pickles_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(RuntimeError, match=r"save_file[\s\S]*model\.safetensors"):
        load(path)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"a": list(range(100))}, protocol))
        with pytest.raises(RuntimeError, match="is a pickle"):
            load(path)
        with pytest.raises(RuntimeError, match="is a pickle"):
            load(io.BytesIO(path.read_bytes()))
    path.write_bytes(b"")
    with pytest.raises(st.HeaderTooSmall):
        load(path)
