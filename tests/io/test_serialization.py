"""torch.save and torch.load without pickle."""

import copy
import io
import json
import os
import pickle
import re
import stat
import zipfile
from collections import OrderedDict, defaultdict

import hypothesis.strategies
import numpy as np
import pytest
from hypothesis import given, settings

import vibetensor.torch as torch
from vibetensor.io import safetensors as st
from vibetensor.io.atomic import write_json
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


STRIDED = [
    lambda: torch.arange(3).expand(2, 3),
    lambda: torch.tensor(4).expand(1_000_000),
    lambda: torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    lambda: torch.arange(24)[::6].expand(10, 4),
    lambda: torch.arange(5).as_strided((2, 2), (1, 1)),
    lambda: torch.zeros(3, 1, 2).transpose(0, 1),
    lambda: torch.arange(4).as_strided((1, 4), (77, 1)),
    lambda: torch.zeros(0).as_strided((0, 3), (5, 9)),
    lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("make", STRIDED)
def test_strides_without_gaps_are_kept(make, tmp_path):
    tensor = make()
    loaded = through_file(tensor, tmp_path)
    assert (loaded.shape, loaded.stride()) == (tensor.shape, tensor.stride())
    assert loaded.tolist() == tensor.tolist()
    with st.safe_open(tmp_path / "x.pt") as file:  # each element once
        assert file.get_tensor("0").numel() <= 120


def test_gaps_between_elements_are_not_written(tmp_path):
    base = torch.arange(12).reshape(3, 4)
    loaded = through_file(base[:, ::2], tmp_path)
    assert loaded.stride() == (2, 1) and loaded.tolist() == base[:, ::2].tolist()
    loaded = through_file([base[:, ::2], base], tmp_path)
    assert loaded[0].stride() == (4, 2) and loaded[0].tolist() == base[:, ::2].tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_of_any_length(sign, tmp_path):
    for digits in (300, 4300, 5000):
        value = {"n": sign * 10**digits, 10**digits: [sign * 10**digits]}
        loaded = through_file(value, tmp_path)
        assert loaded == value
    with pytest.raises(TypeError, match=r"torch.save: obj\[\(a long int\)\] is a builtins.object"):
        torch.save({10**5000: object()}, tmp_path / "x.pt")


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


def test_files_of_a_device_that_is_not_here(tmp_path):
    path = tmp_path / "x.pt"
    save({"w": torch.ones(2), "d": torch.device("cuda:7")}, path)
    metadata = st.safe_open(path).metadata()
    tree = metadata["vibetensor.tree"]
    assert tree.count('"cpu"') + tree.count(str(torch.ones(1).device)) >= 1
    with st.safe_open(path) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.offset_keys()}
    here = json.dumps(str(torch.ones(1).device))
    st.save_file(tensors, path, {**metadata, "vibetensor.tree": tree.replace(here, '"cuda:7"')})
    with pytest.raises(RuntimeError, match="saved on cuda:7, which is not here; pass map_location"):
        load(path)
    for place in ("cpu", torch.device("cpu"), {"cuda:7": "cpu"}, lambda tensor, _: tensor):
        loaded = load(path, map_location=place)
        assert loaded["w"].tolist() == [1, 1] and loaded["d"] == torch.device("cuda:7")
    with pytest.raises(RuntimeError, match="not here"):
        load(path, map_location=lambda tensor, _: None)


def test_loaded_tensors_stay_as_the_file_changes(tmp_path):
    paths = [tmp_path / name for name in ("old.pt", "new.pt")]
    for value, path in zip((0.0, 1.0), paths):
        w = torch.full((1000,), value)
        save({"w": w, "window": w[10:20], "array": np.full(3, value)}, path)
    old = load(paths[0])
    st.save_file({"w": torch.zeros(5)}, tmp_path / "plain")
    plain = load(tmp_path / "plain")
    paths[0].write_bytes(paths[1].read_bytes())
    (tmp_path / "plain").write_bytes(b"")
    assert old["w"].sum().item() == old["window"].sum().item() == old["array"].sum() == 0
    assert plain["w"].tolist() == [0] * 5
    old["window"].fill_(2)  # still a view of the other
    assert old["w"].sum().item() == 20
    mapped = load(paths[0], mmap=True)
    assert mapped["w"].sum().item() == 1000 and mapped["array"].sum() == 3


