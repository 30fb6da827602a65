"""Activation checkpointing: the gradients of the plain call, the region run again, nothing kept."""

import gc
import weakref

import pytest

import vibetensor.torch as vt
from vibetensor.torch.utils.checkpoint import CheckpointError, checkpoint, checkpoint_sequential

WAYS = [False, True]


def block(x, w):
    return vt.tanh(x @ w).sin() * x


def inputs(seed=0):
    vt.manual_seed(seed)
    return vt.randn(3, 4, requires_grad=True), vt.randn(4, 4, requires_grad=True)


def gradients(call):
    x, w = inputs()
    out = call(x, w)
    (out * out).sum().backward()
    return [out.detach().tolist(), x.grad.tolist(), w.grad.tolist()]


@pytest.mark.parametrize("use_reentrant", WAYS)
def test_gradients_are_those_of_the_plain_call(use_reentrant):
    def wrapped(x, w):
        return checkpoint(block, x, w, use_reentrant=use_reentrant)

    assert gradients(wrapped) == gradients(block)


@pytest.mark.parametrize("use_reentrant", WAYS)
def test_the_region_runs_twice(use_reentrant):
    calls = []

    def region(x):
        calls.append(vt.is_grad_enabled())
        return x.exp()

    x = vt.ones(2, requires_grad=True)
    out = checkpoint(region, x, use_reentrant=use_reentrant)
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2
    assert calls[-1] is True


def test_activations_are_freed_between_forward_and_backward():
    alive = []

    def region(x):
        hidden = x.exp()
        alive.append(weakref.ref(hidden))
        return hidden.sin().exp()

    x = vt.ones(2, requires_grad=True)
    out = checkpoint(region, x, use_reentrant=False)
    gc.collect()
    assert alive[0]() is None
    out.sum().backward()


def test_retained_graph_runs_the_region_for_each_backward():
    x, w = inputs()
    out = checkpoint(block, x, w, use_reentrant=False)
    out.sum().backward(retain_graph=True)
    once = x.grad.clone()
    out.sum().backward()
    assert x.grad.tolist() == (2 * once).tolist()


def test_autograd_grad_and_structured_outputs():
    def region(x, *, scale):
        return {"a": x.exp() * scale, "b": [x.sin()]}

    x = vt.ones(2, requires_grad=True)
    out = checkpoint(region, x, use_reentrant=False, scale=3.0)
    (grad,) = vt.autograd.grad((out["a"] + out["b"][0]).sum(), [x])
    expected = 3.0 * x.exp() + x.cos()
    assert grad.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("preserve", [True, False])
def test_dropout_sees_the_same_mask(use_reentrant, preserve):
    def region(x):
        return vt.nn.functional.dropout(x.exp(), 0.5, True) * x

    vt.manual_seed(3)
    x = vt.ones(1000, requires_grad=True)
    out = checkpoint(region, x, use_reentrant=use_reentrant, preserve_rng_state=preserve)
    between = vt.get_rng_state()
    out.sum().backward()
    # d/dx (mask e^x x) = mask e^x (x + 1) = 2 out at x = 1.
    matches = ((x.grad - 2 * out.detach()).abs() < 1e-4).all().item()
    assert matches is preserve
    if preserve:
        assert vt.get_rng_state().tolist() == between.tolist()


@pytest.mark.parametrize("use_reentrant", WAYS)
def test_autocast_is_the_same_in_both_runs(use_reentrant):
    seen = []

    def region(x, w):
        seen.append(vt.is_autocast_enabled("cpu"))
        return (x @ w).float()

    x, w = inputs()
    with vt.autocast("cpu"):
        out = checkpoint(region, x, w, use_reentrant=use_reentrant)
    out.sum().backward()
    assert seen == [True, True]
    assert x.grad.dtype == vt.float32


def test_nested_regions():
    def inner(x, w):
        return vt.tanh(x @ w)

    def outer(x, w):
        hidden = checkpoint(inner, x, w, use_reentrant=False)
        return checkpoint(inner, hidden * 2, w, use_reentrant=False) * x

    def plain(x, w):
        return inner(inner(x, w) * 2, w) * x

    def wrapped(x, w):
        return checkpoint(outer, x, w, use_reentrant=False)

    assert gradients(wrapped) == gradients(plain)


