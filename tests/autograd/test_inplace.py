"""Views and in-place ops: histories are rebased, and stale saved values are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as vt

MODIFIED = "modified by an inplace operation"


def leaf(api):
    return api.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)


def test_inplace_on_an_intermediate(api) -> None:
    x = leaf(api)
    y = x * 2
    y.add_(1)
    y *= 3
    y.sum().backward()
    assert x.grad.tolist() == [6.0] * 4


def test_a_view_sees_its_base_change_and_so_does_its_gradient(api) -> None:
    x = leaf(api)
    y = x * 1
    view = y[1:3]
    y.mul_(10)
    assert view.tolist() == [20.0, 30.0]
    view.sum().backward()
    assert x.grad.tolist() == [0.0, 10.0, 10.0, 0.0]


def test_writing_a_view_changes_the_base_history(api) -> None:
    x = leaf(api)
    y = x * 1
    y[1:3].mul_(10)
    assert "CopySlices" in type(y.grad_fn).__name__ or "CopySlices" in y.grad_fn.name()
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 10.0, 10.0, 1.0]


def test_writing_a_view_of_a_view(api) -> None:
    x = api.ones(2, 6, requires_grad=True)
    y = x * 1
    part = y.view(3, 4)[1].reshape(2, 2).t()
    part[0].fill_(7)
    y.t()[0].mul_(3)
    y.sum().backward()
    # Elements 4..7 are part; part[0] is 4 and 6. Column 0 of y is 0 and 6.
    expected = [3.0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1]
    assert x.grad.flatten().tolist() == expected


def test_assignment_through_indices(api) -> None:
    x, values = leaf(api), api.tensor([5.0, 6.0], requires_grad=True)
    y = x * 2
    y[api.tensor([0, 3])] = values
    y[y > 100] = 0
    y[1] = 9.0
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 2.0, 0.0]
    assert values.grad.tolist() == [1.0, 1.0]


def test_copy_into_a_buffer_tracks_the_source(api) -> None:
    x = leaf(api)
    buffer = api.zeros(2, 4)
    buffer[0] = x
    buffer[1].copy_(x * 3)
    assert buffer.requires_grad
    buffer.sum().backward()
    assert x.grad.tolist() == [4.0] * 4


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda api, y: y.exp(), "ExpBackward"),
        (lambda api, y: y * y, "MulBackward"),
        (lambda api, y: y.sigmoid(), "SigmoidBackward"),
        (lambda api, y: api.nn.functional.softmax(y, 0), "SoftmaxBackward"),
        (lambda api, y: y.sqrt(), "SqrtBackward"),
    ],
)
def test_changed_saved_value_is_refused_by_name(api, op, name) -> None:
    x = leaf(api)
    y = x * 1
    out = op(api, y)
    (y if name == "MulBackward" else out).add_(1)
    with pytest.raises(RuntimeError, match=MODIFIED) as caught:
        out.sum().backward()
    if api.__name__ == "vibetensor.torch":
        assert name in str(caught.value)
        assert "version" in str(caught.value)
    assert x.grad is None


def test_versions_are_shared_by_views_and_count_changes(api) -> None:
    x = api.zeros(4)
    view = x[1:]
    before = x._version
    view.add_(1)
    x[0] = 3
    assert x._version == view._version == before + 2
    assert x.detach()._version == x._version
    x.detach().zero_()
    assert x._version == before + 3
    x.data.zero_()
    assert x._version == before + 3


def test_change_through_detach_is_noticed(api) -> None:
    x = leaf(api)
    y = x * 1
    out = (y * y).sum()
    y.detach().zero_()
    with pytest.raises(RuntimeError, match=MODIFIED):
        out.backward()


def test_change_through_data_is_not(api) -> None:
    x = leaf(api)
    y = x * 1
    out = (y * y).sum()
    y.data.zero_()
    out.backward()
    assert x.grad.tolist() == [0.0] * 4


def test_leaf_that_requires_grad_is_not_changed_in_place(api) -> None:
    x = leaf(api)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x.add_(1)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        x[0] = 1
    assert x.tolist() == [1.0, 2.0, 3.0, 4.0]
    with api.no_grad():
        x.add_(1)
        x[0] = 0
    assert x.tolist() == [0.0, 3.0, 4.0, 5.0] and x.is_leaf


def test_expanded_tensor_is_not_changed_in_place(api) -> None:
    x = api.zeros(1).expand(3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        x.add_(1)


def test_one_of_several_views_changed_in_place() -> None:
    """Here, not in torch: split, chunk and unbind are slices, whose changes autograd can follow."""
    x = leaf(vt)
    y = x * 1
    a, b = y.split(2)
    a.mul_(10)
    b[0] = 7
    assert y.tolist() == [10.0, 20.0, 7.0, 4.0]
    (y + 0).sum().backward()
    assert x.grad.tolist() == [10.0, 10.0, 0.0, 1.0]


def test_view_made_in_no_grad_is_not_changed_in_place(api) -> None:
    y = leaf(api) * 1
    with api.no_grad():
        view = y[:2]
    with pytest.raises(RuntimeError, match="no_grad"):
        view.mul_(2)


def test_detach_shares_memory_and_cuts_history(api) -> None:
    x = leaf(api)
    y = (x * 2).detach()
    assert not y.requires_grad and y.grad_fn is None and y.is_leaf
    z = x.detach()
    z[0] = 9
    assert x[0].item() == 9.0
    (x * y).sum().backward()
    assert x.grad.tolist() == y.tolist()


def test_a_detached_tensor_stays_detached(api) -> None:
    """Also when what it was cut from is changed, or it is itself."""
    x = leaf(api)
    y = x * 1
    cut = y.detach()
    part = cut[:2]
    y.mul_(2)
    cut[0] = 9
    part.add_(1)
    assert y.tolist() == [10.0, 5.0, 6.0, 8.0] and y.requires_grad
    for tensor in (cut, part):
        assert not tensor.requires_grad and tensor.grad_fn is None and tensor.is_leaf
    assert not cut._is_view()


def test_detach_in_place(api) -> None:
    x = leaf(api)
    y = x * 2
    y.detach_()
    assert y.is_leaf and not y.requires_grad
    view = (x * 2)[:2]
    with pytest.raises(RuntimeError, match="Can't detach views in-place"):
        view.detach_()


def test_requires_grad_in_place(api) -> None:
    x = api.ones(2)
    assert x.requires_grad_() is x and x.requires_grad
    assert not x.requires_grad_(False).requires_grad
    assert x.requires_grad_(requires_grad=True).requires_grad
    y = x * 2
    with pytest.raises(RuntimeError, match="you can only change requires_grad flags of leaf"):
        y.requires_grad_(False)
    y.requires_grad_(True)
    with pytest.raises(TypeError):
        x.requires_grad_(1, 2)
    with pytest.raises(TypeError):
        x.requires_grad_(wrong=True)


def test_inplace_of_a_tensor_that_needs_no_grad_with_one_that_does(api) -> None:
    x = leaf(api)
    total = api.zeros(4)
    for i in range(3):
        total += x * i
    assert total.requires_grad and not total.is_leaf
    total.sum().backward()
    assert x.grad.tolist() == [3.0] * 4


def test_inplace_result_must_fit(api) -> None:
    x = api.ones(3)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        x.add_(api.ones(2, 3))
    counts = api.ones(3, dtype=api.int64)
    with pytest.raises(RuntimeError, match="can't be cast"):
        counts.add_(0.5)
    assert counts.tolist() == [1, 1, 1]


def test_retained_gradient_is_that_of_the_changed_tensor(api) -> None:
    x = leaf(api)
    y = x * 2
    y.retain_grad()
    before = y * 1
    y.mul_(3)
    y.mul_(2)
    (y.sum() + before.sum()).backward()
    assert y.grad.tolist() == [1.0] * 4 and y.retains_grad
    assert x.grad.tolist() == [14.0] * 4


def test_retained_gradient_follows_a_write_to_part_of_the_tensor(api) -> None:
    x = leaf(api)
    y = x * 2
    y.retain_grad()
    y[0] = 5
    y[1:].mul_(3)
    y.sum().backward()
    assert y.grad.tolist() == [1.0] * 4
    assert x.grad.tolist() == [0.0, 6.0, 6.0, 6.0]


def test_retained_gradients_of_a_view_and_its_base(api) -> None:
    x = leaf(api)
    y = x * 2
    view = y[:2]
    view.retain_grad()
    y.retain_grad()
    view.mul_(3)
    y.add_(1)
    (view * 2).sum().backward()
    assert view.grad.tolist() == [2.0, 2.0]
    assert y.grad.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert x.grad.tolist() == [12.0, 12.0, 0.0, 0.0]


def test_retained_gradient_of_what_a_function_wrote(api) -> None:
    class Double(api.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.mark_dirty(a)
            return a.mul_(2)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = leaf(api)
    y = x * 2
    y.retain_grad()
    Double.apply(y)
    y.sum().backward()
    assert y.grad.tolist() == [1.0] * 4 and x.grad.tolist() == [4.0] * 4


def test_retained_gradient_of_a_tensor_that_is_gone(api) -> None:
    """The old node and the new one outlive the tensor."""
    x = leaf(api)
    y = x * 2
    y.retain_grad()
    old = y.grad_fn
    y.mul_(3)
    total = y.sum()
    del y
    total.backward()
    assert x.grad.tolist() == [6.0] * 4 and old is not None


def test_retained_gradient_ends_with_the_history() -> None:
    x = leaf(vt)
    y = x * 2
    y.retain_grad()
    z = y.sum()
    y.detach_()
    z.backward()
    assert y.grad is None and not y.requires_grad


def as_slices(api):
    return api.zeros(6, 6)[:, ::2].detach()


def as_columns(api):
    return api.zeros(6, 6)[:, :3].detach()


def as_numpy(api):
    return api.from_numpy(np.zeros((6, 6), np.float32)[:, 1::2])


def as_transposed(api):
    return api.zeros(3, 8)[:, :6].detach().t()


@pytest.mark.parametrize("make", [as_slices, as_columns, as_numpy, as_transposed])
def test_writing_a_view_of_a_base_that_is_a_part_of_more_memory(make, api) -> None:
    base = make(api)
    w = api.ones(3, requires_grad=True)
    base[5].copy_(w)
    base[1] = w * 2
    base[1] += w
    (base * api.arange(18.0).reshape(6, 3)).sum().backward()
    assert w.grad.tolist() == [15.0 + 3 * 3, 16.0 + 3 * 4, 17.0 + 3 * 5]


def test_second_gradients_through_such_a_view(api) -> None:
    x = api.arange(24.0, dtype=api.float64).reshape(4, 6).div(10).requires_grad_()
    base = (x * 1)[:, 1:5:2]
    base[1:3].mul_(api.tensor([2.0, 3.0], dtype=api.float64))
    base[1].square_()
    (first,) = api.autograd.grad((base * base).sum(), x, create_graph=True)
    (second,) = api.autograd.grad(first.sum(), x)
    expected = api.zeros(4, 6, dtype=api.float64)
    rows = x.detach()
    expected[0, 1:5:2] = 2.0
    expected[1, 1], expected[1, 3] = 12 * 16 * rows[1, 1] ** 2, 12 * 81 * rows[1, 3] ** 2
    expected[2, 1], expected[2, 3] = 8.0, 18.0
    expected[3, 1:5:2] = 2.0
    assert api.allclose(second, expected)


RANDOM = {
    "random_": lambda api, x: x.random_(),
    "random_ to": lambda api, x: x.random_(3),
    "random_ from": lambda api, x: x.random_(0, 3),
    "bernoulli_": lambda api, x: x.bernoulli_(0.5),
    "bernoulli_ of a tensor": lambda api, x: x.bernoulli_(api.full((4,), 0.5)),
    "uniform_": lambda api, x: x.uniform_(),
    "normal_": lambda api, x: x.normal_(),
    "exponential_": lambda api, x: x.exponential_(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_have_no_gradient(name, api) -> None:
    x = leaf(api)
    y = x * 1
    RANDOM[name](api, y)
    y.sum().backward()
    assert x.grad.tolist() == [0.0] * 4
    with pytest.raises(RuntimeError, match="leaf"):
        RANDOM[name](api, x)


@pytest.mark.parametrize("name", ["tanh_", "exp_", "sigmoid_", "sqrt_", "reciprocal_", "rsqrt_"])
@pytest.mark.parametrize("cuts", [(slice(1, None),), (slice(0, 3), slice(None, None, 2))], ids=str)
def test_second_gradients_of_results_that_are_views(name, cuts, api) -> None:
    """What a node saved of its own output is a view of the changed base by then."""
    values = [0.1, 0.2, 0.3, 0.4]

    def through(second):
        x = api.tensor(values, dtype=api.float64, requires_grad=True)
        base = x * 1
        view = base
        for cut in cuts:
            view = view[cut]
        getattr(view, name)()
        (first,) = api.autograd.grad(base.pow(2).sum(), x, create_graph=True)
        return api.autograd.grad(first.pow(2).sum(), x)[0] if second else first.pow(2).sum().item()

    step = 1e-6
    expected = []
    for i in range(4):
        high = low = 0.0
        kept = values[i]
        values[i] = kept + step
        high = through(False)
        values[i] = kept - step
        low = through(False)
        values[i] = kept
        expected.append((high - low) / (2 * step))
    assert through(True).tolist() == pytest.approx(expected, rel=1e-5)
