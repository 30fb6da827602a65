"""gradcheck and gradgradcheck: they pass what is right and refuse what is wrong."""

from __future__ import annotations

import pytest


def leaf(api, *shape):
    api.manual_seed(0)
    return api.rand(shape or (3,), dtype=api.float64).add_(0.5).requires_grad_()


@pytest.fixture
def wrong(api):
    """x², whose gradient is right (1), scaled (1.01), or right once and wrong when derived again."""

    class Square(api.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor, detach):
            ctx.save_for_backward(x)
            ctx.settings = factor, detach
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            factor, detach = ctx.settings
            return 2 * (x.detach() if detach else x) * grad * factor, None, None

    return Square.apply


def test_right_gradients_pass(api, wrong) -> None:
    check, again = api.autograd.gradcheck, api.autograd.gradgradcheck
    x, w = leaf(api, 2, 3), leaf(api, 4, 3)
    assert check(lambda x, w: api.nn.functional.linear(x, w).tanh(), (x, w))
    assert again(lambda x, w: api.nn.functional.linear(x, w).tanh(), (x, w))
    assert check(lambda x: wrong(x, 1, False), x)
    assert check(lambda x: (x.exp(), x.sum()), (x,))
    assert check(lambda x: x.exp(), x, fast_mode=True)
    assert again(lambda x: x.exp(), x, fast_mode=True)


def test_wrong_gradient_fails(api, wrong) -> None:
    with pytest.raises(
        RuntimeError, match="Jacobian mismatch for output 0 with respect to input 0"
    ):
        api.autograd.gradcheck(lambda x: wrong(x, 1.01, False), leaf(api))
    assert not api.autograd.gradcheck(
        lambda x: wrong(x, 1.01, False), leaf(api), raise_exception=False
    )
    assert not api.autograd.gradcheck(
        lambda x: wrong(x, 1.01, False), leaf(api), raise_exception=False, fast_mode=True
    )
    assert api.autograd.gradcheck(lambda x: wrong(x, 1.01, False), leaf(api), rtol=0.05)


def test_wrong_in_one_element_or_output_fails(api, wrong) -> None:
    x = leaf(api, 4)

    def one(x):
        return api.cat((wrong(x[:3], 1, False), wrong(x[3:], 1.1, False)))

    assert not api.autograd.gradcheck(one, x, raise_exception=False)
    assert not api.autograd.gradcheck(
        lambda x: (x * 2, wrong(x, 1.1, False)), x, raise_exception=False
    )


def test_wrong_second_gradient_fails(api, wrong) -> None:
    def first_only(x):
        return wrong(x, 1, True)

    assert api.autograd.gradcheck(first_only, leaf(api))
    with pytest.raises(RuntimeError):
        api.autograd.gradgradcheck(first_only, leaf(api))
    assert not api.autograd.gradgradcheck(first_only, leaf(api), raise_exception=False)


def test_missing_gradient_fails(api) -> None:
    assert not api.autograd.gradcheck(lambda x: x.detach() * x, leaf(api), raise_exception=False)


def test_nothing_to_check(api) -> None:
    with pytest.raises(ValueError, match="requires_grad=True|require gradient"):
        api.autograd.gradcheck(lambda x: x, api.ones(2, dtype=api.float64))


def test_gradient_that_varies_between_runs_fails(api) -> None:
    class Noisy(api.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + api.rand_like(grad) * 1e-6)

    assert not api.autograd.gradcheck(Noisy.apply, leaf(api), raise_exception=False)
    assert api.autograd.gradcheck(Noisy.apply, leaf(api), nondet_tol=1e-4)


def test_inputs_of_several_kinds(api) -> None:
    x = leaf(api, 3)
    index = api.tensor([2, 0])
    assert api.autograd.gradcheck(lambda x, i, n: x[i] * n, (x, index, 3))
    assert api.autograd.gradcheck(lambda a, b: (a * b).sum(), (x, api.ones(3, dtype=api.float64)))
