"""Safetensors from Python: round trips, the `safetensors` package as reference, hostile files,
interrupted saves."""

import json
import os
import resource
import signal
import struct
import textwrap
import time

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.io import safetensors as st
from vibetensor.io.atomic import write_json

DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


def sample_tensors():
    tensors = {
        f"layer.{name}": (torch.arange(12).reshape(3, 4) % 5).to(getattr(torch, name))
        for name in DTYPES
    }
    tensors["half"] = torch.tensor([1.5, -2.25, 3e38]).to(torch.bfloat16)
    tensors["e4m3"] = torch.tensor([1.5, -2.25, 448.0]).to(torch.float8_e4m3fn)
    tensors["e5m2"] = torch.tensor([[1.5], [-57344.0]]).to(torch.float8_e5m2)
    tensors["scalar é\n"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 3)
    return tensors


def assert_same(a, b):
    assert a.dtype == b.dtype and list(a.shape) == list(b.shape)
    assert a.tolist() == b.tolist()


def file_with(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_round_trip(tmp_path, metadata):
    tensors = sample_tensors()
    path = tmp_path / "model.safetensors"
    st.save_file(tensors, path, metadata)
    loaded = st.load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)
    assert path.read_bytes() == st.save(tensors, metadata)
    for name, tensor in st.load(path.read_bytes()).items():
        assert_same(tensor, tensors[name])
    with st.safe_open(path) as file:
        assert file.metadata() == metadata
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_bytes_equal_the_reference_package(metadata):
    reference = pytest.importorskip("safetensors.numpy")
    arrays = {
        f"t/{name}": (np.arange(6).reshape(2, 3) % 4).astype("bool" if name == "bool" else name)
        for name in DTYPES
    }
    arrays |= {"zz": np.array(1, np.float32), 'é "\\\t\x01': np.zeros((2, 0), np.int8)}
    tensors = {name: torch.as_tensor(np.array(array)) for name, array in arrays.items()}
    expected = reference.save(arrays, metadata)
    assert st.save(tensors, metadata) == expected
    for name, tensor in st.load(expected).items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    for name, array in reference.load(st.save(tensors, metadata)).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.torch
def test_8_bit_floats_with_torch():
    theirs = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    bits = torch.arange(256, dtype=torch.uint8)
    ours = {
        name: bits.clone().view(getattr(torch, name)) for name in ("float8_e4m3fn", "float8_e5m2")
    }
    loaded = package.load(st.save(ours))
    assert {str(t.dtype) for t in loaded.values()} == {str(t.dtype) for t in ours.values()}
    for tensor in loaded.values():
        assert tensor.view(theirs.uint8).tolist() == list(range(256))
    for name, tensor in st.load(package.save(loaded)).items():
        assert tensor.dtype is getattr(torch, name)
        assert tensor.view(torch.uint8).tolist() == list(range(256))


def test_loaded_tensors_are_private_windows_that_outlive_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    st.save_file({"x": torch.arange(4), "y": torch.ones(2)}, path)
    before = path.read_bytes()
    with st.safe_open(path) as file:
        x, again = file.get_tensor("x"), file.get_tensor("x")
    assert x.data_ptr() == again.data_ptr()  # no copy was made
    st.save_file({"other": torch.zeros(100)}, path)  # a new file takes the old one's place
    x[0] = 7
    assert x.tolist() == [7, 1, 2, 3] and again[0] == 7
    st.save_file({"x": torch.arange(4), "y": torch.ones(2)}, path)
    x[1] = 8
    assert path.read_bytes() == before