def test_what_is_no_file_is_written_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        save({"w": torch.ones(3)}, pipe)
        content = os.read(reader, 1 << 16)
        assert stat.S_ISFIFO(os.stat(pipe).st_mode)
        assert load(io.BytesIO(content))["w"].tolist() == [1, 1, 1]
        write_json(pipe, {"a": 1})
        assert json.loads(os.read(reader, 1 << 16)) == {"a": 1}
        assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    finally:
        os.close(reader)
    with pytest.raises(OSError, match="No space left"):
        save({"w": torch.ones(3)}, "/dev/full")
    save({"w": torch.ones(3)}, "/dev/null")
    assert not os.path.isfile("/dev/null") and not os.path.isfile("/dev/full")
    assert sorted(os.listdir(tmp_path)) == ["pipe"]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"12345678abc")
    for read in (st.load_file, st.safe_open, load):
        with pytest.raises(st.HeaderTooLarge, match="bad.safetensors': the header claims"):
            read(path)


def test_generators_and_formats_are_pickled_and_copied():
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator, device="cpu")
    for again in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert again is not generator and again.initial_seed() == 7
        assert again.get_state().tolist() == generator.get_state().tolist()
        assert again.device == generator.device
    for kind in (torch.channels_last, torch.contiguous_format, torch.preserve_format):
        assert copy.deepcopy(kind) is kind and pickle.loads(pickle.dumps(kind)) is kind


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


def tensor_entry(**changes):
    return {"data": "0", "device": "cpu", **changes}


