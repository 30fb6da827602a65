"""Binary ops over broadcast shapes, sizes 0 and 1 and 0-d included, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

import vibetensor.torch as vt

PAIRS = mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=4, max_dims=4)
OPS = ["add", "sub", "mul", "maximum", "minimum", "eq", "lt"]
NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "maximum": np.maximum,
         "minimum": np.minimum, "eq": np.equal, "lt": np.less}  # fmt: skip


@given(PAIRS, st.sampled_from(OPS), st.integers(0, 2**32 - 1))
def test_binary_op(pair, op, seed):
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.integers(-9, 9, shape)) for shape in pair.input_shapes)
    got = getattr(vt, op)(vt.tensor(a), vt.tensor(b))
    assert tuple(got.shape) == pair.result_shape
    np.testing.assert_array_equal(got.numpy(), NUMPY[op](a, b))


@given(st.lists(st.integers(0, 4), max_size=3), st.lists(st.integers(0, 4), max_size=3))
def test_shapes_that_do_not_broadcast_are_refused(first, second):
    try:
        want = np.broadcast_shapes(tuple(first), tuple(second))
    except ValueError:
        with pytest.raises(RuntimeError):
            vt.add(vt.zeros(first), vt.zeros(second))
    else:
        assert tuple(vt.add(vt.zeros(first), vt.zeros(second)).shape) == want
