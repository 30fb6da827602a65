"""Chains of views against NumPy: values, strides, offset, and writes seen through the base."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import vibetensor.torch as vt

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4)
BOUND = st.one_of(st.none(), st.integers(-8, 8), st.sampled_from([-(2**62), 2**62]))
SLICE = st.builds(slice, BOUND, BOUND, st.one_of(st.none(), st.integers(1, 7)))


def base_pair(shape):
    array = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    return vt.tensor(array), array


def same_view(tensor, array, base):
    """Both show the same elements of bases of the same layout, not just equal values."""
    assert tuple(tensor.shape) == array.shape
    np.testing.assert_array_equal(tensor.numpy(), array)
    if array.size:
        for size, ours, theirs in zip(array.shape, tensor.stride(), array.strides):
            assert size == 1 or ours * array.itemsize == theirs
        offset = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        assert tensor.storage_offset() * array.itemsize == offset


def draw_view(data, tensor, array):
    kind = data.draw(st.sampled_from(["slice", "transpose", "permute", "select", "narrow", "expand",
                                      "diagonal", "unfold"]))  # fmt: skip
    ndim = array.ndim
    if ndim == 0:
        return tensor[None], array[None]
    dim = data.draw(st.integers(0, ndim - 1))
    size = array.shape[dim]
    if kind == "slice":
        index = tuple(data.draw(st.lists(SLICE, min_size=1, max_size=ndim)))
        return tensor[index], array[index]
    if kind == "transpose":
        other = data.draw(st.integers(-ndim, ndim - 1))
        return tensor.transpose(dim, other), array.swapaxes(dim, other)
    if kind == "permute":
        order = data.draw(st.permutations(range(ndim)))
        return tensor.permute(*order), array.transpose(order)
    if kind == "select" and size:
        at = data.draw(st.integers(-size, size - 1))
        return tensor.select(dim, at), array[(slice(None),) * dim + (at, ...)]
    if kind == "narrow":
        start = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - start))
        cut = (slice(None),) * dim + (slice(start, start + length),)
        return tensor.narrow(dim, start, length), array[cut]
    if kind == "expand" and ndim < 5:
        new = data.draw(st.integers(0, 3))
        return tensor.expand(new, *array.shape), np.broadcast_to(array, (new, *array.shape))
    if kind == "diagonal" and ndim >= 2:
        offset = data.draw(st.integers(-2, 2))
        first, second = data.draw(st.permutations(range(ndim)))[:2]
        if -array.shape[first] <= offset <= array.shape[second]:
            return tensor.diagonal(offset, first, second), array.diagonal(offset, first, second)
    if kind == "unfold" and size:
        length = data.draw(st.integers(1, size))
        step = data.draw(st.integers(1, 3))
        windows = np.lib.stride_tricks.sliding_window_view(array, length, axis=dim)
        return tensor.unfold(dim, length, step), windows[
            (slice(None),) * dim + (slice(None, None, step),)
        ]
    return tensor, array


@given(SHAPES, st.data())
def test_chain_of_views(shape, data):
    tensor, array = base_pair(shape)
    base = array
    for _ in range(data.draw(st.integers(1, 4))):
        tensor, array = draw_view(data, tensor, array)
        same_view(tensor, array, base)


@given(SHAPES, st.data())
def test_write_through_slices_reaches_the_base(shape, data):
    tensor, array = base_pair(shape)
    index = tuple(data.draw(st.lists(SLICE, min_size=1, max_size=len(shape))))
    tensor.permute(*reversed(range(len(shape))))[index].fill_(-7)
    array.T[index] = -7
    np.testing.assert_array_equal(tensor.numpy(), array)


@given(SHAPES, st.data())
def test_reshape_keeps_the_order_of_elements(shape, data):
    tensor, array = base_pair(shape)
    order = data.draw(st.permutations(range(len(shape))))
    tensor, array = tensor.permute(*order), array.transpose(order)
    cut = data.draw(st.integers(0, len(shape)))
    target = (int(np.prod(array.shape[:cut])), int(np.prod(array.shape[cut:])))
    np.testing.assert_array_equal(tensor.reshape(target).numpy(), array.reshape(target))
