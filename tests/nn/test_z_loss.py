"""z_loss of cross_entropy: z_loss * logsumexp**2 for each row, against the definition in float64."""

import numpy as np
import pytest

import vibetensor.torch as vt

F = vt.nn.functional
Z = 0.03


def problem(shape=(7, 5), seed=0, dtype=vt.float64):
    rng = np.random.default_rng(seed)
    x = vt.tensor(rng.standard_normal(shape) * 3, dtype=vt.float64).to(dtype).requires_grad_()
    target = vt.tensor(rng.integers(0, shape[1], (shape[0], *shape[2:])))
    weight = vt.tensor(rng.random(shape[1]) + 0.5, dtype=vt.float64)
    return x, target, weight


def by_definition(x, target, weight, reduction, ignore_index, label_smoothing):
    """In plain ops, row by row."""
    x = x.double().movedim(1, -1).reshape(-1, x.shape[1])
    flat = target.reshape(-1)
    rows = F.cross_entropy(
        x, flat, weight, ignore_index=ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    kept = flat != ignore_index
    w = vt.ones(x.shape[1], dtype=vt.float64) if weight is None else weight
    w = w[(flat * kept)] * kept.double()
    rows = rows + Z * w * vt.log(vt.exp(x).sum(1)) ** 2
    if reduction == "none":
        return rows.reshape(target.shape)
    return rows.sum() / w.sum() if reduction == "mean" else rows.sum()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 2, 2)])
def test_definition(reduction, label_smoothing, weighted, ignore_index, shape):
    x, target, weight = problem(shape)
    weight = weight if weighted else None
    results = []
    for function in (
        lambda: F.cross_entropy(
            x, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=Z,
        ),
        lambda: by_definition(x, target, weight, reduction, ignore_index, label_smoothing),
    ):  # fmt: skip
        x.grad = None
        loss = function()
        assert loss.dtype == vt.float64
        (loss * loss).sum().backward()
        results.append((loss.detach().numpy(), x.grad.numpy()))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients(reduction):
    x, target, weight = problem()

    def loss(x):
        return F.cross_entropy(
            x, target, weight, ignore_index=1, reduction=reduction, label_smoothing=0.1, z_loss=Z
        )

    assert vt.autograd.gradcheck(loss, (x,))
    assert vt.autograd.gradgradcheck(loss, (x,))


def test_class_probabilities_have_it_too():
    x, _, weight = problem()
    target = vt.softmax(problem(seed=1)[0].detach(), 1)
    lse = vt.logsumexp(x, 1)
    for reduction, part in (
        ("none", Z * lse * lse),
        ("sum", Z * (lse * lse).sum()),
        ("mean", Z * (lse * lse).mean()),
    ):
        with_z = F.cross_entropy(x, target, weight, reduction=reduction, z_loss=Z)
        without = F.cross_entropy(x, target, weight, reduction=reduction)
        np.testing.assert_allclose(
            with_z.detach().numpy(), (without + part).detach().numpy(), rtol=1e-12
        )
    one = F.cross_entropy(x[0], target[0], z_loss=Z) - F.cross_entropy(x[0], target[0])
    np.testing.assert_allclose(float(one), float(Z * lse[0] ** 2), rtol=1e-10)


@pytest.mark.parametrize("dtype,rtol", [(vt.float32, 1e-5), (vt.bfloat16, 2e-2)])
def test_narrow_logits(dtype, rtol):
    x, target, _ = problem((33, 70), dtype=dtype)
    loss = F.cross_entropy(x, target, z_loss=Z)
    assert loss.dtype == dtype
    loss.backward()
    wide = x.detach().double().requires_grad_()
    reference = by_definition(wide, target, None, "mean", -100, 0.0)
    reference.backward()
    np.testing.assert_allclose(float(loss), float(reference), rtol=rtol)
    np.testing.assert_allclose(
        x.grad.double().numpy(), wide.grad.numpy(), rtol=rtol, atol=rtol * 0.02
    )


def test_ignored_rows_of_any_logits_have_no_gradient():
    x = vt.tensor([[1.0, 2.0], [200.0, -300.0], [float("inf"), 0.0]], requires_grad=True)
    F.cross_entropy(x, vt.tensor([0, -100, -100]), z_loss=Z).backward()
    assert x.grad[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert x.grad[0].abs().min() > 0


@pytest.mark.parametrize("chunks", [None, vt.nn.LinearCrossEntropyOptions()])
def test_a_batch_of_ignored_rows_has_no_gradient(chunks):
    x = vt.randn(3, 4, requires_grad=True)
    target = vt.full((3,), -100)
    head = vt.randn(5, 4)
    loss = F.linear_cross_entropy(x, head, target, z_loss=Z, options=chunks)
    loss.backward()
    assert np.isnan(loss.item()) and not x.grad.any()


def test_zero_is_plain_cross_entropy():
    x, target, _ = problem(dtype=vt.float32)
    a = F.cross_entropy(x, target, z_loss=0.0)
    b = F.cross_entropy(x, target)
    assert a.item() == b.item()
    layer = vt.nn.CrossEntropyLoss(z_loss=Z)
    assert layer(x, target).item() == F.cross_entropy(x, target, z_loss=Z).item() != b.item()


def test_autocast_computes_it_in_float32():
    x, target, _ = problem((9, 6), dtype=vt.bfloat16)
    with vt.autocast(x.device.type, dtype=vt.bfloat16):
        loss = F.cross_entropy(x, target, z_loss=Z)
    assert loss.dtype == vt.float32
    want = by_definition(x.detach().double(), target, None, "mean", -100, 0.0)
    np.testing.assert_allclose(loss.item(), want.item(), rtol=1e-5)
