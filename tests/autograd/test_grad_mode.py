"""no_grad, enable_grad, set_grad_enabled and inference_mode, as blocks and as decorators."""

from __future__ import annotations

import threading

import pytest


@pytest.fixture
def x(api):
    return api.ones(2, requires_grad=True)


def test_blocks_nest_and_restore(api, x) -> None:
    with api.no_grad():
        assert not (x * 2).requires_grad
        with api.enable_grad():
            assert (x * 2).requires_grad
            with api.set_grad_enabled(False):
                assert not api.is_grad_enabled()
            assert api.is_grad_enabled()
        assert not api.is_grad_enabled()
    assert api.is_grad_enabled()


def test_blocks_restore_after_an_error(api) -> None:
    for mode in (api.no_grad, api.inference_mode, lambda: api.set_grad_enabled(False)):
        with pytest.raises(ValueError, match="inside"), mode():
            raise ValueError("inside")
        assert api.is_grad_enabled() and not api.is_inference_mode_enabled()


def test_set_grad_enabled_acts_at_once(api, x) -> None:
    api.set_grad_enabled(False)
    try:
        assert not (x * 2).requires_grad
    finally:
        api.set_grad_enabled(True)
    assert (x * 2).requires_grad


def test_decorators(api, x) -> None:
    @api.no_grad()
    def with_parentheses():
        return x * 2

    @api.no_grad
    def bare():
        """Doc."""
        return x * 2

    @api.inference_mode
    def inference():
        return x * 2

    @api.set_grad_enabled(False)
    def off():
        return x * 2

    @api.enable_grad()
    def on():
        return x * 2

    for function in (with_parentheses, bare, off):
        assert not function().requires_grad
    assert bare.__name__ == "bare" and bare.__doc__ == "Doc."
    assert inference().is_inference()
    with api.no_grad():
        assert on().requires_grad
    assert api.is_grad_enabled()


def test_decorator_of_recursion(api) -> None:
    @api.no_grad()
    def down(n):
        assert not api.is_grad_enabled()
        if n:
            down(n - 1)
            assert not api.is_grad_enabled()

    down(3)
    assert api.is_grad_enabled()


def test_decorated_generator_holds_the_mode_only_while_it_runs(api) -> None:
    log = []

    @api.no_grad()
    def numbers():
        try:
            got = yield api.is_grad_enabled()
            log.append((got, api.is_grad_enabled()))
            yield 2
        finally:
            log.append(("closed", api.is_grad_enabled()))

    running = numbers()
    assert next(running) is False
    assert api.is_grad_enabled()
    assert running.send("sent") == 2
    running.close()
    assert log == [("sent", False), ("closed", False)]
    assert api.is_grad_enabled()


def test_decorated_method(api, x) -> None:
    class Model:
        @api.no_grad()
        def sample(self):
            return x * 2

    assert not Model().sample().requires_grad


def test_a_leaf_may_be_made_in_no_grad(api) -> None:
    with api.no_grad():
        a = api.ones(2, requires_grad=True)
        p = api.nn.Parameter(api.ones(2))
    assert a.requires_grad and p.requires_grad
    (a * p).sum().backward()
    assert a.grad.tolist() == p.grad.tolist() == [1.0, 1.0]


def test_grad_mode_is_the_threads_own(api) -> None:
    seen = []
    with api.no_grad():
        thread = threading.Thread(target=lambda: seen.append(api.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_inference_mode(api, x) -> None:
    with api.inference_mode():
        assert api.is_inference_mode_enabled() and not api.is_grad_enabled()
        y = x * 2
        made = api.ones(2)
        with api.inference_mode(False):
            assert not api.is_inference_mode_enabled()
            assert (x * 2).requires_grad
    assert y.is_inference() and made.is_inference() and not x.is_inference()
    assert not y.requires_grad
    assert (y + 1).tolist() == [3.0, 3.0]  # plain use is fine
    assert not (y + 1).is_inference()


def test_inference_tensors_stay_out_of_autograd(api, x) -> None:
    with api.inference_mode():
        y = api.ones(2)
        view = y[:1]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        x * y
    with pytest.raises(RuntimeError, match="[Ii]nplace update to inference tensor"):
        y.add_(1)
    with pytest.raises(RuntimeError, match="[Ii]nplace update to inference tensor"):
        view.add_(1)
    with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
        y.requires_grad_()
    with api.no_grad(), pytest.raises(RuntimeError, match="inference tensor"):
        y.add_(1)
    with api.inference_mode():
        y.fill_(3)
    assert not y.clone().is_inference()
    assert y.clone().add_(1).tolist() == [4.0, 4.0]
    (x + y).sum().backward()  # nothing of y is saved
    (x * y.clone()).sum().backward()
    assert x.grad.tolist() == [4.0, 4.0]


def test_view_made_in_inference_mode_is_not_changed_outside(api, x) -> None:
    base = x * 1
    with api.inference_mode():
        view = base[:1]
    with pytest.raises(RuntimeError, match="created in inference mode"):
        view.mul_(2)
    assert base.tolist() == [1.0, 1.0]


def test_normal_tensor_changed_in_inference_mode(api) -> None:
    a = api.ones(2)
    with api.inference_mode():
        a.add_(1)
    assert a.tolist() == [2.0, 2.0] and not a.is_inference()
