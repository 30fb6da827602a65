"""backward() and grad(): what they reach, what they keep, what they refuse."""

from __future__ import annotations

import threading

import pytest

import vibetensor.torch as vt


def leaf(api, *values):
    return api.tensor(values or (1.0, 2.0, 3.0), requires_grad=True)


def test_gradients_add_up_in_leaves(api) -> None:
    x = leaf(api)
    (x * x).sum().backward()
    (x * 3).sum().backward()
    assert x.grad.tolist() == [5.0, 7.0, 9.0]
    x.grad = None
    x.exp().sum().backward()
    assert x.grad.tolist() == pytest.approx(x.exp().tolist())


def test_a_value_used_twice_gets_both_gradients(api) -> None:
    x = leaf(api, 3.0)
    y = x * 2
    (y * y + y).backward()
    assert x.grad.tolist() == [26.0]


@pytest.mark.parametrize(
    ("shape", "other"),
    [((3, 1), (1, 4)), ((4,), (2, 3, 4)), ((), (2, 3)), ((1, 1, 1), (3,)), ((2, 1, 0), (1, 5, 0))],
)
def test_broadcast_gradients_are_summed_back(api, shape, other) -> None:
    a = api.ones(shape, dtype=api.float64, requires_grad=True)
    b = api.full(other, 2.0, dtype=api.float64, requires_grad=True)
    product = a * b
    product.sum().backward()
    assert a.grad.shape == a.shape and b.grad.shape == b.shape
    repeats = product.numel() // a.numel() if a.numel() else 0
    assert a.grad.sum().item() == 2.0 * product.numel()
    assert a.grad.flatten().tolist() == [2.0 * repeats] * a.numel()
    assert b.grad.sum().item() == product.numel()


def test_gradients_take_the_dtype_of_their_input(api) -> None:
    a = api.ones(2, dtype=api.float16, requires_grad=True)
    b = api.ones(2, dtype=api.float64, requires_grad=True)
    c = api.ones(2, dtype=api.bfloat16, requires_grad=True)
    (a * b + c).sum().backward()
    assert (a.grad.dtype, b.grad.dtype, c.grad.dtype) == (api.float16, api.float64, api.bfloat16)


def test_backward_of_many_elements_needs_a_gradient(api) -> None:
    y = leaf(api) * 2
    with pytest.raises(
        RuntimeError, match="grad can be implicitly created only for scalar outputs"
    ):
        y.backward()
    y.backward(api.tensor([1.0, 0.0, 2.0]))


def test_gradient_of_another_shape(api) -> None:
    y = leaf(api) * 2
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
        y.backward(api.ones(2))


def test_backward_without_history(api) -> None:
    with pytest.raises(RuntimeError, match="does not require grad and does not have a grad_fn"):
        api.ones(1).backward()


def test_graph_is_freed_unless_retained(api) -> None:
    x = leaf(api)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == [4.0, 8.0, 12.0]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    assert x.grad.tolist() == [4.0, 8.0, 12.0]


def test_ops_that_save_nothing_can_be_run_again(api) -> None:
    x = leaf(api)
    y = (x + 1).sum()
    y.backward()
    y.backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_backward_to_some_inputs_only(api) -> None:
    a, b = leaf(api), leaf(api)
    middle = a * b
    (middle * middle).sum().backward(inputs=[a])
    assert a.grad.tolist() == [2.0, 16.0, 54.0] and b.grad is None
    with pytest.raises(RuntimeError, match="cannot be empty"):
        (a * b).sum().backward(inputs=[])


def test_backward_from_several_roots(api) -> None:
    x = leaf(api)
    shared = x * 2
    api.autograd.backward([shared.sum(), (shared * shared)], [None, api.ones(3)])
    assert x.grad.tolist() == [10.0, 18.0, 26.0]
    with pytest.raises(RuntimeError, match="2 tensors and 1 grad"):
        api.autograd.backward([(x * 2).sum(), (x * 3).sum()], [None])


