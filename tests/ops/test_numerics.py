"""Values, ranges, dtypes and layouts at the edges of what a dtype holds, against torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vibetensor.torch as vt  # noqa: E402

NAN, INF = float("nan"), float("inf")


def both(act):
    return act(vt), act(torch)


def same(act):
    """The values, dtype and shape of both libraries."""
    ours, theirs = both(act)
    assert str(ours.dtype) == str(theirs.dtype)
    assert tuple(ours.shape) == tuple(theirs.shape)
    np.testing.assert_array_equal(ours.detach().numpy(), theirs.detach().numpy())


def refused(act, kind=RuntimeError, match=None):
    """An error of the same class in both."""
    for library in (torch, vt):
        with pytest.raises(kind, match=match):
            act(library)


# --- squares and powers of 16-bit floats need the range of float32


def _row(t, scale, dtype):
    return (t.linspace(-1, 1, 48).reshape(3, 16) * scale).to(dtype)


NORMS = {
    "norm": lambda t, x: x.norm(),
    "norm of rows": lambda t, x: x.norm(dim=1),
    "third norm": lambda t, x: x.norm(3, 1),
    "std": lambda t, x: x.std(),
    "std of rows": lambda t, x: x.std(1),
    "var": lambda t, x: x.var(1, keepdim=True),
    "dist": lambda t, x: t.dist(x, -x),
    "pairwise_distance": lambda t, x: t.nn.functional.pairwise_distance(x, -x),
    "normalize": lambda t, x: t.nn.functional.normalize(x),
    "cosine_similarity": lambda t, x: t.nn.functional.cosine_similarity(x, x * 0.5),
}


@pytest.mark.parametrize("scale", [300.0, 1e-4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_16_bit_floats(name, dtype, scale):
    ours, theirs = both(lambda t: NORMS[name](t, _row(t, scale, getattr(t, dtype))))
    assert str(ours.dtype) == str(theirs.dtype)
    expected = NORMS[name](torch, _row(torch, scale, getattr(torch, dtype)).double())
    ulp = 2.0 ** (-10 if dtype == "float16" else -7)
    smallest = 2.0**-24 if dtype == "float16" else 0
    np.testing.assert_allclose(
        ours.double().numpy(), expected.numpy(), rtol=3 * ulp, atol=2 * smallest
    )


def test_gradient_of_a_norm_of_large_float16():
    x = vt.full((4,), 300.0, dtype=vt.float16, requires_grad=True)
    x.norm().backward()
    assert x.grad.dtype == vt.float16
    assert x.grad.tolist() == [0.5] * 4


# --- numbers that a dtype does not hold


def _filled(x, index, value):
    x[index] = value
    return x


TOO_LARGE = {
    "tensor": lambda t: t.tensor(300, dtype=t.uint8),
    "tensor of a list": lambda t: t.tensor([1, -200], dtype=t.int8),
    "tensor of nan": lambda t: t.tensor([NAN], dtype=t.int32),
    "tensor of a float": lambda t: t.tensor([1e20], dtype=t.int64),
    "negative float": lambda t: t.tensor([-1.5], dtype=t.uint8),
    "as_tensor": lambda t: t.as_tensor([2**40], dtype=t.int32),
    "full": lambda t: t.full((2,), 300, dtype=t.uint8),
    "full below": lambda t: t.full((2,), -256, dtype=t.uint8),
    "full of int64": lambda t: t.full((2,), 1e20, dtype=t.int64),
    "full of float16": lambda t: t.full((2,), 70000, dtype=t.float16),
    "full of float32": lambda t: t.full((2,), 1e39),
    "full_like": lambda t: t.full_like(t.zeros(2, dtype=t.int16), 40000),
    "fill_": lambda t: t.zeros(2, dtype=t.uint8).fill_(300),
    "masked_fill": lambda t: t.zeros(2, dtype=t.uint8).masked_fill(t.tensor([True, False]), 300),
    "setitem": lambda t: t.zeros(2, dtype=t.uint8).__setitem__(0, 300),
    "setitem of a mask": lambda t: t.zeros(2, dtype=t.int8).__setitem__(t.tensor([True] * 2), 300),
    "pad": lambda t: t.nn.functional.pad(t.zeros(2, dtype=t.uint8), (1, 1), value=300),
    "clamp": lambda t: t.tensor([1, 44], dtype=t.uint8).clamp(max=300),
    "clamp_": lambda t: t.tensor([1, 44], dtype=t.int8).clamp_(-200, 5),
    "clamp of float16": lambda t: t.ones(2, dtype=t.float16).clamp(max=1e6),
    "hardtanh": lambda t: t.nn.functional.hardtanh(t.ones(2, dtype=t.int8), -300, 300),
    "threshold": lambda t: t.nn.functional.threshold(t.ones(2, dtype=t.uint8), 0, 300),
    "alpha": lambda t: t.add(t.ones(1, dtype=t.int8), t.ones(1, dtype=t.int8), alpha=300),
    "value": lambda t: t.addcmul(*(t.ones(1, dtype=t.int8),) * 3, value=300),
    "power": lambda t: t.ones(1, dtype=t.int8) ** 300,
    "where": lambda t: t.where(t.tensor([True]), t.ones(1, dtype=t.uint8), 300),
    "scatter": lambda t: t.zeros(2, dtype=t.uint8).scatter(0, t.tensor([0]), 300),
    "index_fill": lambda t: t.zeros(2, dtype=t.uint8).index_fill(0, t.tensor([0]), 300),
    "linspace": lambda t: t.linspace(0, 300, 3, dtype=t.uint8),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_numbers_out_of_range_are_refused(name):
    refused(TOO_LARGE[name], match="value cannot be converted to type .* without overflow")


@pytest.mark.parametrize(
    "act",
    [
        lambda t: t.full((2,), -255, dtype=t.uint8),
        lambda t: t.tensor([-1, 255], dtype=t.uint8),
        lambda t: t.full((2,), -INF, dtype=t.float16),
        lambda t: t.tensor([1e6], dtype=t.float16),
        lambda t: _filled(t.ones(3, dtype=t.float16), 1, -1e9),
        lambda t: _filled(t.ones(3, dtype=t.float16), t.tensor([True, False, True]), 1e9),
        lambda t: t.tensor([NAN, 5.0], dtype=t.bool),
        lambda t: t.full((2,), 127.9, dtype=t.int16),
        lambda t: t.ones(1, dtype=t.int8) + 300,
        lambda t: t.ones(2, dtype=t.int32).clamp(max=INF),
        lambda t: t.where(t.tensor([False]), t.ones(1, dtype=t.float16), 1e6),
    ],
)
def test_numbers_that_convert(act):
    same(act)


@pytest.mark.parametrize(
    "act",
    [
        lambda t: t.randint(0, 1000, (2,), dtype=t.int8),
        lambda t: t.randint(-5, 10, (2,), dtype=t.uint8),
        lambda t: t.randint(0, 3, (2,), dtype=t.bool),
        lambda t: t.randint(0, 70000, (2,), dtype=t.float16),
        lambda t: t.randint_like(t.zeros(2, dtype=t.uint8), 300),
        lambda t: t.zeros(2, dtype=t.int8).random_(0, 1000),
    ],
)
def test_random_integers_out_of_range_are_refused(act):
    refused(act, match="out of bounds for")


def test_random_integers_reach_the_ends():
    for dtype, low, high in ((vt.uint8, 0, 256), (vt.int8, -128, 128), (vt.bool, 0, 2)):
        drawn = vt.randint(low, high, (20000,), dtype=dtype).to(vt.int64)
        assert (drawn.min().item(), drawn.max().item()) == (low, high - 1)


# --- values


@pytest.mark.parametrize(
    "act",
    [
        lambda t: t.arange(0.0, 2.5, 1, dtype=t.int32),
        lambda t: t.arange(5, 0, -1.5, dtype=t.int32),
        lambda t: t.arange(-3.5, 0, 1, dtype=t.int16),
        lambda t: t.arange(-3.5, 0, 1, dtype=t.int64),
        lambda t: t.arange(0, 5, 0.5, dtype=t.int32),
        lambda t: t.logsumexp(t.zeros(0, 3), 0),
        lambda t: t.logsumexp(t.zeros(2, 0, 3), (0, 1), True),
        lambda t: t.logsumexp(t.zeros(0, 3), 1),
        lambda t: t.any(t.tensor([[0, 1], [0, 2]]), dim=()),
        lambda t: t.all(t.tensor([[0.0, 1], [0, 2]]).t(), dim=(), keepdim=True),
        lambda t: t.all(t.tensor([[0, 1], [0, 2]], dtype=t.uint8), dim=[]),
        lambda t: t.any(t.tensor(2.0), dim=()),
        lambda t: t.sign(t.tensor([NAN, -NAN, 1, -1, 0, -0.0, INF])),
        lambda t: t.sgn(t.tensor([NAN, 2.0], dtype=t.float64)),
        lambda t: t.lerp(t.ones(2), t.zeros(2), t.tensor(0.5, dtype=t.float64)),
        lambda t: t.nn.functional.nll_loss(t.eye(200)[:2], t.tensor([156, 1], dtype=t.uint8)),
        lambda t: t.nn.functional.binary_cross_entropy(t.tensor([0.0, 1.0]), t.tensor([1.0, 1.0])),
    ],
)
def test_values_match_torch(act):
    same(act)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda t: t.arange(0, 2.5, 0.5, dtype=t.int64), ValueError),
        (lambda t: t.lerp(t.ones(2), t.zeros(2, dtype=t.float64), 0.5), RuntimeError),
        (lambda t: t.lerp(t.ones(2), t.zeros(2), t.ones(2, dtype=t.float64)), RuntimeError),
        (lambda t: t.ones(2).lerp_(t.zeros(2, dtype=t.float16), 0.5), RuntimeError),
        (lambda t: t.lerp(t.ones(2, dtype=t.int64), t.ones(2, dtype=t.int64), 0.5), RuntimeError),
        *(
            (lambda t, d=d, f=f: getattr(t.nn.functional, f)(t.zeros(2, 3), d(t)), RuntimeError)
            for f in ("nll_loss", "cross_entropy")
            for d in (
                lambda t: t.tensor([0.0, 1.0]),
                lambda t: t.tensor([0, 1], dtype=t.int32),
                lambda t: t.tensor([True, False]),
            )
        ),
        (
            lambda t: t.nn.functional.binary_cross_entropy(t.tensor([0.5]), t.tensor([1])),
            RuntimeError,
        ),
    ],
)
def test_errors_match_torch(act, kind):
    refused(act, kind)


@pytest.mark.parametrize(("p", "target"), [(1.5, 1.0), (NAN, 1.0), (0.5, -0.5)])
def test_probabilities_out_of_range_are_refused(p, target):
    def act(t):
        return t.nn.functional.binary_cross_entropy(t.tensor([p]), t.tensor([target]))

    refused(act, match="between 0 and 1")


def test_gradients_of_binary_cross_entropy():
    def gradients(t):
        x = t.tensor([[0.0, 0.2, 1.0], [0.5, 0.9, 1.0]], requires_grad=True)
        y = t.tensor([[0.0, 0.7, 1.0], [0.5, 0.1, 0.0]], requires_grad=True)
        t.nn.functional.binary_cross_entropy(x, y, reduction="none")[:, :2].sum().backward()
        return x.grad[:, :2], y.grad[:, 1:2]

    for ours, theirs in zip(*both(gradients)):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5)


def test_broadcast_errors_name_op_and_dtypes():
    with pytest.raises(RuntimeError, match=r"non-singleton dimension 1 \(add of float32\[2, 3\]"):
        vt.ones(2, 3) + vt.ones(4, dtype=vt.float64)
    with pytest.raises(RuntimeError, match="where of bool"):
        vt.where(vt.ones(3, dtype=vt.bool), vt.ones(2), vt.ones(2))


# --- layouts


@pytest.mark.parametrize(
    "act",
    [
        lambda t, x: x[:, t.tensor([1, 0, 1])],
        lambda t, x: x[:, t.tensor([[1], [0]])],
        lambda t, x: x[..., t.tensor([0, 1]), t.tensor([2, 3])],
        lambda t, x: x[:, :, t.arange(4) > 1],
        lambda t, x: x[:, 1, t.tensor([1, 2])],
        lambda t, x: x[:, t.tensor(1)],
        lambda t, x: x[t.tensor([1]), :, t.tensor([2])],
        lambda t, x: t.where(x.transpose(0, 1) > 5, x.transpose(0, 1), 0.0),
        lambda t, x: x.permute(2, 0, 1).flip(0, 2),
        lambda t, x: t.flip(x, (1,)),
        lambda t, x: t.nn.functional.dropout(x.transpose(0, 2), 0.5) * 0,
    ],
)
def test_strides_match_torch(act):
    ours, theirs = both(lambda t: act(t, t.arange(24.0).reshape(2, 3, 4)))
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert tuple(ours.stride()) == tuple(theirs.stride())


def test_gradient_of_an_index_in_the_middle():
    def gradient(t):
        x = t.arange(24.0).reshape(2, 3, 4).requires_grad_()
        (x[:, t.tensor([1, 1, 2])] ** 2).sum().backward()
        return x.grad

    same(gradient)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x[1:].copy_(x[:-1]),
        lambda x: x.__setitem__(slice(1, None), x[:-1]),
        lambda x: x[1:].add_(x[:-1]),
    ],
)
def test_overlapping_writes_are_refused(act):
    refused(lambda t: act(t.arange(6.0)), match="refer to a single memory location")


# --- reductions of rows of every length: whole vectors, their remainders, several places at once

LENGTHS = [*range(140), 1000, 4096, 65535, 65536, 65600 + 13, 131072, 131073, 262144 + 77]


def test_float32_sums_are_those_of_double():
    for x, exact in integers_beyond_float32():
        assert vt.tensor(x[1]).sum().item() == float(np.float32(exact[1])), x.shape


def test_sums_in_float64_are_exact():
    for x, exact in integers_beyond_float32():
        rows = vt.tensor(x).sum(1, dtype=vt.float64).numpy()
        np.testing.assert_array_equal(rows, exact.astype(np.float64))


def integers_beyond_float32():
    """Rows of integers whose sum, and every part of it, double holds exactly and float32 does not;
    and their sums."""
    rng = np.random.default_rng(0)
    for n in LENGTHS:
        x = rng.integers(-(1 << 24), 1 << 24, (3, n)).astype(np.float32)
        yield x, x.astype(np.int64).sum(1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
def test_extremes_are_found_at_every_place(dtype):
    rng = np.random.default_rng(0)
    for n in LENGTHS[1:141]:
        x = rng.integers(10, 100, (n, n)).astype(dtype)
        high, low = x.copy(), x.copy()
        np.fill_diagonal(high, 101)  # row i has its extreme at i
        np.fill_diagonal(low, 9)
        assert (vt.tensor(high).amax(1).numpy() == 101).all(), n
        assert (vt.tensor(low).amin(1).numpy() == 9).all(), n
        np.testing.assert_array_equal(vt.tensor(high).argmax(1).numpy(), np.arange(n))
        if x.dtype.kind == "f":
            np.fill_diagonal(high, np.nan)
            assert np.isnan(vt.tensor(high).amax(1).numpy()).all(), n
            assert np.isnan(vt.tensor(high).amin(1).numpy()).all(), n
            assert (vt.full((2, n), -INF).amax(1).numpy() == -INF).all(), n