def test_unaligned_data_is_loaded(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * ((3 - len(header)) % 8)
    path = tmp_path / "odd"
    path.write_bytes(file_with(header, struct.pack("<2f", 1.5, 2.5)))
    assert st.load_file(path)["a"].tolist() == [1.5, 2.5]


def test_non_contiguous_and_shared_tensors(tmp_path):
    base = torch.arange(24).reshape(4, 6)
    loaded = st.load(st.save({"t": base.t()}))
    assert_same(loaded["t"], base.t())
    rows = st.load(st.save({"a": base[:2], "b": base[2:]}))  # disjoint parts are fine
    assert_same(rows["b"], base[2:])
    same = st.load(st.save({"a": base, "b": base.view(4, 6)}))
    assert_same(same["a"], same["b"])
    with pytest.raises(st.SharedStorage, match="'whole'"):
        st.save({"whole": base, "row": base[1]})
    with pytest.raises(TypeError, match="not a tensor"):
        st.save({"a": [1, 2]})
    with pytest.raises(TypeError, match="must be strings"):
        st.save({1: base})


def test_safe_open(tmp_path):
    path = tmp_path / "a.safetensors"
    table = torch.arange(12).reshape(3, 4)
    st.save_file({"b": table, "a": torch.ones(1, dtype=torch.uint8)}, path)
    with st.safe_open(path, framework="pt", device="cpu") as file:
        assert file.keys() == ["a", "b"] and file.offset_keys() == ["b", "a"]
        assert "a" in file and len(file) == 2
        part = file.get_slice("b")
        assert part.get_shape() == [3, 4] and part.get_dtype() == "I64"
        assert_same(part[1:, ::2], table[1:, ::2])
        with pytest.raises(st.TensorNotFound, match="'nope'"):
            file.get_tensor("nope")
    with pytest.raises(ValueError, match="closed"):
        file.get_tensor("a")
    with pytest.raises(ValueError, match="framework"):
        st.safe_open(path, framework="tf")
    with pytest.raises(FileNotFoundError):
        st.safe_open(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        st.safe_open(tmp_path)


def test_a_slice_changes_nothing_of_its_file(tmp_path):
    """Other threads may be taking tensors from the file."""

    class Frozen(st.safe_open):
        def __setattr__(self, name, value):
            assert name not in self.__dict__, f"{name} is set again"
            super().__setattr__(name, value)

    table = torch.arange(12).reshape(3, 4)
    st.save_file({"a": table}, tmp_path / "a")
    file = Frozen(tmp_path / "a")
    assert_same(file.get_slice("a")[1:, ::2], table[1:, ::2])


def test_dtype_without_a_tensor_type(tmp_path):
    path = tmp_path / "f8"
    path.write_bytes(
        file_with({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}, b"\0\0")
    )
    with st.safe_open(path) as file:
        assert file.keys() == ["a"]
        with pytest.raises(st.UnsupportedDtype, match="F8_E8M0"):
            file.get_tensor("a")


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "HeaderTooSmall": b"\0" * 7,
    "HeaderTooLarge": struct.pack("<Q", 100_000_001) + b"{}",
    "InvalidHeaderLength": struct.pack("<Q", 99) + b"{}",
    "InvalidHeaderStart": file_with(b" {}"),
    "InvalidHeaderUtf8": file_with(b'{"\xff":1}'),
    "InvalidHeaderJson": file_with(b'{"a":'),
    "InvalidHeaderPadding": file_with(b"{}\0\0"),
    "DuplicateKey": file_with(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"12",
    ),
    "InvalidMetadata": file_with({"__metadata__": {"k": 1}}),
    "InvalidTensorInfo": file_with({"a": {"dtype": "F32", "shape": [2]}}),
    "UnknownDtype": file_with({"a": entry(dtype="F31")}, bytes(8)),
    "ShapeOverflow": file_with({"a": entry((2**40, 2**40))}, bytes(8)),
    "MisalignedSize": file_with({"a": entry((3,), (0, 2), "F4")}, bytes(2)),
    "InvalidOffsets": file_with({"a": entry((2,), (8, 0))}, bytes(8)),
    "DataHole": file_with({"a": entry(), "b": entry((1,), (12, 16))}, bytes(16)),
    "DataOverlap": file_with({"a": entry(), "b": entry((2,), (4, 12))}, bytes(12)),
    "SizeMismatch": file_with({"a": entry((3,))}, bytes(8)),
    "IncompleteBuffer": file_with({"a": entry()}, bytes(7)),
    "TrailingData": file_with({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_raises_its_named_error(tmp_path, name):
    path = tmp_path / "hostile"
    path.write_bytes(HOSTILE[name])
    error = getattr(st, name)
    assert issubclass(error, st.SafetensorError) and error.__name__ == name
    with pytest.raises(error):
        st.load_file(path)
    with pytest.raises(error):
        st.load(HOSTILE[name])


def test_every_truncation_is_refused(tmp_path):
    good = st.save({"a": torch.arange(3), "b": torch.ones(2)})
    for size in range(len(good)):
        with pytest.raises(st.SafetensorError):
            st.load(good[:size])


def test_huge_claims_cost_nothing(tmp_path):
    """A sparse file of absurd size is refused by its header alone."""
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.write(file_with({"a": entry((2**50,), (0, 2**52))}))
        file.truncate(2**40)
    with pytest.raises(st.IncompleteBuffer):
        st.load_file(path)


SAVE_FOREVER = """
    import sys
    import vibetensor.torch as torch
    from vibetensor.io.safetensors import save_file
    tensors = {f"t{i}": torch.full((1 << 18,), float(i)) for i in range(16)}
    print("ready", flush=True)
    while True:
        save_file(tensors, sys.argv[1] + "/model.safetensors")
"""


def test_killed_saver_leaves_a_whole_file(tmp_path, start_python):
    path = tmp_path / "model.safetensors"
    for pause in (0.003, 0.017, 0.04, 0.09):
        st.save_file({"old": torch.arange(5)}, path)
        child = start_python(textwrap.dedent(SAVE_FOREVER), tmp_path)
        assert child.stdout.readline() == "ready\n"
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        loaded = st.load_file(path)  # the old or the new one, whole
        if "old" in loaded:
            assert loaded["old"].tolist() == [0, 1, 2, 3, 4]
        else:
            assert len(loaded) == 16 and loaded["t3"].sum().item() == 3.0 * (1 << 18)


def test_full_disk_keeps_the_old_file(tmp_path):
    """A limit on file size makes write() fail half way, as a full disk does."""
    path = tmp_path / "model.safetensors"
    st.save_file({"old": torch.arange(5)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            st.save_file({"big": torch.zeros(1 << 18)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_unwritable_folder_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such"):
        st.save_file({}, tmp_path / "no/such/file")


def test_the_file_that_was_there_keeps_its_permissions_and_its_links(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch(mode=0o640)
    target.chmod(0o640)
    link.symlink_to("target")
    st.save_file({"x": torch.ones(2)}, link, {"a": "b"})
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert st.load_file(target)["x"].tolist() == [1.0, 1.0]
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "target"]


def test_paths_and_texts_that_no_file_has(tmp_path):
    tensors = {"x": torch.ones(2)}
    with pytest.raises(ValueError, match="null byte"):
        st.save_file(tensors, str(tmp_path / "a\0b"))
    with pytest.raises(ValueError, match="null byte"):
        st.load_file(str(tmp_path / "a\0b"))
    for broken in ({"k": "\ud800"}, {"\ud800": "v"}):
        with pytest.raises(st.SafetensorError, match="not Unicode text"):
            st.save_file(tensors, tmp_path / "x", broken)
    with pytest.raises(st.SafetensorError, match="not Unicode text"):
        st.save_file({"\ud800": torch.ones(2)}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
