"""autograd.Function: forward and backward written in Python."""

from __future__ import annotations

import gc

import pytest

import vibetensor.torch as vt


@pytest.fixture
def scale(api):
    """y = x * factor, with a factor that is not a tensor."""

    class Scale(api.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor, label=None):
            ctx.factor = factor
            ctx.label = label
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None, None

    return Scale


def leaf(api, *values):
    return api.tensor(values or (1.0, 2.0, 3.0), requires_grad=True)


def test_arguments_that_are_not_tensors(api, scale) -> None:
    x = leaf(api)
    y = scale.apply(x, 4, "label")
    assert "ScaleBackward" in y.grad_fn.name()
    y.sum().backward()
    assert x.grad.tolist() == [4.0] * 3


def test_function_over_tensors_without_grad_records_nothing(api, scale) -> None:
    assert not scale.apply(api.ones(2), 3).requires_grad
    with api.no_grad():
        assert not scale.apply(leaf(api), 3).requires_grad


def test_saved_tensors_and_double_backward(api) -> None:
    class Cube(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 3 * x * x

    x = leaf(api)
    (g,) = api.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)
    assert g.tolist() == [3.0, 12.0, 27.0]
    g.sum().backward()
    assert x.grad.tolist() == [6.0, 12.0, 18.0]


def test_saved_tensors_are_checked_and_freed(api) -> None:
    class Square(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, None)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            x, nothing = ctx.saved_tensors
            assert nothing is None
            return 2 * x * grad

    x = leaf(api)
    middle = x * 1
    y = Square.apply(middle)
    middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    z = Square.apply(x).sum()
    z.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        z.backward()


def test_saved_output(api) -> None:
    class Exp(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = x.exp()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx, grad):
            (out,) = ctx.saved_tensors
            return grad * out

    x = leaf(api)
    (g,) = api.autograd.grad(Exp.apply(x).sum(), x, create_graph=True)
    (second,) = api.autograd.grad(g.sum(), x)
    assert second.tolist() == pytest.approx(x.exp().tolist())


def test_needs_input_grad(api) -> None:
    seen = []

    class Add(api.autograd.Function):
        @staticmethod
        def forward(ctx, a, n, b):
            seen.append(tuple(ctx.needs_input_grad))
            return a + n + b

        @staticmethod
        def backward(ctx, grad):
            seen.append(tuple(ctx.needs_input_grad))
            return grad, None, None

    a = leaf(api)
    Add.apply(a, 1, api.ones(3)).sum().backward()
    assert seen == [(True, False, False)] * 2


