"""Advanced indexing, scatters and functions of varying arity against torch."""

from collections import deque

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vibetensor.torch as vt  # noqa: E402

BASE = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
ROWS, COLUMNS = np.array([2, 0, -1]), np.array([[1], [3]])
MASK = BASE[0, :, 0] > 4

EXPRESSIONS = {
    "vector": lambda t: (t(ROWS),),
    "two vectors": lambda t: (t(ROWS), t(ROWS)),
    "broadcast": lambda t: (t(ROWS), t(COLUMNS)),
    "split by a slice": lambda t: (t(ROWS), slice(None), t(ROWS)),
    "after a slice": lambda t: (slice(1, None), t(ROWS), t(ROWS)),
    "last of all": lambda t: (Ellipsis, t(ROWS)),
    "with None": lambda t: (None, t(ROWS), Ellipsis, None),
    "with an int": lambda t: (1, t(ROWS)),
    "mask of a dimension": lambda t: (slice(None), t(MASK)),
    "mask of all": lambda t: (t(BASE > 7),),
    "mask of two": lambda t: (t(BASE[:, :, 0] > 7),),
    "mask and vector": lambda t: (slice(None), t(MASK), t(np.array([0, 1, 2]))),
    "empty": lambda t: (t(np.zeros(0, dtype=np.int64)),),
    "list": lambda t: ([0, 2],),
    # What is no tensor: NumPy's arrays, and sequences of any kind.
    "array": lambda t: (ROWS,),
    "two arrays": lambda t: (ROWS, COLUMNS),
    "array after a slice": lambda t: (slice(1, None), ROWS),
    "array beside a tensor": lambda t: (ROWS, slice(None), t(ROWS)),
    "array of masks": lambda t: (slice(None), MASK),
    "array like the tensor": lambda t: (BASE > 7,),
    "array of two dimensions": lambda t: (BASE[:, :, 0] > 7,),
    "array of no dimensions": lambda t: (np.array(1), slice(None), np.array(-1)),
    "truth of no dimensions": lambda t: (np.array(True),),
    "array of int32": lambda t: (ROWS.astype(np.int32),),
    "array of uint16": lambda t: (np.array([2, 0], dtype=np.uint16),),
    "empty array": lambda t: (np.array([]),),
    "strided array": lambda t: (np.arange(6)[1::2] % 3,),
    "number of NumPy's": lambda t: (np.int64(1), slice(np.int64(1), np.int32(3))),
    "range": lambda t: (range(2),),
    "range after a slice": lambda t: (slice(None), range(0, 3, 2)),
    "empty range": lambda t: (range(0),),
    "list of arrays": lambda t: [np.array([0, 1]), np.array([1, 0])],
    "list of lists": lambda t: [[0, 1], [1, 0]],
    "list of tuples": lambda t: [(0, 1), (1, 0)],
    "list of ranges": lambda t: [range(2), range(2)],
    "list of a number and a list": lambda t: [0, [1, 2]],
    "list of a slice": lambda t: [slice(None), 1],
    "deque": lambda t: deque([0, 1]),
    "list of numbers of NumPy's": lambda t: ([np.int64(1), np.int64(0)],),
}


# torch says that it may come to read a list of lists as one index.
lists_are_tuples = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")


def both(build):
    return build(vt.as_tensor), build(torch.from_numpy)


@lists_are_tuples
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_read_matches_torch(name):
    ours, theirs = both(EXPRESSIONS[name])
    got, want = vt.as_tensor(BASE)[ours], torch.from_numpy(BASE)[theirs]
    assert tuple(got.shape) == tuple(want.shape)
    np.testing.assert_array_equal(got.numpy(), want.numpy())


