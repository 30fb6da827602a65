"""The loader without workers, and its options."""

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.torch.utils import data


class Squares(data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"x": np.full(2, i, np.float32), "y": i * i}


class Count(data.IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))

    def __len__(self):
        return self.n


def seeded(seed):
    generator = vt.Generator()
    generator.manual_seed(seed)
    return generator


def test_batches():
    loader = data.DataLoader(Squares(5), batch_size=2)
    batches = list(loader)
    assert [b["y"].tolist() for b in batches] == [[0, 1], [4, 9], [16]]
    assert batches[1]["x"].tolist() == [[2.0, 2.0], [3.0, 3.0]]
    assert batches[1]["x"].dtype == vt.float32
    assert len(loader) == 3
    assert len(data.DataLoader(Squares(5), batch_size=2, drop_last=True)) == 2
    assert len(list(data.DataLoader(Squares(5), batch_size=2, drop_last=True))) == 2


def test_without_batching():
    samples = list(data.DataLoader(Squares(2), batch_size=None))
    assert samples[1]["x"].tolist() == [1.0, 1.0]
    assert samples[1]["y"] == 1
    assert list(data.DataLoader(Count(3), batch_size=None)) == [0, 1, 2]


def test_streams():
    assert [b.tolist() for b in data.DataLoader(Count(5), batch_size=2)] == [[0, 1], [2, 3], [4]]
    dropped = data.DataLoader(Count(5), batch_size=2, drop_last=True)
    assert [b.tolist() for b in dropped] == [[0, 1], [2, 3]]
    assert (len(dropped), len(data.DataLoader(Count(5), batch_size=2))) == (2, 3)


def test_shuffling_repeats_with_a_seed_and_differs_between_passes():
    loader = data.DataLoader(Squares(30), batch_size=30, shuffle=True, generator=seeded(1))
    first, second = ([b["y"].tolist() for b in loader] for _ in range(2))
    again = data.DataLoader(Squares(30), batch_size=30, shuffle=True, generator=seeded(1))
    assert [b["y"].tolist() for b in again] == first
    assert first != second
    assert sorted(first[0]) == [i * i for i in range(30)]


def test_samplers_and_own_collation():
    picked = data.DataLoader(Squares(9), batch_size=2, sampler=[8, 1, 0], collate_fn=list)
    assert [[s["y"] for s in batch] for batch in picked] == [[64, 1], [0]]
    batches = data.DataLoader(Squares(9), batch_sampler=[[1, 2], [3]])
    assert [b["y"].tolist() for b in batches] == [[1, 4], [9]]
    assert batches.batch_size is None


def test_two_passes_at_once():
    loader = data.DataLoader(Squares(3))
    pairs = [(a["y"].item(), b["y"].item()) for a in loader for b in loader]
    assert len(pairs) == 9


def test_iterator_length():
    assert len(iter(data.DataLoader(Squares(5), batch_size=2))) == 3


OPTIONS = [
    {"num_workers": -1},
    {"timeout": -1},
    {"prefetch_factor": 2},
    {"persistent_workers": True},
    {"sampler": [1], "shuffle": True},
    {"batch_sampler": [[1]], "batch_size": 2},
    {"batch_sampler": [[1]], "shuffle": True},
    {"batch_sampler": [[1]], "drop_last": True},
    {"batch_size": None, "drop_last": True},
    {"batch_size": 0},
    {"multiprocessing_context": "fork"},
    {"num_workers": 1, "multiprocessing_context": "x"},
    {"num_workers": 1, "multiprocessing_context": 3},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_errors_are_torchs(options, torch):
    def error(api):
        with pytest.raises(Exception) as caught:
            api.utils.data.DataLoader([1, 2, 3], **options)
        return type(caught.value)

    assert error(vt) is error(torch)


def test_nothing_ahead_is_refused():
    with pytest.raises(ValueError, match="prefetch_factor"):
        data.DataLoader([1], num_workers=1, prefetch_factor=0)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": [1]}, {"batch_sampler": [[1]]}])
def test_streams_have_no_order_to_choose(options):
    with pytest.raises(ValueError, match="IterableDataset"):
        data.DataLoader(Count(3), **options)


def test_fixed_options_cannot_be_changed():
    loader = data.DataLoader(Squares(3))
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        loader.batch_size = 4
    loader.collate_fn = list
    assert [b[0]["y"] for b in loader] == [0, 1, 4]


def test_pinning_without_a_device_warns():
    if vt.cuda.is_available():
        pytest.skip("a CUDA device is present")
    with pytest.warns(UserWarning, match="pin_memory"):
        batches = list(data.DataLoader(Squares(2), pin_memory=True))
    assert len(batches) == 2
