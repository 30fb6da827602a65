"""Index expressions, read and written, against NumPy where its rules are torch's."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, basic_indices, integer_array_indices

import vibetensor.torch as vt

SHAPES = array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


def forward(index):
    """torch has no negative steps: the same bounds with a positive one."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(
        slice(p.start, p.stop, abs(p.step) if p.step else None) if isinstance(p, slice) else p
        for p in parts
    )


def check(shape, ours, theirs):
    array = np.arange(int(np.prod(shape))).reshape(shape)
    tensor = vt.tensor(array)
    np.testing.assert_array_equal(tensor[ours].numpy(), array[theirs])
    tensor[ours] = -3
    array[theirs] = -3
    np.testing.assert_array_equal(tensor.numpy(), array)


@given(SHAPES, st.data())
def test_basic(shape, data):
    index = forward(data.draw(basic_indices(shape, allow_newaxis=True, max_dims=6)))
    check(shape, index, index)


@given(SHAPES, st.data())
def test_index_tensors_broadcast(shape, data):
    index = data.draw(integer_array_indices(shape))
    check(shape, tuple(vt.tensor(i) for i in index), index)


@given(SHAPES, st.integers(0, 2**32 - 1), st.data())
def test_mask(shape, seed, data):
    dims = data.draw(st.integers(1, len(shape)))
    mask = np.random.default_rng(seed).integers(0, 2, shape[:dims]).astype(bool)
    check(shape, vt.tensor(mask), mask)
