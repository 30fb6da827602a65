"""linear_cross_entropy, whole and in chunks, against linear and cross_entropy, and its memory."""

import gc
import warnings

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE
from vibetensor import _C

F = vt.nn.functional
Options = vt.nn.LinearCrossEntropyOptions


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def problem(n=13, e=4, c=9, dtype=vt.float64, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        t = vt.tensor(rng.standard_normal(shape), dtype=vt.float64).to(dtype)
        return t.requires_grad_()

    target = vt.tensor(rng.integers(0, c, n))
    class_weight = vt.tensor(rng.random(c) + 0.5, dtype=vt.float64).to(dtype)
    return leaf(n, e), leaf(c, e), leaf(c), target, class_weight


def gradients(loss, leaves):
    for leaf in leaves:
        leaf.grad = None
    (loss * loss).sum().backward()
    return [loss.detach().double().numpy(), *(leaf.grad.double().numpy() for leaf in leaves)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [1, 4, 5, 13, 50])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"label_smoothing": 0.2},
        {"z_loss": 0.05},
        {"label_smoothing": 0.1, "z_loss": 0.05, "ignore_index": 3},
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_against_linear_and_cross_entropy(reduction, rows, extra, full):
    x, w, b, target, class_weight = problem()
    bias, weight = (b, class_weight) if full else (None, None)
    leaves = [x, w, b] if full else [x, w]
    loss = F.linear_cross_entropy(
        x, w, target, linear_bias=bias, weight=weight, reduction=reduction,
        options=Options(batch_chunk_size=rows), **extra,
    )  # fmt: skip
    ours = gradients(loss, leaves)
    loss = F.cross_entropy(F.linear(x, w, bias), target, weight, reduction=reduction, **extra)
    for a, other in zip(ours, gradients(loss, leaves), strict=True):
        np.testing.assert_allclose(a, other, rtol=1e-11, atol=1e-13)
    whole = F.linear_cross_entropy(
        x, w, target, linear_bias=bias, weight=weight, reduction=reduction, **extra
    )
    assert (whole == loss).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [False, True])
def test_follows_torch(reduction, options, torch):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch 2.13 has it first")
    x, w, b, target, class_weight = problem()
    theirs = [torch.tensor(t.detach().numpy(), requires_grad=True) for t in (x, w, b)]
    results = []
    for api, (x_, w_, b_), t, c in (
        (vt, (x, w, b), target, class_weight),
        (torch, theirs, torch.tensor(target.numpy()), torch.tensor(class_weight.numpy())),
    ):
        chosen = api.nn.LinearCrossEntropyOptions(batch_chunk_size=4) if options else None
        loss = api.nn.functional.linear_cross_entropy(
            x_, w_, t, linear_bias=b_, weight=c, reduction=reduction, ignore_index=2, options=chosen
        )
        loss.sum().backward()
        results.append([loss.detach(), x_.grad, w_.grad, b_.grad])
    for a, other in zip(*results, strict=True):
        np.testing.assert_allclose(a.numpy(), other.numpy(), rtol=1e-10, atol=1e-12)


def test_gradcheck():
    x, w, b, target, class_weight = problem(5, 3, 4)
    for reduction in ("none", "mean"):

        def loss(x, w, b, reduction=reduction):
            return F.linear_cross_entropy(
                x, w, target, linear_bias=b, weight=class_weight, reduction=reduction,
                ignore_index=1, label_smoothing=0.1, z_loss=0.1,
                options=Options(batch_chunk_size=2, allow_retain_graph=True),
            )  # fmt: skip

        assert vt.autograd.gradcheck(loss, (x, w, b))


def test_the_embeddings_weight_as_the_head():
    rng = np.random.default_rng(3)
    tokens, target = vt.tensor(rng.integers(0, 11, 12)), vt.tensor(rng.integers(0, 11, 12))
    table = vt.tensor(rng.standard_normal((11, 6)), dtype=vt.float64).requires_grad_()

    def grads(options):
        table.grad = None
        h = vt.tanh(F.embedding(tokens, table))
        F.linear_cross_entropy(h, table, target, options=options).backward()
        return table.grad.numpy()

    np.testing.assert_allclose(grads(Options(batch_chunk_size=5)), grads(None), rtol=1e-11)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_is_wanted(needs):
    x, w, b, target, _ = problem()
    leaves = [t.detach().requires_grad_(n) for t, n in zip((x, w, b), needs, strict=True)]
    for reduction in ("mean", "none"):
        for leaf in leaves:
            leaf.grad = None
        F.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction,
            options=Options(batch_chunk_size=4),
        ).sum().backward()  # fmt: skip
        assert [leaf.grad is not None for leaf in leaves] == list(needs)


