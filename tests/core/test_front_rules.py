"""What the front takes and refuses, stated for both libraries: data, sizes, flags, bool arithmetic."""

from __future__ import annotations

import array
import itertools
from collections import UserList, deque

import numpy as np
import pytest

import vibetensor.torch as vt


@pytest.fixture(params=["vibetensor", pytest.param("torch", marks=pytest.mark.torch)])
def api(request):
    """The library under test: vibetensor.torch, and PyTorch where it is installed."""
    return vt if request.param == "vibetensor" else pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (range(3), [0, 1, 2]),
        ([range(3)] * 2, [[0, 1, 2]] * 2),
        ([[1, 2], range(2)], [[1, 2], [0, 1]]),
        ((range(2), [True, 5]), [[0, 1], [1, 5]]),
        (deque([1.5, 2]), [1.5, 2.0]),
        (deque([deque([1]), [2]]), [[1], [2]]),
        (array.array("d", [1, 2]), [1.0, 2.0]),
        (UserList([1, 2]), [1, 2]),
        (bytearray(b"ab"), [97, 98]),
        (deque([np.array([1, 2]), np.array([3, 4])]), [[1, 2], [3, 4]]),
        (range(0), []),
    ],
)
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")
def test_any_sequence_is_data(api, data, wanted) -> None:
    assert api.tensor(data).tolist() == wanted
    assert api.as_tensor(data).tolist() == wanted


@pytest.mark.parametrize(
    "data", [None, {}, {1, 2}, [None], [[1], [{}]], object(), (i for i in "a")]
)
def test_what_is_no_data(api, data) -> None:
    with pytest.raises(RuntimeError, match="Could not infer dtype of"):
        api.tensor(data)


def test_ragged_sequences(api) -> None:
    with pytest.raises(ValueError, match="expected sequence of length 2 at dim 1"):
        api.tensor([range(2), range(3)])


def test_old_constructor(api) -> None:
    assert api.Tensor(api.Size([2, 3])).shape == (2, 3)
    assert api.Tensor((2, 3)).tolist() == [2.0, 3.0]
    assert api.Tensor(range(3)).tolist() == [0.0, 1.0, 2.0]
    for data in (2.5, None):
        with pytest.raises(TypeError):
            api.Tensor(data)


def test_sizes_are_ints(api) -> None:
    for data, wanted in (
        ([api.tensor(2), 3], (2, 3)),
        (api.tensor([1, 2]), (1, 2)),
        ([True], (1,)),
        ([np.int64(2)], (2,)),
        (range(2), (0, 1)),
    ):
        assert api.Size(data) == wanted
    assert type(api.Size([api.tensor(2)])[0]) is int
    for data in ("ab", [1.5], (2, "a"), [None], [api.tensor(2.0)], [np.float32(2)], 3):
        with pytest.raises(TypeError):
            api.Size(data)


def test_requires_grad_is_a_bool(api) -> None:
    for value in ("a", 1, None):
        with pytest.raises(TypeError, match="must be bool"):
            api.ones(2).requires_grad_(value)
        with pytest.raises(RuntimeError, match="must be a bool"):
            api.ones(2).requires_grad = value


def test_attributes_are_in_dict(api) -> None:
    x = api.ones(2)
    assert x.__dict__ == {}
    x.label = "x"
    assert vars(x) == {"label": "x"}


def test_equal_of_two_dtypes(api) -> None:
    assert api.equal(api.ones(2), api.ones(2, dtype=api.int64))
    assert not api.equal(api.ones(2), api.zeros(2, dtype=api.bool))
    assert not api.equal(api.ones(2), api.ones(3, dtype=api.float64))


INVERTED = [
    lambda m, api: 1 - m,
    lambda m, api: 1.0 - m,
    lambda m, api: m - 1,
    lambda m, api: m - api.ones(2),
    lambda m, api: api.ones(2) - m,
    lambda m, api: api.ones(2).sub_(m),
    lambda m, api: api.rsub(m, 1),
    lambda m, api: -m,
    lambda m, api: m.clone().neg_(),
]


@pytest.mark.parametrize("call", INVERTED)
def test_a_mask_is_not_subtracted_but_inverted(api, call) -> None:
    with pytest.raises(RuntimeError, match=r"use the `~` or `logical_not\(\)` operator"):
        call(api.tensor([True, False]), api)


@pytest.mark.parametrize(
    "call", [lambda m: m - m, lambda m: True - m, lambda m: m - True, lambda m: m.sub_(m)]
)
def test_two_masks_differ_by_xor(api, call) -> None:
    with pytest.raises(RuntimeError, match=r"Use the `\^` or `logical_xor\(\)` operator"):
        call(api.tensor([True, False]))


def test_masks_are_compared(api) -> None:
    m = api.tensor([True, False])
    assert api.isclose(m, m).tolist() == [True, True]


@pytest.mark.parametrize("name", ["tril_indices", "triu_indices"])
def test_indices_of_a_triangle(api, name) -> None:
    lower = name == "tril_indices"
    for rows, columns, offset in itertools.product(range(4), range(4), range(-5, 6)):
        found = getattr(api, name)(rows, columns, offset).tolist()
        places = itertools.product(range(rows), range(columns))
        wanted = [(r, c) for r, c in places if (c - r <= offset if lower else c - r >= offset)]
        assert list(zip(*found)) == wanted


def test_triangles_of_many_rows_or_columns() -> None:
    assert vt.tril_indices(2, 2**40).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert vt.triu_indices(2**40, 2).tolist() == [[0, 0, 1], [0, 1, 1]]
    for make, rows, columns, says in (
        (vt.triu_indices, 2, 2**40, "tried to allocate"),
        (vt.tril_indices, 2**40, 2, "tried to allocate"),
        (vt.tril_indices, 2**40, 2**40, "too many elements"),
        (vt.triu_indices, 2**62, 2**62, "too large"),
    ):
        with pytest.raises(RuntimeError, match=says):
            make(rows, columns)
