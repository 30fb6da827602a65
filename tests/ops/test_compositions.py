"""Functions in Python that are a few ops in a row, against torch: values, gradients and errors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vibetensor.torch as vt  # noqa: E402

FLOATS = ["float16", "bfloat16", "float32", "float64"]
DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", *FLOATS]


def values(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.float64)


def pair(array, dtype="float64", grad=False):
    """The same tensor of both libraries."""
    tensors = [api.tensor(array.tolist()).reshape(array.shape) for api in (vt, torch)]
    made = [t.to(getattr(api, dtype)) for t, api in zip(tensors, (vt, torch))]
    return [t.requires_grad_() if grad else t for t in made]


def check_same(got, want):
    assert str(got.dtype) == str(want.dtype) and tuple(got.shape) == tuple(want.shape)
    np.testing.assert_allclose(
        got.detach().double().numpy(), want.detach().double().numpy(), rtol=1e-6, equal_nan=True
    )


def check(function, *arrays, dtypes=("float64",)):
    """`function(api, *tensors)` of both libraries: values in every dtype, gradients in float64."""
    for dtype in dtypes:
        ours, theirs = zip(*(pair(a, dtype) for a in arrays))
        check_same(function(vt, *ours), function(torch, *theirs))
    ours, theirs = zip(*(pair(a, grad=True) for a in arrays))
    got, want = function(vt, *ours), function(torch, *theirs)
    check_same(got, want)
    weights = pair(values(tuple(want.shape), 1))
    (got * weights[0]).sum().backward()
    (want * weights[1]).sum().backward()
    for a, b in zip(ours, theirs):
        if b.grad is None:
            assert a.grad is None
        else:
            check_same(a.grad, b.grad)


@pytest.mark.parametrize("diagonal", [0, 1, -2, 7])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (5, 2), (0,), (0, 3)])
def test_diag(shape, diagonal):
    check(lambda api, x: api.diag(x, diagonal), values(shape), dtypes=DTYPES)
    check(lambda api, x: x.t().diag(diagonal=diagonal), values(shape))


def test_diag_of_a_matrix_is_a_copy():
    m = vt.zeros(2, 2)
    vt.diag(m).fill_(1)
    assert m.sum().item() == 0 and not vt.diag(m)._is_view()


@pytest.mark.parametrize("dims", [(-2, -1), (0, 1), (0, -1), (2, 0), (-1, 1)])
@pytest.mark.parametrize("offset", [0, 1, -2])
def test_diag_embed(dims, offset):
    for shape in ((2, 3), (1, 4), (2, 0)):
        check(lambda api, x: api.diag_embed(x, offset, *dims), values(shape), dtypes=DTYPES)
    check(lambda api, x: x.diag_embed(offset=offset), values((4, 2, 3)))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (7, 3), (8, 3), (3, 1), (2, 2, 2), (0, 3), (3, 0)])  # fmt: skip
def test_fill_diagonal(shape, wrap):
    check(lambda api, x: (x * 1).fill_diagonal_(2, wrap), values(shape), dtypes=FLOATS)
    for dtype in DTYPES:
        ours, theirs = pair(values(shape), dtype)
        assert ours.fill_diagonal_(1, wrap=wrap) is ours
        check_same(ours, theirs.fill_diagonal_(1, wrap=wrap))
    if len(shape) == 2:
        check(lambda api, x: (x * 1).t().fill_diagonal_(2, wrap), values(shape))


@pytest.mark.parametrize(
    ("a", "b", "dim"),
    [
        ((3,), (3,), None),
        ((2, 3), (2, 3), None),
        ((3, 3), (3, 3), None),
        ((3, 3), (3, 3), -1),
        ((2, 3, 4), (2, 3, 4), 1),
        ((1, 3), (4, 3), -1),
        ((4, 1, 3), (1, 5, 3), 2),
        ((0, 3), (0, 3), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Using torch.cross without specifying")
def test_cross(a, b, dim):
    dtypes = [d for d in DTYPES if d != "bool"]
    check(lambda api, x, y: api.cross(x, y, dim=dim), values(a), values(b, 2), dtypes=dtypes)
    if dim is not None:
        check(lambda api, x, y: x.cross(y, dim), values(a), values(b, 2))


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3), (4, 5)), ((3,), (2,)), ((2, 3), (4,)), ((2,), (3, 4)), ((), (2, 3)), ((), ()),
     ((2, 1, 3), (4, 5)), ((0, 3), (2, 2))],
)  # fmt: skip
def test_kron(a, b):
    check(lambda api, x, y: api.kron(x, y), values(a), values(b, 2), dtypes=DTYPES)
    check(lambda api, x, y: y.kron(x), values(a), values(b, 2))


def test_kron_promotes():
    (a, a2), (b, b2) = pair(values((2, 2)), "int32"), pair(values((2,)), "float16")
    check_same(vt.kron(a, b), torch.kron(a2, b2))


MODES = ["linear", "lower", "higher", "midpoint", "nearest"]


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.parametrize("name", ["quantile", "nanquantile"])
def test_quantile(name, dim, keepdim, interpolation):
    array = np.random.default_rng(3).standard_normal((3, 11))
    options = dict(dim=dim, keepdim=keepdim, interpolation=interpolation)
    for q in (0.0, 0.1, 0.5, 1):
        check(lambda api, x, q=q: getattr(api, name)(x, q, **options), array, dtypes=["float32"])
    several = np.array([0.25, 0.1, 0.9])
    check(lambda api, x, q: getattr(x, name)(q, **options), array, several, dtypes=["float32"])
    check(lambda api, x, q: getattr(api, name)(x, q, **options), array, np.array(0.3))

    array[0, 3] = array[2, :] = np.nan
    for dtype in ("float32", "float64"):
        ours, theirs = pair(array, dtype)
        check_same(getattr(ours, name)(0.3, **options), getattr(theirs, name)(0.3, **options))


def test_quantile_of_one_element():
    check(lambda api, x: api.quantile(x, 0.3), np.array(2.0))
    check(lambda api, x: api.quantile(x, 0.3, 0, True), np.array(2.0))
    ours, theirs = pair(np.array([2.0]))
    check_same(ours.quantile(ours[:0]), theirs.quantile(theirs[:0]))


def test_out():
    for name, arguments in (
        ("diag", lambda api: (api.ones(3),)),
        ("cross", lambda api: (api.ones(3), api.arange(3.0), 0)),
        ("kron", lambda api: (api.ones(2), api.ones(3))),
        ("quantile", lambda api: (api.arange(4.0), 0.5)),
        ("nanquantile", lambda api: (api.arange(4.0), 0.5)),
    ):
        out, want = vt.empty(0), torch.empty(0)
        assert getattr(vt, name)(*arguments(vt), out=out) is out
        check_same(out, getattr(torch, name)(*arguments(torch), out=want))


REFUSED = {
    "diag of no dimensions": lambda api: api.diag(api.tensor(1.0)),
    "diag of three": lambda api: api.diag(api.ones(1, 1, 1)),
    "diag of a number": lambda api: api.diag(3),
    "diag of half a place": lambda api: api.diag(api.ones(2), 1.5),
    "diag_embed twice": lambda api: api.diag_embed(api.ones(2, 2), 0, 1, -2),
    "diag_embed outside": lambda api: api.diag_embed(api.ones(2, 2), 0, 5, 1),
    "diag_embed of no dimensions": lambda api: api.diag_embed(api.tensor(1.0)),
    "fill a vector": lambda api: api.ones(3).fill_diagonal_(1),
    "fill no cube": lambda api: api.ones(2, 2, 3).fill_diagonal_(1),
    "fill with text": lambda api: api.ones(2, 2).fill_diagonal_("a"),
    "fill with a vector": lambda api: api.ones(2, 2).fill_diagonal_(api.ones(2)),
    "fill beyond the dtype": lambda api: api.ones(2, 2, dtype=api.uint8).fill_diagonal_(300),
    "fill a leaf": lambda api: api.ones(2, 2, requires_grad=True).fill_diagonal_(1),
    "cross of two": lambda api: api.cross(api.ones(2), api.ones(2), dim=0),
    "cross without a three": lambda api: api.cross(api.ones(2), api.ones(2)),
    "cross of dimensions": lambda api: api.cross(api.ones(3), api.ones(1, 3), dim=0),
    "cross of dtypes": lambda api: api.cross(api.ones(3), api.ones(3).int(), dim=0),
    "cross of bools": lambda api: api.cross(api.ones(3).bool(), api.ones(3).bool(), dim=0),
    "cross outside": lambda api: api.cross(api.ones(3), api.ones(3), 5),
    "cross of shapes": lambda api: api.cross(api.ones(2, 3), api.ones(4, 3), dim=1),
    "cross of a number": lambda api: api.cross(api.ones(3), 3),
    "kron of a number": lambda api: api.kron(api.ones(3), 3),
    "quantile above": lambda api: api.quantile(api.ones(3), 1.5),
    "quantile nan": lambda api: api.quantile(api.ones(3), float("nan")),
    "quantile below": lambda api: api.quantile(api.ones(3), api.tensor([-0.1])),
    "quantile of integers": lambda api: api.quantile(api.ones(3).long(), 0.5),
    "quantile of half": lambda api: api.quantile(api.ones(3).half(), 0.5),
    "quantile of nothing": lambda api: api.quantile(api.ones(0, 3), 0.5, dim=1),
    "quantile of dtypes": lambda api: api.quantile(api.ones(3), api.ones(1).double()),
    "quantile of a matrix": lambda api: api.quantile(api.ones(3), api.ones(1, 1)),
    "quantile by a list": lambda api: api.quantile(api.ones(3), [0.5]),
    "quantile by a name": lambda api: api.quantile(api.ones(3), 0.5, interpolation="cubic"),
    "quantile outside": lambda api: api.quantile(api.ones(3), 0.5, dim=3),
}


@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.filterwarnings("ignore:Using torch.cross without specifying")
def test_errors_are_of_the_same_class(call):
    errors = []
    for api in (torch, vt):
        with pytest.raises(Exception) as caught:
            REFUSED[call](api)
        errors.append(caught.type)
    assert errors[0] is errors[1]
