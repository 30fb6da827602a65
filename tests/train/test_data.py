"""Text and image readers."""

import math
import struct

import pytest

import vibetensor.torch as torch
from vibetensor.train import image_data
from vibetensor.train.text_data import (
    TextBatches,
    Vocabulary,
    read_text,
    token_tensor,
    unigram_entropy,
)


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_vocabulary_round_trip(kind):
    text = "naïve\n\tcafé"
    vocabulary = Vocabulary.of(kind, text.encode())
    numbers = vocabulary.encode(text)
    assert max(numbers) < len(vocabulary)
    assert vocabulary.decode(list(numbers)) == text
    again = Vocabulary(**vocabulary.to_json())
    assert list(again.encode(text)) == list(numbers)


def test_unseen_characters_have_a_number():
    vocabulary = Vocabulary.of("char", b"abc")
    assert vocabulary.encode("aß") == [1, 0] and vocabulary.decode([1, 0]) == "a\ufffd"


def test_default_text_is_deterministic_and_substantial():
    train, held_out, source = read_text(None)
    assert (train, held_out, source) == read_text(None)
    assert len(train) > 1_000_000 and 0.03 < len(held_out) / len(train) < 0.3
    assert 2.5 < unigram_entropy(held_out) < 4


def test_file_and_folder_splits(tmp_path):
    single = tmp_path / "one.txt"
    single.write_bytes(bytes(range(65, 85)) * 5)
    train, held_out, _ = read_text(str(single))
    assert train + held_out == single.read_bytes() and len(held_out) == 10
    folder = tmp_path / "many"
    (folder / "inner").mkdir(parents=True)
    for i in range(60):
        (folder / "inner" / f"{i}.txt").write_text(f"file {i};")
    (folder / "binary").write_bytes(b"\0\1")
    (folder / ".hidden").write_text("secret")
    (folder / "dangling").symlink_to(folder / "nowhere")
    train, held_out, source = read_text(str(folder))
    assert source.startswith("60 files") and held_out and b"secret" not in train + held_out
    assert not set(train.split(b"\n")) & set(held_out.split(b"\n"))


def test_too_little_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data"):
        read_text(str(tmp_path))
    (tmp_path / "a").write_text("x")
    with pytest.raises(ValueError, match="too few"):
        read_text(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        read_text(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="--block"):
        TextBatches(token_tensor(b"abc"), block=3, batch=1, seed=0)


def test_unigram_entropy_of_equal_counts():
    assert unigram_entropy(b"abcd" * 5) == pytest.approx(math.log(4))
    assert str(unigram_entropy(b"aaaa")) == "0.0"


def test_batches_depend_on_seed_and_number_alone():
    tokens = token_tensor(bytes(range(250)))
    one, two = (TextBatches(tokens, block=8, batch=4, seed=3) for _ in range(2))
    for number in (5, 0, 7):
        two(number)
    x, y = one(5)
    assert x.tolist() == two(5)[0].tolist() != one(6)[0].tolist()
    assert (y - x).unique().tolist() == [1]
    ends = {window[-1] for number in range(400) for window in one(number)[1].tolist()}
    assert max(ends) == 249  # the last token can be a target


def test_cifar(tmp_path, write_cifar):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    write_cifar(inner)
    train, test, name = image_data.load_images(str(tmp_path))
    assert name == "CIFAR-10" and list(train.pixels.shape) == [20, 3, 32, 32]
    assert test.labels.tolist() == [0, 1, 2, 3]
    assert train.pixels[3, :, 5, 5].tolist() == [3, 100, 100]
    (inner / "data_batch_2.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="multiple of 3073"):
        image_data.load_images(str(tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path, write_idx, zipped):
    write_idx(tmp_path, zipped)
    train, test, _ = image_data.load_images(str(tmp_path))
    assert list(train.pixels.shape) == [6, 1, 8, 8] and test.labels.tolist() == [0, 1]
    assert train.pixels[5, 0, 1].tolist() == list(range(8, 16))


def idx(shape, data):
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\1\0", idx((2**31, 2**31, 4), b"x"),
     idx((6, 8, 8), b"x"), idx((6, 8), bytes(48)), idx((5, 8, 8), bytes(320))],
)  # fmt: skip
def test_damaged_idx_files(tmp_path, write_idx, content):
    write_idx(tmp_path, False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError):
        image_data.load_images(str(tmp_path))


def test_missing_images_say_how(tmp_path):
    for place in (None, str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises((ValueError, FileNotFoundError), match="vibetensor download"):
            image_data.load_images(place)


def test_image_batches_cover_each_image_once_a_pass(tmp_path, write_cifar):
    write_cifar(tmp_path, count=10)
    train, _, _ = image_data.load_images(str(tmp_path))
    mean, deviation = image_data.channel_statistics(train)
    statistics = [torch.tensor(values).view(-1, 1, 1) for values in (mean, deviation)]
    batches = image_data.ImageBatches(train, 10, 0, *statistics, mirror=True)
    labels = [label for number in range(5) for label in batches(number)[1].tolist()]
    assert sorted(labels) == sorted(train.labels.tolist())
    assert (
        batches(7)[0].tolist()
        == image_data.ImageBatches(train, 10, 0, *statistics, mirror=True)(7)[0].tolist()
    )


def test_download_checks_what_it_gets(tmp_path, monkeypatch):
    import hashlib
    import io
    import tarfile
    import urllib.request

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("inner/test_batch.bin", "../escape"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"ok"))
    content = buffer.getvalue()
    url = "http://x.test/data.tar.gz"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    monkeypatch.setitem(image_data.SOURCES, "cifar10", {url: "0" * 32})
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="checksum"):
        image_data.download("cifar10", str(target))
    assert list(target.iterdir()) == []
    monkeypatch.setitem(image_data.SOURCES, "cifar10", {url: hashlib.md5(content).hexdigest()})
    image_data.download("cifar10", str(target))
    assert sorted(p.name for p in target.iterdir()) == ["escape", "test_batch.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["target"]