def node(kind, **fields):
    return {"$": kind, **fields}


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("{", "is not JSON"),
        (nested(100_000), "is not JSON"),
        ("[]", 'no "root" and "tensors"'),
        ({"root": 1}, 'no "root" and "tensors"'),
        ({"tensors": {}}, '"tensors" is {}, not a list'),
        ({"tensors": [3]}, "a tensor's entry is 3, not a dict"),
        ({"tensors": [tensor_entry(data="7")]}, "there is no data '7'"),
        ({"tensors": [tensor_entry(data=["0"])]}, "a tensor's data is"),
        ({"tensors": [{"data": "0"}]}, "a tensor's device is None, not a str"),
        ({"tensors": [tensor_entry(device="gpu")]}, "'gpu' is no device: "),
        ({"tensors": [tensor_entry(parameter=1)]}, "parameter is 1, not a bool"),
        ({"tensors": [tensor_entry(data="1", requires_grad=True)]}, "cannot require gradients"),
        ({"tensors": [tensor_entry(window=[[2], [1]])]}, "a window is"),
        ({"tensors": [tensor_entry(window=[[2], [1, 1], 0])]}, "1 extents and 2 strides"),
        ({"tensors": [tensor_entry(window=[[2], [1], -1])]}, "a number of a window is -1"),
        ({"tensors": [tensor_entry(window=[["2"], [1], 0])]}, "a number of a window is '2'"),
        ({"tensors": [tensor_entry(window=[[2], [2], 1])]}, "ends at element 3 of 3"),
        ({"tensors": [tensor_entry(window=[[2**40, 2**40], [0, 0], 0])]}, "has the shape"),
        ({"tensors": [tensor_entry(window=[[1] * 65, [0] * 65, 0])]}, "has the shape"),
        (node("tensor"), "a tensor's id is None, not a int"),
        (node("tensor", id=-1), "there is no tensor -1; it lists 3"),
        (node("ndarray", id=3), "there is no tensor 3"),
        (node("tensor", id=True), "a tensor's id is True"),
        (node("ndarray", id=2), "NumPy has no arrays of torch.bfloat16"),
        (node("dict"), "the items of a mapping is None"),
        (node("dict", items=[[1]]), "not a key and a value"),
        (node("dict", items=[[[], 1]]), "a key is a list"),
        (node("OrderedDict", items=3), "the items of a mapping is 3"),
        (node("tuple", items={"a": 1}), "the items of a tuple"),
        (node("set", items=[[]]), "an element of a set is a list"),
        (node("frozenset", items=[{}]), "an element of a frozenset is a dict"),
        (node("Size", items=["a"]), "an extent of a Size is 'a'"),
        (node("Size", items=[2**63]), "an extent of a Size is 9223372036854775808"),
        (node("Size", items=[node("int", hex="1" * 5000)]), "an extent of a Size is (a long int)"),
        (node("int", hex="0xg"), "'0xg' is no int"),
        (node("int", hex=3), "the hex of a int is 3"),
        (node("complex", items=[1.0, 10**400]), "a part of a complex number is no float"),
        (node("complex", items=[1.0]), "a complex number has 1 parts"),
        (node("complex", items=[1.0, "i"]), "a part of a complex number is 'i'"),
        (node("float", value="wide"), "'wide' is no float"),
        (node("float", value=1), "the value of a float is 1"),
        (node("bytes", hex="0g"), "'0g' is no bytes"),
        (node("device", name="abacus"), "'abacus' is no device"),
        (node("dtype", name="save"), "there is no dtype 'save'"),
        (node("pickle", items=[]), "a 'pickle', which this version does not know"),
        (node([1]), "which this version does not know"),
        (nested(300), "nested too deeply"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, str) else None,
)
def test_hostile_trees(tree, message, tmp_path):
    if isinstance(tree, dict):
        tables = [tensor_entry(data=str(i)) for i in range(3)]
        whole = tree if {"root", "tensors"} & tree.keys() else {"root": tree, "tensors": tables}
        tree = json.dumps({"root": 0, **whole} if "tensors" in tree else whole)
    elif tree == nested(300):
        tree = '{"tensors": [], "root": ' + tree + "}"
    data = {
        "0": torch.zeros(3),
        "1": torch.zeros(3, dtype=torch.int64),
        "2": torch.zeros(3, dtype=torch.bfloat16),
    }
    st.save_file(data, tmp_path / "x.pt", {"vibetensor.tree": tree})
    with pytest.raises(st.InvalidTree, match=re.escape(message)):
        load(tmp_path / "x.pt")


def test_deep_values_are_saved_and_loaded(tmp_path):
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {1: v}, lambda v: OrderedDict(a=v)):
        value = 0
        for _ in range(150):
            value = wrap(value)
        assert through_file(value, tmp_path) == value


@settings(max_examples=150, deadline=None)
@given(st_data=hypothesis.strategies.data())
def test_any_change_of_a_tree_gives_a_value_or_the_named_error(st_data):
    """A node of a valid tree is replaced by another JSON value."""
    value = {"w": nn.Parameter(torch.ones(2)), "t": (1.5, {2}), 3: OrderedDict(n=np.ones(2))}
    stream = io.BytesIO()
    save(value, stream)
    tree = json.loads(st._native.parse_header(stream.getvalue())[1]["vibetensor.tree"])
    places = []

    def visit(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                visit(part[key])

    visit(tree)
    part, key = st_data.draw(hypothesis.strategies.sampled_from(places))
    words = ["tensor", "ndarray", "tuple", "Size", "0", "cpu", "", "nan"]
    part[key] = st_data.draw(
        hypothesis.strategies.sampled_from([None, True, -1, 0, 2**70, 0.5, [], {}, *words])
    )
    data = {"0": torch.ones(2), "1": torch.ones(2, dtype=torch.float64)}
    content = st.save(data, {"vibetensor.tree": json.dumps(tree)})
    try:
        load(io.BytesIO(content))
    except st.InvalidTree as error:
        assert "vibetensor.tree" in str(error)