@lists_are_tuples
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_write_matches_torch(name):
    ours, theirs = both(EXPRESSIONS[name])
    a, b = vt.as_tensor(BASE.copy()), torch.from_numpy(BASE.copy())
    a[ours] = -1.5
    b[theirs] = -1.5
    np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_values_of_numpys_are_written():
    x = vt.arange(6.0).reshape(2, 3)
    x[0] = np.array([7.0, 8.0, 9.0])
    x[np.array([1, 1]), np.array([0, 2])] = np.array([-1.0, -2.0], dtype=np.float32)
    x[1, 1] = np.array(5)
    assert x.tolist() == [[7.0, 8.0, 9.0], [-1.0, 5.0, -2.0]]
    x[:] = np.arange(6)[::-1].reshape(2, 3)
    assert x.tolist() == [[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]


def test_gradient_through_an_array_index():
    x = vt.ones(3, requires_grad=True)
    x[np.array([0, 2, 2])].sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    "index", [1.5, np.array([1.0]), {1}, object(), "a", np.array([3]), np.array([True, False])]
)
def test_indices_that_mean_nothing(index):
    with pytest.raises(IndexError):
        vt.ones(3)[index]


def test_accumulate_counts_repeats():
    x = vt.zeros(4)
    x.index_put_((vt.tensor([1, 1, 3]),), vt.tensor([1.0, 2.0, 5.0]), True)
    assert x.tolist() == [0.0, 3.0, 0.0, 5.0]


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x[vt.tensor([5])],
        lambda x: x.index_select(0, vt.tensor([5])),
        lambda x: x.gather(0, vt.tensor([[5, 0]])),
        lambda x: x.scatter(0, vt.tensor([[5, 0]]), 1.0),
    ],
)
def test_out_of_bounds_is_an_index_error(act):
    with pytest.raises(
        (IndexError, RuntimeError), match="index 5 is out of bounds for dimension 0"
    ):
        act(vt.zeros(3, 2))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.scatter_add(0, vt.zeros(4, 2, dtype=vt.int64), vt.ones(2, 2)),
        lambda x: x.scatter(1, vt.zeros(4, 1, dtype=vt.int64), vt.ones(4, 1)),
        lambda x: x.index_add(0, vt.tensor([0, 1]), vt.ones(3, 2)),
        lambda x: x.index_copy(0, vt.tensor([0, 1]), vt.ones(1, 2)),
    ],
)
def test_sources_that_do_not_fit_are_refused(act):
    with pytest.raises((IndexError, RuntimeError)):
        act(vt.zeros(3, 2))


def test_unique_and_nonzero():
    values = np.array([[3, 1, 3], [2, 1, 1]])
    got = vt.unique(vt.as_tensor(values), return_inverse=True, return_counts=True)
    want = torch.unique(torch.from_numpy(values), return_inverse=True, return_counts=True)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    rows, columns = vt.nonzero(vt.as_tensor(values) == 1, as_tuple=True)
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 1], [1, 1, 2])
    assert vt.where(vt.tensor([False, True]))[0].tolist() == [1]


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("counts", [[1, 2, 3], [0, 2, 0, 1], [4], [0], []])
def test_repeat_interleave_of_the_repeats_alone(counts, dtype):
    counts = np.array(counts, dtype=dtype)
    want = torch.repeat_interleave(torch.from_numpy(counts))
    for got in (
        vt.repeat_interleave(vt.as_tensor(counts)),
        vt.repeat_interleave(repeats=vt.as_tensor(counts)),
        vt.repeat_interleave(vt.as_tensor(counts), output_size=int(counts.sum())),
    ):
        assert str(got.dtype) == str(want.dtype)
        np.testing.assert_array_equal(got.numpy(), want.numpy())


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda api: api.repeat_interleave(api.tensor([1, -2])), RuntimeError),
        (lambda api: api.repeat_interleave(api.tensor([[1, 2]])), RuntimeError),
        (lambda api: api.repeat_interleave(api.tensor(3)), RuntimeError),
        (lambda api: api.repeat_interleave(api.tensor([1, 2]), output_size=4), RuntimeError),
        (lambda api: api.repeat_interleave(api.tensor([1.0])), NotImplementedError),
        (lambda api: api.repeat_interleave(api.tensor([1]), [2]), TypeError),
        (lambda api: api.repeat_interleave(), TypeError),
    ],
)
def test_repeats_that_are_refused(act, error):
    for api in (vt, torch):
        with pytest.raises(error):
            act(api)


@pytest.mark.parametrize("descending", [False, True])
def test_sort_is_stable_and_puts_nan_last(descending):
    values = np.array([2.0, np.nan, 1.0, 2.0, -np.inf, np.nan, 1.0], dtype=np.float32)
    got = vt.as_tensor(values).sort(descending=descending, stable=True)
    want = torch.from_numpy(values).sort(descending=descending, stable=True)
    np.testing.assert_array_equal(got.values.numpy(), want.values.numpy())
    np.testing.assert_array_equal(got.indices.numpy(), want.indices.numpy())