def test_grad_returns_and_accumulates_nothing(api) -> None:
    a, b = leaf(api), leaf(api)
    middle = a * b
    found = api.autograd.grad(middle.sum(), (a, b, middle))
    assert [g.tolist() for g in found] == [[1, 2, 3], [1, 2, 3], [1, 1, 1]]
    assert a.grad is None and b.grad is None


def test_grad_with_grad_outputs(api) -> None:
    x = leaf(api)
    weights = api.tensor([1.0, 10.0, 100.0])
    (g,) = api.autograd.grad([x * x, (x * 2).sum()], x, [weights, None])
    assert g.tolist() == [4.0, 42.0, 602.0]


def test_grad_of_an_unused_input(api) -> None:
    a, b = leaf(api), leaf(api)
    y = (a * 2).sum()
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        api.autograd.grad(y, b, retain_graph=True)
    assert api.autograd.grad(y, (a, b), allow_unused=True, retain_graph=True)[1] is None
    zeros = api.autograd.grad(y, (a, b), materialize_grads=True)[1]
    assert zeros.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="allow_unused"):
        api.autograd.grad(y, b, allow_unused=False, materialize_grads=True)


def test_grad_of_what_does_not_require_it(api) -> None:
    a, b = leaf(api), api.ones(3)
    with pytest.raises(RuntimeError, match="does not require grad|not have been used"):
        api.autograd.grad((a * b).sum(), b)


def test_second_and_third_derivative(api) -> None:
    x = api.tensor([0.5, -1.0, 2.0], dtype=api.float64, requires_grad=True)
    y = (x**4).sum()
    (first,) = api.autograd.grad(y, x, create_graph=True)
    (second,) = api.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = api.autograd.grad(second.sum(), x)
    assert first.tolist() == pytest.approx((4 * x.detach() ** 3).tolist())
    assert second.tolist() == pytest.approx((12 * x.detach() ** 2).tolist())
    assert third.tolist() == pytest.approx((24 * x.detach()).tolist())
    assert first.requires_grad and not third.requires_grad


def test_double_backward_reaches_every_input(api) -> None:
    """The gradient penalty: a loss of a gradient, through a layer and its weights."""
    api.manual_seed(0)
    weight = api.randn(4, 3, dtype=api.float64, requires_grad=True)
    x = api.randn(5, 3, dtype=api.float64, requires_grad=True)
    out = api.tanh(x @ weight.t()).sum()
    (g,) = api.autograd.grad(out, x, create_graph=True)
    g.square().sum().backward()

    h = 1e-6

    def penalty(w):
        pre = x.detach() @ w.t()
        return (((1 - pre.tanh() ** 2) @ w) ** 2).sum().item()

    for i, j in ((0, 0), (3, 2), (1, 1)):
        up, down = weight.detach().clone(), weight.detach().clone()
        up[i, j] += h
        down[i, j] -= h
        assert weight.grad[i, j].item() == pytest.approx(
            (penalty(up) - penalty(down)) / (2 * h), rel=1e-6
        )
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_create_graph_keeps_the_graph(api) -> None:
    x = leaf(api)
    y = (x * x * x).sum()
    y.backward(create_graph=True)
    assert x.grad.requires_grad
    y.backward()  # still there
    x.grad = None  # a gradient with a graph and its leaf hold each other


def test_backward_inside_no_grad(api) -> None:
    x = leaf(api)
    y = (x * x).sum()
    with api.no_grad():
        y.backward()
    assert x.grad.tolist() == [2.0, 4.0, 6.0]


def test_integers_cannot_require_grad(api) -> None:
    with pytest.raises(RuntimeError, match="Tensors of floating point"):
        api.ones(2, dtype=api.int64, requires_grad=True)
    with pytest.raises(RuntimeError, match="floating point"):
        api.ones(2, dtype=api.int64).requires_grad_()
    assert not (leaf(api) > 1).requires_grad
    assert not leaf(api).long().requires_grad


