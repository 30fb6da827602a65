"""Tied models and sharded checkpoints."""

import json
import os

import pytest

import vibetensor.torch as torch
from vibetensor.io import safetensors as st
from vibetensor.torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_written_once(tmp_path):
    path = tmp_path / "model.safetensors"
    model, other = Tied(), Tied()
    st.save_model(model, path, {"format": "pt"})
    with st.safe_open(path) as file:
        assert file.keys() == ["embedding.weight"]
        assert file.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
    assert st.load_model(other, path) == ([], [])
    assert other.head.weight is other.embedding.weight
    assert other.head.weight.tolist() == model.head.weight.tolist()


def test_load_model_names_what_does_not_fit(tmp_path):
    path = tmp_path / "model.safetensors"
    st.save_file({"head.weight": torch.zeros(5, 3), "more": torch.zeros(1)}, path)
    assert st.load_model(Tied(), path, strict=False) == ([], ["more"])
    with pytest.raises(RuntimeError, match="unexpected: \\['more'\\]"):
        st.load_model(Tied(), path)
    with pytest.raises(RuntimeError, match="missing"):
        st.load_model(nn.Linear(2, 2), path)


def tensors():
    return {f"t{i}": torch.full((10, 10), float(i)) for i in range(5)}


def test_shards_and_index(tmp_path):
    names = st.save_sharded(tensors(), tmp_path, max_shard_size="1KB")
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["t2"] == names[1]
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        loaded = st.load_sharded(source)
        assert list(loaded) == list(tensors())
        assert all(loaded[n].tolist() == t.tolist() for n, t in tensors().items())
    assert st.save_sharded(tensors(), tmp_path) == ["model.safetensors"]
    assert st.load_sharded(tmp_path)["t4"].sum().item() == 400.0


def save_and_die(folder, values, size, fatal):
    """The exit code of a child that saves `values` and ends before its `fatal`-th change of the
    disk: a shard, a rename, a removal."""
    pid = os.fork()
    if pid == 0:
        events = 0

        def counted(function):
            def call(*arguments):
                nonlocal events
                events += 1
                if events == fatal:
                    os._exit(9)
                return function(*arguments)

            return call

        try:
            for owner, name in ((st, "save_file"), (os, "replace"), (os, "unlink")):
                setattr(owner, name, counted(getattr(owner, name)))
            st.save_sharded(values, folder, max_shard_size=size)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    ("before", "after"),
    [("1KB", "1KB"), ("1KB", "500"), ("1KB", "5GB"), ("5GB", "1KB")],
    ids=["same shards", "more shards", "to one file", "from one file"],
)
def test_a_killed_save_leaves_one_whole_save(tmp_path, before, after):
    old = tensors()
    new = {name: tensor + 10 for name, tensor in old.items()}
    outcomes = []
    for fatal in range(1, 40):
        folder = tmp_path / str(fatal)
        st.save_sharded(old, folder, max_shard_size=before)
        code = save_and_die(folder, new, after, fatal)
        assert code in (0, 9)
        values = {name: t[0, 0].item() for name, t in st.load_sharded(folder).items()}
        assert values in ({n: t[0, 0].item() for n, t in s.items()} for s in (old, new))
        outcomes.append(values["t0"] == 10)
        names = st.save_sharded(new, folder, max_shard_size=after)
        index = ["model.safetensors.index.json"] if after != "5GB" else []
        assert sorted(os.listdir(folder)) == sorted([*names, *index])
        if code == 0:
            break
    assert outcomes[0] is False and outcomes[-1] is True and outcomes == sorted(outcomes)


def test_saving_what_was_loaded_from_the_same_folder(tmp_path):
    st.save_sharded(tensors(), tmp_path, max_shard_size="1KB")
    st.save_sharded({"other": torch.ones(1)}, tmp_path, stem="model-00001-of-00003-part")
    loaded = st.load_sharded(tmp_path)  # windows onto the files that the save replaces
    loaded["t1"] += 5
    for _ in range(2):
        names = st.save_sharded(loaded, tmp_path, max_shard_size="1KB")
        assert st.load_sharded(tmp_path)["t1"].tolist() == [[6.0] * 10] * 10
    assert len(names) == 3
    assert st.load_sharded(tmp_path, stem="model-00001-of-00003-part")["other"].item() == 1


def test_a_tensor_above_the_limit_has_its_own_shard(tmp_path):
    assert len(st.save_sharded(tensors(), tmp_path, max_shard_size=100)) == 5
    for bad in (0, "5 parsecs", "-1GB", "GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            st.save_sharded(tensors(), tmp_path, max_shard_size=bad)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../escape.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"t0": "part.safetensors"}}',
        '{"weight_map": {"t0": "part.safetensors", "t2": "part.safetensors"}}',
    ],
)
def test_hostile_index(tmp_path, text):
    st.save_file({"t0": torch.zeros(1), "t1": torch.zeros(1)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(st.InvalidIndex):
        st.load_sharded(tmp_path)


def test_index_with_a_key_twice(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(st.DuplicateKey):
        st.load_sharded(tmp_path)


@pytest.mark.parametrize("size", [0, -1, 1.5, "inf GB", "much", None])
def test_sizes_that_are_none(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes or like '5GB'"):
        st.save_sharded(tensors(), tmp_path, max_shard_size=size)
    assert not os.listdir(tmp_path)


def test_values_that_are_no_tensors(tmp_path):
    with pytest.raises(TypeError, match="save_sharded: 'b' is a list, not a tensor"):
        st.save_sharded({**tensors(), "b": [1.0]}, tmp_path)
    assert not os.listdir(tmp_path)
