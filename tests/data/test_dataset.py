"""Datasets and splits."""

import pytest

import vibetensor.torch as vt
from vibetensor.torch.utils import data


class Squares(data.Dataset):
    def __init__(self, n, start=0):
        self.n, self.start = n, start

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return (self.start + i) ** 2


class Batched(Squares):
    def __getitems__(self, indices):
        return [("batched", self[i]) for i in indices]


class Stream(data.IterableDataset):
    def __init__(self, *values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


def test_tensor_dataset():
    dataset = data.TensorDataset(vt.arange(6).reshape(3, 2), vt.arange(3))
    assert len(dataset) == 3
    a, b = dataset[1]
    assert (a.tolist(), b.item()) == ([2, 3], 1)
    with pytest.raises(AssertionError, match="Size mismatch"):
        data.TensorDataset(vt.zeros(2), vt.zeros(3))


def test_concatenation():
    both = Squares(3) + Squares(2, start=10)
    assert isinstance(both, data.ConcatDataset)
    assert [both[i] for i in range(len(both))] == [0, 1, 4, 100, 121]
    assert both[-1] == 121
    assert both.cumulative_sizes == [3, 5]
    with pytest.raises(ValueError, match="absolute value"):
        both[-6]
    with pytest.raises(AssertionError, match="empty"):
        data.ConcatDataset([])
    with pytest.raises(AssertionError, match="IterableDataset"):
        data.ConcatDataset([Stream(1)])


def test_chaining():
    both = Stream(1, 2) + Stream(3)
    assert isinstance(both, data.ChainDataset)
    assert list(both) == [1, 2, 3]
    assert len(both) == 3


def test_subset_uses_the_batch_fetch():
    subset = data.Subset(Batched(10), [7, 3, 1])
    assert subset[1] == 9
    assert len(subset) == 3
    assert subset.__getitems__([0, 2]) == [("batched", 49), ("batched", 1)]
    assert data.Subset(Squares(10), [7, 3]).__getitems__([1]) == [9]


def test_stack():
    pair = data.StackDataset(Squares(3), Batched(3))
    assert pair[2] == (4, 4)
    assert pair.__getitems__([0, 1]) == [(0, ("batched", 0)), (1, ("batched", 1))]
    named = data.StackDataset(a=Squares(2), b=Squares(2, start=5))
    assert named[1] == {"a": 1, "b": 36}
    assert len(named) == 2
    with pytest.raises(ValueError, match="Size mismatch"):
        data.StackDataset(Squares(2), Squares(3))
    with pytest.raises(ValueError, match="both types"):
        data.StackDataset(Squares(2), a=Squares(2))


def test_random_split():
    generator = vt.Generator()
    generator.manual_seed(1)
    parts = data.random_split(Squares(10), [0.55, 0.45], generator)
    assert [len(p) for p in parts] == [6, 4]
    assert sorted(p.indices[i] for p in parts for i in range(len(p))) == list(range(10))
    generator.manual_seed(1)
    again = data.random_split(Squares(10), [6, 4], generator)
    assert [p.indices for p in again] == [p.indices for p in parts]
    with pytest.raises(ValueError, match="Sum of input lengths"):
        data.random_split(Squares(10), [3, 4])
    with pytest.raises(ValueError, match="Fraction at index 0"):
        data.random_split(Squares(10), [-0.5, 1.5])
    with pytest.warns(UserWarning, match="Length of split at index 1 is 0"):
        data.random_split(Squares(1), [0.6, 0.4])


def test_generic_annotations():
    class Typed(data.Dataset[int]):
        pass

    with pytest.raises(NotImplementedError):
        Typed()[0]
    assert data.DataLoader[int] is not None
