"""Collation against torch: the same structure, dtypes and values."""

from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.torch.utils import data

Point = namedtuple("Point", "x y")


def describe(value):
    """Structure, dtypes and values, with both packages' tensors alike."""
    if hasattr(value, "detach"):
        return (str(value.dtype), tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return type(value).__name__, {k: describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [describe(v) for v in value]
    if isinstance(value, np.ndarray):
        return "ndarray", value.tolist()
    return type(value).__name__, value


CASES = [
    lambda t: [1, 2, 3],
    lambda t: [1.5, 2.5],
    lambda t: [True, False],
    lambda t: ["a", "b"],
    lambda t: [b"a", b"b"],
    lambda t: [np.str_("a"), np.str_("b")],
    lambda t: [{"a": np.str_("x"), "b": [1]}, {"a": np.str_("y"), "b": [2]}],
    lambda t: [t.ones(2), t.zeros(2)],
    lambda t: [t.tensor(1), t.tensor(2)],
    lambda t: [np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)],
    lambda t: [np.float32(1.5), np.float32(2.5)],
    lambda t: [np.int16(1), np.int16(2)],
    lambda t: [np.bool_(True), np.bool_(False)],
    lambda t: [np.array(3.0), np.array(4.0)],
    lambda t: [np.int64(0), np.float64(0.7)],
    lambda t: [np.array(1), np.array(2.5)],
    lambda t: [np.float16(1), np.float32(70000.0)],
    lambda t: [np.float32(1), 2.5],
    lambda t: [np.int8(1), np.int64(300)],
    lambda t: [(1, t.ones(2)), (2, t.ones(2))],
    lambda t: [[1, "a"], [2, "b"]],
    lambda t: [{"a": 1, "b": [t.ones(1)]}, {"a": 2, "b": [t.ones(1)]}],
    lambda t: [Point(1, 2.0), Point(3, 4.0)],
    lambda t: [OrderedDict(a=1), OrderedDict(a=2)],
    lambda t: [defaultdict(list, a=1), defaultdict(list, a=2)],
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_default_collate(case, torch):
    ours = data.default_collate(CASES[case](vt))
    assert describe(ours) == describe(torch.utils.data.default_collate(CASES[case](torch)))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_default_convert(case, torch):
    ours = data.default_convert(CASES[case](vt))
    assert describe(ours) == describe(torch.utils.data.default_convert(CASES[case](torch)))


def test_bytes_of_numpy(torch):
    batch = [{"a": np.bytes_(b"x")}, {"a": np.bytes_(b"y")}]
    ours, theirs = data.default_collate(batch), torch.utils.data.default_collate(batch)
    assert describe(ours) == describe(theirs)
    assert describe(data.default_convert(batch)) == describe(batch)  # torch refuses these


def test_convert_leaves_arrays_of_text_and_objects(torch):
    for value in (np.array("ab"), np.array(["a", "b"]), np.array(b"ab"), np.array([None])):
        assert data.default_convert(value) is value
        assert torch.utils.data.default_convert(value) is value


@pytest.mark.parametrize(
    "make",
    [
        lambda t: [object(), object()],
        lambda t: [None, None],
        lambda t: [[1, 2], [3]],
        lambda t: [t.ones(2), t.ones(3)],
        lambda t: [np.array(["a"]), np.array(["b"])],
        lambda t: [np.array("a"), np.array("b")],
        lambda t: [np.void(b"a"), np.void(b"b")],
    ],
)
def test_errors_are_torchs(make, torch):
    with pytest.raises(Exception) as ours:
        data.default_collate(make(vt))
    with pytest.raises(Exception) as theirs:
        torch.utils.data.default_collate(make(torch))
    assert type(ours.value) is type(theirs.value)


def test_collate_of_further_types():
    class Graph:
        def __init__(self, n):
            self.n = n

    def graphs(batch, *, collate_fn_map):
        return sum(g.n for g in batch)

    from vibetensor.torch.utils.data.collate import collate

    batch = [(Graph(1), 1), (Graph(2), 2)]
    total, labels = collate(batch, collate_fn_map={Graph: graphs})
    assert total == 3
    assert labels.tolist() == [1, 2]