def test_inner_regions_do_not_hold_what_the_outer_forgot():
    alive = []

    def outer(x):
        hidden = x.exp()
        alive.append(weakref.ref(hidden))
        return checkpoint(lambda h: h.sin(), hidden, use_reentrant=False).exp()

    x = vt.ones(2, requires_grad=True)
    out = checkpoint(outer, x, use_reentrant=False)
    gc.collect()
    assert alive[0]() is None
    out.sum().backward()
    h = vt.ones(2).exp()
    assert x.grad.tolist() == pytest.approx((h.sin().exp() * h.cos() * h).tolist())


def test_a_backward_inside_the_region():
    """A gradient penalty: the region takes a gradient of its own."""

    def region(x):
        y = (x**3).sum()
        (slope,) = vt.autograd.grad(y, [x], create_graph=True)
        return (slope * slope).sum()

    x = vt.ones(2, requires_grad=True)
    checkpoint(region, x, use_reentrant=False).backward()
    assert x.grad.tolist() == pytest.approx([36.0, 36.0])


def test_second_gradients_are_refused_not_wrong():
    x = vt.ones(2, requires_grad=True)
    out = checkpoint(lambda v: (v**3).sum(), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        vt.autograd.grad(out, [x], create_graph=True)


@pytest.mark.parametrize("use_reentrant", WAYS)
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_sequential(use_reentrant, segments):
    layers = [vt.tanh, vt.sin, vt.exp, vt.tanh, vt.cos]

    def wrapped(x, w):
        return checkpoint_sequential(layers, segments, x * w[:3], use_reentrant=use_reentrant)

    def plain(x, w):
        value = x * w[:3]
        for layer in layers:
            value = layer(value)
        return value

    assert gradients(wrapped) == gradients(plain)


def test_without_gradients_nothing_is_recorded():
    calls = []

    def region(x):
        calls.append(1)
        return x * 2

    x = vt.ones(2, requires_grad=True)
    with vt.no_grad():
        assert checkpoint(region, x, use_reentrant=False).tolist() == [2.0, 2.0]
    assert calls == [1]


def test_another_shape_in_the_second_run_is_an_error():
    sizes = iter([2, 3])

    def region(x):
        return (x.expand(next(sizes), 4) * 1.0).exp().sum()

    x = vt.ones(4, requires_grad=True)
    out = checkpoint(region, x, use_reentrant=False, early_stop=False)
    with pytest.raises(CheckpointError, match="different metadata"):
        out.backward()


def test_another_number_of_tensors_is_an_error():
    rounds = iter([3, 1])

    def region(x):
        for _ in range(next(rounds)):
            x = x.exp()
        return x

    out = checkpoint(region, vt.ones(2, requires_grad=True), use_reentrant=False)
    with pytest.raises(CheckpointError, match=r"different number of tensors.*3 and 1"):
        out.sum().backward()


def test_an_input_changed_in_place_is_an_error():
    x = vt.ones(2, requires_grad=True)
    y = x * 1.0
    out = checkpoint(lambda v: v.exp().sin(), y, use_reentrant=False)
    with vt.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_contexts_around_both_runs():
    seen = []

    class Note:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(self.name)

        def __exit__(self, *exc_info):
            seen.append("end of " + self.name)

    x = vt.ones(2, requires_grad=True)
    out = checkpoint(
        lambda v: v.exp(),
        x,
        use_reentrant=False,
        context_fn=lambda: (Note("first"), Note("second")),
    )
    out.sum().backward()
    assert seen == ["first", "end of first", "second", "end of second"]


def test_options_are_checked():
    x = vt.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="determinism_check"):
        checkpoint(block, x, x, determinism_check="x")
    with pytest.raises(ValueError, match="Unexpected keyword"):
        checkpoint(block, x, x, use_reentrant=True, scale=1)
    with pytest.raises(ValueError, match="only supported when use_reentrant=False"):
        checkpoint(block, x, x, use_reentrant=True, debug=True)


def test_a_reentrant_region_knows_no_inputs(api):
    """It would add to the gradients of all that its function uses."""
    checkpoint = api.utils.checkpoint.checkpoint
    layer = api.nn.Linear(2, 2)
    x = api.ones(1, 2, requires_grad=True)

    def loss():
        return checkpoint(layer, x, use_reentrant=True).sum()

    with pytest.raises(RuntimeError, match=r"incompatible with \.grad\(\)"):
        api.autograd.grad(loss(), x)
    with pytest.raises(RuntimeError, match="incompatible"):
        loss().backward(inputs=[x])
    assert layer.weight.grad is None
    loss().backward()
    assert layer.weight.grad.tolist() == [[1.0, 1.0]] * 2
    (grad,) = api.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert grad.shape == x.shape