def test_grad_is_checked_on_assignment(api) -> None:
    x = leaf(api)
    x.grad = api.ones(3)
    for wrong, error in (
        (api.ones(2), RuntimeError),
        (api.ones(3, dtype=api.float64), RuntimeError),
        (x, RuntimeError),
        (1.0, TypeError),
    ):
        with pytest.raises(error):
            x.grad = wrong
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
    del x.grad
    assert x.grad is None


def test_an_accumulated_gradient_is_not_the_callers(api) -> None:
    """backward(gradient) must not keep the caller's tensor as .grad and then add into it."""
    x = leaf(api)
    given = api.ones(3)
    (x * 1).backward(given)
    (x * 1).backward(given)
    assert given.tolist() == [1.0, 1.0, 1.0] and x.grad.tolist() == [2.0, 2.0, 2.0]
    z = leaf(api)
    z.backward(given)
    z.backward(given)
    assert given.tolist() == [1.0, 1.0, 1.0] and z.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("through", ["the leaf", "an op"])
def test_backward_to_inputs_keeps_no_tensor_of_the_caller(api, through) -> None:
    a, b = leaf(api), leaf(api)
    given = api.ones(3)
    (a if through == "the leaf" else a + b).backward(given, inputs=[a])
    a.grad.mul_(5)
    assert given.tolist() == [1.0, 1.0, 1.0] and b.grad is None
    a.grad = None
    (a + b).sum().backward(inputs=[a, b])
    a.grad.mul_(5)
    assert b.grad.tolist() == [1.0, 1.0, 1.0]
    middle = a * 1
    (middle * 2).sum().backward(inputs=[middle, a])
    assert middle.grad.tolist() == [2.0, 2.0, 2.0] and a.grad.tolist() == [7.0, 7.0, 7.0]


def test_two_leaves_do_not_share_a_gradient(api) -> None:
    a, b = leaf(api), leaf(api)
    (a + b).sum().backward()
    a.grad.mul_(5)
    assert b.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("how", ["backward", "drop"])
def test_long_graph_does_not_overflow_the_stack(how, run_python) -> None:
    """In a thread with a small stack, where recursion over 100,000 nodes would not fit."""
    code = f"""
import threading
import vibetensor.torch as vt
def work():
    x = vt.ones(1, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y * 1.0
    if {how == "backward"}:
        y.backward()
        assert x.grad.item() == 1.0
    del y
threading.stack_size(256 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("done")
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_long_graph_of_functions_and_of_views_is_freed() -> None:
    class Next(vt.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 1

        @staticmethod
        def backward(ctx, g):
            return g

    x = vt.ones(1, requires_grad=True)
    y = x
    for _ in range(20_000):
        y = Next.apply(y)
    y.backward()
    assert x.grad.item() == 1.0
    base = vt.zeros(1, requires_grad=True) * 1
    for i in range(20_000):
        base[0:1].add_(1) if i % 2 else base.mul_(1)
    del base, y


@pytest.mark.parametrize(
    "call",
    [
        lambda t, y, x: y.backward(1.0),
        lambda t, y, x: y.backward([1.0]),
        lambda t, y, x: y.backward(inputs=[3]),
        lambda t, y, x: t.autograd.backward(None),
        lambda t, y, x: t.autograd.backward([y], [1.0]),
        lambda t, y, x: t.autograd.backward("ab"),
        lambda t, y, x: t.autograd.grad(y, [None]),
        lambda t, y, x: t.autograd.grad([None], [x]),
        lambda t, y, x: t.autograd.grad(y, [1.0]),
        lambda t, y, x: t.autograd.grad(y, x, [[1.0]]),
    ],
)
def test_what_is_no_tensor_is_refused(api, call) -> None:
    x = leaf(api)
    y = (x * 2).sum()
    with pytest.raises((TypeError, RuntimeError, AssertionError, AttributeError)):
        call(api, y, x)
    y.backward()
    assert x.grad.tolist() == [2.0] * 3


def test_the_error_names_what_is_no_tensor() -> None:
    x = leaf(vt)
    with pytest.raises(TypeError, match=r"inputs must be Tensors, but number 1 is NoneType"):
        vt.autograd.grad((x * 2).sum(), [x, None])
    with pytest.raises(
        TypeError, match=r"gradients must be Tensors or None, but number 0 is float"
    ):
        vt.autograd.backward([(x * 2).sum()], [1.0])


@pytest.mark.parametrize("join", ["cat", "stack", "hstack"])
def test_joining_keeps_only_sizes(api, join) -> None:
    """What is joined may be changed in place afterwards, as a skip connection's is."""
    x = leaf(api)
    y, z = x * 2, x * 3
    joined = getattr(api, join)([y, z])
    y.add_(1)
    (joined.sum() + y.sum()).backward()
    assert x.grad.tolist() == [7.0] * 3


