"""Tied models and sharded checkpoints."""

import json

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