@pytest.mark.parametrize("op", ["max", "min", "argmax", "argmin", "amax"])
@pytest.mark.parametrize("shape", [(40000,), (3, 1500), (1500, 3)])
def test_extremes_find_the_first_and_keep_nan(op, shape):
    rng = np.random.default_rng(0)
    values = rng.integers(-5, 5, shape).astype(np.float32)
    for with_nan in (False, True):
        if with_nan:
            values.reshape(-1)[values.size // 2] = np.nan
        for dim in range(len(shape)):
            got = getattr(vt.as_tensor(values), op)(dim)
            got = got if isinstance(got, tuple) else (got,)
            clean = np.where(
                np.isnan(values), np.inf if op in ("max", "argmax", "amax") else -np.inf, values
            )
            largest = op in ("max", "argmax", "amax")
            clean = np.where(np.isnan(values), np.inf if largest else -np.inf, values)
            first = (np.argmax if largest else np.argmin)(clean, dim)
            best = np.take_along_axis(values, np.expand_dims(first, dim), dim).squeeze(dim)
            expected = {"argmax": (first,), "argmin": (first,), "amax": (best,)}.get(
                op, (best, first)
            )
            for a, b in zip(got, expected):
                np.testing.assert_array_equal(a.numpy(), b)


def test_long_float_sums_stay_accurate():
    x = np.random.default_rng(0).random(1 << 20, dtype=np.float32)
    exact = x.astype(np.float64).sum()
    assert abs(vt.as_tensor(x).sum().item() - exact) <= 1e-6 * exact


def test_tensors_without_dimensions_have_no_extent_to_ask_for() -> None:
    x = vt.tensor(1.0)
    for ask in (
        lambda: x.size(-1),
        lambda: x.size(0),
        lambda: x.stride(0),
        lambda: x.stride(-1),
        lambda: x.unflatten(-1, (-1, 1)),
        lambda: x.unflatten(0, (1, 1)),
    ):
        with pytest.raises(IndexError, match="tensor has no dimensions"):
            ask()
    for same in (x.movedim(-1, 0), x.movedim(0, 0), vt.moveaxis(x, 0, -1), x.adjoint()):
        assert same.shape == () and same.item() == 1.0
    with pytest.raises(IndexError, match="Dimension out of range"):
        x.movedim(0, 1)


def test_index_put_without_an_index() -> None:
    x = vt.zeros(2, 3)
    for indices in ([None], (), [None, None]):
        with pytest.raises(IndexError, match="at least one tensor"):
            x.index_put_(indices, vt.tensor(1.0))
        with pytest.raises(IndexError, match="at least one tensor"):
            vt.index(x, indices)
    with pytest.raises(IndexError, match=r"self\[mask\]"):
        x.index_put_((vt.tensor(True),), vt.tensor(1.0))
    assert x.tolist() == [[0.0] * 3] * 2
    x[vt.tensor(False)] = 5
    assert x.tolist() == [[0.0] * 3] * 2
    x[vt.tensor(True)] = 1
    assert x.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_parts_of_what_was_sorted_are_dense(dtype: str) -> None:
    x = vt.tensor([[3, 1, 2, 4], [4, 3, 2, 1]], dtype=getattr(vt, dtype))
    results = [*x.topk(2), *x.kthvalue(2), *x.kthvalue(2, keepdim=True), *x.median(1)]
    results += [*x.topk(1, dim=0), *x.kthvalue(1, dim=0)]
    assert all(result.is_contiguous() for result in results)
    assert x.topk(2)[0].view(-1).tolist() == [4, 3, 4, 3]


def test_pow_by_the_name_of_its_exponent() -> None:
    x = vt.tensor([1.0, 2.0])
    assert vt.pow(x, exponent=2).tolist() == x.pow(exponent=2).tolist() == [1.0, 4.0]
    assert vt.pow(2, exponent=x).tolist() == [2.0, 4.0]
    assert x.clone().pow_(exponent=3).tolist() == [1.0, 8.0]