def test_joined_tensors_are_freed() -> None:
    from vibetensor import _C

    x = leaf(vt)
    y, z = x * 2, x * 3
    joined = vt.cat([y, z])
    before = _C._live_counts()["storages"]
    del y, z
    assert _C._live_counts()["storages"] == before - 2
    assert joined.requires_grad


@pytest.mark.parametrize("change", [lambda x: x[0].mul_(2), lambda x: x.view(-1).mul_(2)])
def test_views_of_a_leaf_that_is_a_view_are_not_changed(api, change) -> None:
    x = api.arange(6.0).view(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="view of a leaf Variable that requires grad"):
        change(x)
    (x * 2).sum().backward()
    assert x.is_leaf and x.grad.tolist() == [[2.0] * 3] * 2


def test_integers_stay_outside_the_graph(api) -> None:
    w = leaf(api)
    counts = api.zeros(3, dtype=api.int64)
    counts.copy_(w * 3)
    counts[0] = (w * 2).sum()
    assert not counts.requires_grad and counts.tolist() == [12, 6, 9]


@pytest.mark.parametrize("off", [lambda x: x.requires_grad_(False), lambda x: x.detach_()])
def test_a_leaf_that_needs_no_gradient_any_more_gets_none(api, off) -> None:
    x, w = leaf(api), leaf(api)
    y = (x * w).sum()
    off(x)
    y.backward()
    assert x.grad is None and w.grad.tolist() == [1.0, 2.0, 3.0]


def test_a_leaf_that_is_converted_gets_gradients_of_its_new_dtype(api) -> None:
    """Also while a graph of the old one is alive."""
    layer = api.nn.Linear(2, 2)
    alive = layer(api.ones(1, 2)).sum()
    layer.to(api.bfloat16)
    layer(api.ones(1, 2).bfloat16()).sum().backward()
    assert layer.weight.grad.dtype == api.bfloat16
    del alive


def test_an_input_that_retains_its_gradient_gets_it_once(api) -> None:
    x = leaf(api)
    y = x * x
    y.retain_grad()
    (y * 3).sum().backward(inputs=[y], retain_graph=True)
    assert y.grad.tolist() == [3.0] * 3 and x.grad is None
    (y * 3).sum().backward(inputs=[y, x])
    assert y.grad.tolist() == [6.0] * 3 and x.grad.tolist() == [6.0, 12.0, 18.0]


def test_zeros_in_the_place_of_gradients_can_be_differentiated(api) -> None:
    x, y = leaf(api), leaf(api)
    for create_graph in (False, True):
        (grad,) = api.autograd.grad(x.sum(), [y], materialize_grads=True, create_graph=create_graph)
        assert grad.tolist() == [0.0] * 3 and grad.requires_grad is create_graph


def test_threads_add_to_the_same_leaves() -> None:
    leaves = [vt.ones(20000, requires_grad=True) for _ in range(20)]

    def work() -> None:
        for _ in range(3):
            sum((w * 2).sum() for w in leaves).backward()

    for _ in range(5):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((w.grad == 5 * 4 * 3 * 2).all().item() for w in leaves)