def test_mark_dirty(api) -> None:
    class Double(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x.mul_(2)
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = leaf(api)
    y = x * 1
    version = y._version
    out = Double.apply(y)
    assert out is y and y._version > version
    assert y.tolist() == [2.0, 4.0, 6.0]
    (y * 3).sum().backward()
    assert x.grad.tolist() == [6.0] * 3
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        Double.apply(leaf(api))


@pytest.mark.parametrize("mark", ["mark_dirty", "mark_non_differentiable"])
@pytest.mark.parametrize("value", [3, None, [3]])
def test_only_tensors_are_marked(api, mark, value) -> None:
    class Marks(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            getattr(ctx, mark)(value)
            return x * 2

    with pytest.raises(RuntimeError, match=mark):
        Marks.apply(leaf(api))


def test_input_returned_as_it_is(api) -> None:
    class Identity(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 5

    x = leaf(api)
    y = Identity.apply(x)
    assert y is not x and y.grad_fn is not None
    y.sum().backward()
    assert x.grad.tolist() == [5.0] * 3


def test_several_outputs_some_not_differentiable(api) -> None:
    class Sorted(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            values, index = x.sort()
            ctx.mark_non_differentiable(index)
            ctx.save_for_backward(index)
            return values, index, "text"

        @staticmethod
        def backward(ctx, grad, grad_index, grad_text):
            (index,) = ctx.saved_tensors
            assert grad_index.tolist() == [0, 0, 0] and grad_text is None
            return api.zeros(3).index_add(0, index, grad)

    x = leaf(api, 3.0, 1.0, 2.0)
    values, index, text = Sorted.apply(x)
    assert values.requires_grad and not index.requires_grad and text == "text"
    (values * api.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert x.grad.tolist() == [100.0, 1.0, 10.0]


@pytest.mark.parametrize("fill", [True, False])
def test_missing_output_gradients(api, fill) -> None:
    seen = []

    class Two(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(fill)
            return x * 1, x * 2

        @staticmethod
        def backward(ctx, a, b):
            seen.append((a, b))
            return a

    x = leaf(api)
    Two.apply(x)[0].sum().backward()
    ((a, b),) = seen
    assert a.tolist() == [1.0] * 3
    assert b.tolist() == [0.0] * 3 if fill else b is None


def test_setup_context(api) -> None:
    class Power(api.autograd.Function):
        @staticmethod
        def forward(x, n):
            return x**n

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.n = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * ctx.n * x ** (ctx.n - 1), None

    x = leaf(api)
    Power.apply(x, 3).sum().backward()
    assert x.grad.tolist() == [3.0, 12.0, 27.0]


def test_once_differentiable(api) -> None:
    class Square(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @api.autograd.function.once_differentiable
        def backward(ctx, grad):
            assert not api.is_grad_enabled()
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    x = leaf(api)
    Square.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 4.0, 6.0]
    (g,) = api.autograd.grad(
        Square.apply(x).sum(), x, grad_outputs=api.ones((), requires_grad=True), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (lambda g: (g, g, g), RuntimeError, "incorrect number of gradients|different than None"),
        (lambda g: (), RuntimeError, "incorrect number of gradients"),
        (lambda g: (g, g), RuntimeError, "different than None"),
        (lambda g: ("text", None), RuntimeError, None),
        (lambda g: (g.new_ones(7), None), RuntimeError, "shape|size"),
    ],
)
def test_wrong_gradients_are_refused(api, returned, error, says) -> None:
    class Wrong(api.autograd.Function):
        @staticmethod
        def forward(ctx, x, n):
            return x * n

        @staticmethod
        def backward(ctx, grad):
            return returned(grad)

    with pytest.raises(error, match=says):
        Wrong.apply(leaf(api), 2).sum().backward()


def test_errors_pass_through(api) -> None:
    class Fails(api.autograd.Function):
        @staticmethod
        def forward(ctx, x, where):
            if where == "forward":
                raise LookupError(where)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise LookupError("backward")

    for where in ("forward", "backward"):
        with pytest.raises(LookupError, match=where):
            Fails.apply(leaf(api), where).sum().backward()
    assert api.is_grad_enabled()


def test_a_function_without_backward(api) -> None:
    class OneWay(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

    with pytest.raises(NotImplementedError):
        OneWay.apply(leaf(api)).sum().backward()
    with pytest.raises(NotImplementedError):
        api.autograd.Function.apply(leaf(api))


def test_save_for_backward_takes_tensors(api) -> None:
    class SavesText(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward("text")
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    with pytest.raises(TypeError, match="save_for_backward can only save variables"):
        SavesText.apply(leaf(api))


def test_ops_in_forward_are_not_recorded(api) -> None:
    modes = []

    class Looks(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            modes.append((api.is_grad_enabled(), (x * 2).requires_grad))
            return x.detach() * 3

        @staticmethod
        def backward(ctx, grad):
            modes.append(api.is_grad_enabled())
            return grad

    Looks.apply(leaf(api)).sum().backward()
    assert modes == [(False, False), False]


def test_a_tensor_given_back_twice(api) -> None:
    class Twice(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x * 2
            return y, y

        @staticmethod
        def backward(ctx, first, second):
            return first * 2 + second * 3

    x = leaf(api)
    y, z = Twice.apply(x)
    assert y is z
    (y.sum() + 4 * z.sum()).backward()
    assert x.grad.tolist() == [15.0] * 3


def test_what_is_dirty_must_be_given_back(api) -> None:
    class Lost(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x.mul_(2)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with pytest.raises(RuntimeError, match="marked as dirty"):
        Lost.apply(leaf(api) * 1)


@pytest.mark.parametrize("mark", ["mark_dirty", "mark_non_differentiable"])
def test_what_was_marked_does_not_keep_the_graph(mark) -> None:
    class Marks(vt.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if mark == "mark_dirty":
                ctx.mark_dirty(x)
                return x.mul_(2)
            y = x * 2
            z = x * 3
            ctx.mark_non_differentiable(z)
            return y, z

        @staticmethod
        def backward(ctx, grad, *none):
            return grad * 2

    w = vt.ones(3, requires_grad=True)
    gc.collect()
    before = vt._C._live_counts()
    for _ in range(5):
        out = Marks.apply(w * 1)
        (out if mark == "mark_dirty" else out[0]).sum().backward()
        del out
    w.grad = None
    gc.collect()
    assert vt._C._live_counts() == before


@pytest.mark.parametrize("kind", ["input", "view", "alias", "fresh"])
def test_changing_what_is_an_input_or_a_view_of_it(kind, api) -> None:
    class Given(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            made = {
                "input": lambda: x,
                "view": lambda: x[1:],
                "alias": lambda: x.view_as(x),
                "fresh": lambda: x * 1,
            }
            return made[kind]()

        @staticmethod
        def backward(ctx, grad):
            return api.ones(3) * 2

    w = leaf(api)
    x = w * 1
    y = Given.apply(x)
    if kind == "fresh":
        y.mul_(3)
    else:
        for change in (lambda: y.mul_(3), lambda: y.copy_(api.ones(y.shape))):
            with pytest.raises(RuntimeError, match="is being modified inplace"):
                change()
        assert x.tolist() == w.tolist()
    y.sum().backward()
    assert w.grad.tolist() == [2.0] * 3