@pytest.mark.parametrize("policy", ["auto", "accurate", "balanced", "compact"])
@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
def test_narrow_dtypes(dtype, policy):
    x, w, b, target, _ = problem(64, 16, 40, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    reference = F.cross_entropy(F.linear(*wide), target)
    reference.backward()
    loss = F.linear_cross_entropy(
        x, w, target, linear_bias=b, options=Options(batch_chunk_size=16, acc_policy=policy)
    )
    loss.backward()
    assert loss.dtype == dtype and w.grad.dtype == dtype
    tolerance = 1e-5 if dtype == vt.float32 else 2e-2
    np.testing.assert_allclose(loss.item(), reference.item(), rtol=tolerance)
    for ours, other in zip((x, w, b), wide, strict=True):
        want = other.grad.numpy()
        np.testing.assert_allclose(
            ours.grad.double().numpy(), want, rtol=tolerance, atol=tolerance * np.abs(want).max()
        )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(reduction):
    x, w, b, target, _ = problem(32, 8, 20, vt.float32)
    results = []
    for options in (None, Options(batch_chunk_size=32), Options(batch_chunk_size=7)):
        for leaf in (x, w, b):
            leaf.grad = None
        with vt.autocast(x.device.type, dtype=vt.bfloat16):
            loss = F.linear_cross_entropy(
                x, w, target, linear_bias=b, reduction=reduction, options=options
            )
        assert loss.dtype == vt.float32
        loss.sum().backward()
        assert all(leaf.grad.dtype == vt.float32 for leaf in (x, w, b))
        results.append([loss.detach().numpy(), *(leaf.grad.numpy() for leaf in (x, w, b))])
    for result in results[1:]:
        np.testing.assert_allclose(result[0], results[0][0], rtol=1e-5)
        for a, other in zip(result[1:], results[0][1:], strict=True):
            np.testing.assert_allclose(a, other, rtol=0, atol=2e-2 * np.abs(other).max())


def test_single_rows_and_no_rows():
    x, w, b, target, _ = problem()
    for options in (None, Options()):
        one = F.linear_cross_entropy(
            x[0], w, target[0], linear_bias=b, reduction="none", options=options
        )
        assert one.shape == ()
        np.testing.assert_allclose(
            one.item(), F.cross_entropy(F.linear(x[:1], w, b), target[:1]).item(), rtol=1e-12
        )
    none = F.linear_cross_entropy(x[:0], w, target[:0], reduction="sum", options=Options())
    none.backward()
    assert none.item() == 0 and not w.grad.any()


def test_backward_runs_once_unless_asked():
    x, w, _, target, _ = problem()
    loss = F.linear_cross_entropy(x, w, target, options=Options())
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    with pytest.raises(RuntimeError, match="allow_retain_graph"):
        loss.backward()
    x.grad = None
    loss = F.linear_cross_entropy(x, w, target, options=Options(allow_retain_graph=True))
    loss.backward(retain_graph=True)
    loss.backward()
    assert (x.grad == 2 * first).all()
    loss = F.linear_cross_entropy(x, w, target, options=Options())
    with pytest.raises(RuntimeError, match="differentiated twice"):
        vt.autograd.grad(loss, x, create_graph=True)


def test_what_is_not_cut_says_so():
    x, w, _, _, _ = problem()
    probabilities = vt.softmax(vt.randn(13, 9, dtype=vt.float64), 1)
    with pytest.warns(UserWarning, match="options"):
        F.linear_cross_entropy(x, w, probabilities, options=Options())
    wide = vt.randn(9, 2, 4, dtype=vt.float64)
    target = vt.zeros(13, 2, dtype=vt.int64)
    with pytest.warns(UserWarning, match="options"):
        loss = F.linear_cross_entropy(x, wide, target, options=Options())
    logits = F.linear(x, wide.reshape(18, 4)).reshape(13, 9, 2)
    assert loss.item() == F.cross_entropy(logits, target).item()


def test_errors():
    x, w, b, target, _ = problem()
    for call, error, message in (
        (lambda: F.linear_cross_entropy(x[None], w, target), RuntimeError, "dimensionality 1 or 2"),
        (lambda: F.linear_cross_entropy(x, w[0], target), RuntimeError, "at least 2"),
        (lambda: F.linear_cross_entropy(x[:, :3], w, target), RuntimeError, "last dimensions"),
        (
            lambda: F.linear_cross_entropy(x, w, target, linear_bias=b[:3]),
            RuntimeError,
            "linear_bias shape",
        ),
        (
            lambda: F.linear_cross_entropy(x, w, target[:3], options=Options()),
            ValueError,
            "batch_size",
        ),
        (lambda: F.linear_cross_entropy(x, w, target, reduction="all"), ValueError, "reduction"),
        (
            lambda: F.linear_cross_entropy(
                x, w, vt.softmax(x @ w.t(), 1), ignore_index=1, options=Options()
            ),
            RuntimeError,
            "probabilities",
        ),
        (lambda: Options(batch_chunk_size=0), ValueError, "batch_chunk_size"),
        (lambda: Options(chunking_method="rows"), ValueError, "chunking_method"),
        (lambda: Options(chunking_method="aspect_ratio:0"), ValueError, "chunking_method"),
        (lambda: Options(acc_policy="best"), ValueError, "acc_policy"),
        (lambda: Options(acc_dtype=vt.int64), ValueError, "acc_dtype"),
        (
            lambda: F.linear_cross_entropy(
                x, w, target, options=Options(False, 5, "aspect_ratio")
            ),
            ValueError,
            "pass only one",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    if DEVICE == "cpu":
        bad = target.clone()
        bad[7] = 9
        with pytest.raises(IndexError, match="out of bounds"):
            F.linear_cross_entropy(x, w, bad, options=Options(batch_chunk_size=4))


def test_chunk_sizes_are_torchs(torch):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch 2.13 has it first")
    for method in ("aspect_ratio", "aspect_ratio:2", "aspect_ratio:5", None):
        for n, e, c in ((1, 1, 1), (8192, 768, 50257), (100, 64, 64), (7, 100, 3), (64, 8, 1000)):
            theirs = torch.nn.LinearCrossEntropyOptions(chunking_method=method)
            theirs = theirs._adjust(n, e, c, torch.float32)
            ours = Options(chunking_method=method).rows(n, e, c)
            assert ours == theirs.batch_chunk_size


def test_the_layer():
    layer = vt.nn.LinearCrossEntropyLoss(4, 9, bias=True, ignore_index=2, options=Options())
    assert sorted(name for name, _ in layer.named_parameters()) == ["linear.bias", "linear.weight"]
    x, _, _, target, _ = problem(dtype=vt.float32)
    want = F.cross_entropy(layer.linear(x), target, ignore_index=2)
    np.testing.assert_allclose(layer(x, target).item(), want.item(), rtol=1e-6)
    wide = vt.nn.LinearCrossEntropyLoss(4, 9, out_features=(2,))
    assert tuple(wide.linear.weight.shape) == (18, 4)
    assert wide(x, vt.zeros(13, 2, dtype=vt.int64)).shape == ()
    with pytest.raises(RuntimeError, match="weight shape"):
        vt.nn.LinearCrossEntropyLoss(4, 9, weight=vt.ones(3))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the CPU's bytes")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory(reduction):
    """The peak beyond what the caller holds: the gradients, one product of a weight's size, and four
    chunks of logits; all logits are eight times the bound."""
    n, e, c, rows = 4096, 16, 2048, 64
    x, w, b, target, _ = problem(n, e, c, vt.float32)

    def peak(options):
        for leaf in (x, w, b):
            leaf.grad = None
        gc.collect()
        before = _C._cpu_memory_stats()["allocated_bytes"]
        _C._cpu_reset_peak_memory()
        F.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, options=options
        ).sum().backward()
        return _C._cpu_memory_stats()["peak_bytes"] - before

    itemsize, logits = 4, n * c * 4
    bound = itemsize * (2 * n * e + 3 * c * e + 4 * rows * c + 8 * n) + 65536
    assert peak(Options(batch_chunk_size=rows)) < bound < logits / 8
    assert peak(None) > logits


def test_nothing_is_left():
    x, w, b, target, _ = problem()

    def run():
        for reduction in ("mean", "none"):
            loss = F.linear_cross_entropy(
                x, w, target, linear_bias=b, reduction=reduction, options=Options(False, 4)
            )
            loss.sum().backward()
        F.linear_cross_entropy(x, w, target, options=Options(False, 4))  # no backward
        for leaf in (x, w, b):
            leaf.grad = None

    run()
    gc.collect()
    before = _C._live_counts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run()
    gc.collect()
    after = _C._live_counts()
    assert all(after[key] <= before[key] for key in ("storages", "nodes"))
