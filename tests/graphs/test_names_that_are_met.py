"""Names behind decorators, and of what runs though no name leads to it: modules and optimizers out of
a list, hooks, forwards and backwards of autograd.Function."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture
from vibetensor.torch import nn

X = vt.ones(2)
FACTOR: Any = 2.0


def seen(function: Callable[[Any], Any], change: Callable[[], Any], wrap: Any = capture) -> None:
    """The change is noticed by the next call, and what comes after it is replayed again."""
    step = wrap(function)
    for _ in range(4):
        before = step(X).tolist()
    change()
    after = [step(X).tolist() for _ in range(3)]
    wanted = function(X).tolist()
    assert wanted != before and after == [wanted] * 3
    if wrap is capture:
        assert len(step.variants) == 2 and step.last.replays > 0
    else:
        compiled = getattr(step, "_compiled", step)
        assert "runs as it is" not in compiled.report()


def passed_on(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def plainly_passed_on(function: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Descriptor:
    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return owner.k


class Base:
    K = 2.0

    def __init__(self) -> None:
        self.k = 2.0

    def scaled(self, x: Any) -> Any:
        return x * self.k


class Decorated(Base):
    described = Descriptor()

    def __getattr__(self, name: str) -> Any:
        if name == "derived":
            return self.k
        raise AttributeError(name)

    @vt.no_grad()
    def no_grad(self, x: Any) -> Any:
        return x * self.k

    @vt.enable_grad()
    def enable_grad(self, x: Any) -> Any:
        return x * self.k

    @vt.inference_mode()
    def inference_mode(self, x: Any) -> Any:
        return x * self.k

    @vt.autocast("cpu", enabled=False)
    def autocast(self, x: Any) -> Any:
        return x * self.k

    @passed_on
    def wrapped(self, x: Any) -> Any:
        return x * self.k

    @plainly_passed_on
    def plain(self, x: Any) -> Any:
        return x * self.k

    @passed_on
    @vt.no_grad()
    def twice(self, x: Any) -> Any:
        return x * self.k

    def called(self, x: Any) -> Any:
        return self.wrapped(x)

    @property
    @passed_on
    def scale(self) -> float:
        return self.k

    def by_property(self, x: Any) -> Any:
        return x * self.scale

    @contextlib.contextmanager
    def context(self) -> Iterator[float]:
        yield self.k

    def by_context(self, x: Any) -> Any:
        with self.context() as k:
            return x * k

    @passed_on
    def scaled(self, x: Any) -> Any:
        return super().scaled(x)

    def by_class(self, x: Any) -> Any:
        return x * self.__class__.K

    def by_type(self, x: Any) -> Any:
        return x * type(self).K

    def by_descriptor(self, x: Any) -> Any:
        return x * self.described

    def by_getattr(self, x: Any) -> Any:
        return x * self.derived


@pytest.mark.parametrize(
    "name",
    ["no_grad", "enable_grad", "inference_mode", "autocast", "wrapped", "plain", "twice",
     "called", "by_property", "by_context", "scaled", "by_descriptor", "by_getattr"],
)  # fmt: skip
def test_an_object_behind_a_decorator(name: str) -> None:
    own = Decorated()
    seen(getattr(own, name), lambda: setattr(own, "k", 5.0))


def test_each_object_of_a_decorated_method() -> None:
    first, second = Decorated(), Decorated()
    seen(lambda x: first.wrapped(x) + second.wrapped(x), lambda: setattr(second, "k", 5.0))


@pytest.mark.parametrize("name", ["by_class", "by_type"])
def test_attributes_of_an_objects_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Decorated()
    seen(getattr(own, name), lambda: monkeypatch.setattr(Base, "K", 5.0))


def test_another_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Decorated):
        K = 5.0

    own = Decorated()
    seen(own.by_class, lambda: setattr(own, "__class__", Other))


def test_attributes_of_a_default() -> None:
    options = types.SimpleNamespace(k=2.0)

    def scaled(x: Any, options: Any = options) -> Any:
        return x * options.k

    seen(scaled, lambda: setattr(options, "k", 5.0))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(p=2.0)

    @vt.no_grad()
    def forward(self, x: Any) -> Any:
        return x * self.config.p * FACTOR

    def attend(self, x: Any) -> Any:
        return x * self.config.p


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scale(), Scale()])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block.attend(x)
        return x


@pytest.mark.parametrize("wrap", [capture, vt.compile], ids=["capture", "compile"])
@pytest.mark.parametrize("name", ["global", "config"])
@pytest.mark.parametrize("where", ["itself", "list", "dictionary", "getattr"])
def test_modules_that_no_name_leads_to(
    wrap: Any, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Scale()
    places: Any = {
        "itself": module,
        "list": lambda x: listed[0](x),
        "dictionary": lambda x: held["a"](x),
        "getattr": lambda x: getattr(named, "mod" + "ule")(x),
    }
    listed, held, named = [module], {"a": module}, types.SimpleNamespace(module=module)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)

    def change() -> None:
        if name == "global":
            monkeypatch.setitem(globals(), "FACTOR", 3.0)
        else:
            module.config.p = 3.0

    seen(places[where], change, wrap)


@pytest.mark.parametrize("wrap", [capture, vt.compile], ids=["capture", "compile"])
def test_methods_of_modules_in_a_loop(wrap: Any) -> None:
    model = Blocks()
    seen(model, lambda: setattr(model.blocks[1].config, "p", 3.0), wrap)


def test_what_a_run_makes_and_drops_is_not_held() -> None:
    class Reads(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * shared.last

    shared, modules = types.SimpleNamespace(last=None), [Reads()]

    def function(x: Any) -> Any:
        shared.last = x * 2
        result = modules[0](x)
        shared.last = None
        return result

    step = capture(function)
    for _ in range(6):
        assert step(X).tolist() == [2.0, 2.0]
    assert step.last.replays == 5


class Scaling(vt.autograd.Function):
    K = 2.0

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * FACTOR

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * Scaling.K


def with_gradient(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(x: Any) -> Any:
        weight.grad = None
        result = function(weight * x)
        result.sum().backward()
        return vt.cat([result.detach(), weight.grad])

    weight = vt.ones(2, requires_grad=True)
    return run


apply_scaling = Scaling.apply


@pytest.mark.parametrize(
    "use",
    [
        lambda x: Scaling.apply(x),
        lambda x: apply_scaling(x),
        lambda x, function=Scaling: function.apply(x),
    ],
    ids=["apply", "its own name", "default"],
)
@pytest.mark.parametrize("name", ["global", "class"])
def test_what_functions_of_autograd_read(
    use: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        if name == "global":
            monkeypatch.setitem(globals(), "FACTOR", 5.0)
        else:
            monkeypatch.setattr(Scaling, "K", 5.0)

    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    seen(with_gradient(use), change)


@pytest.mark.parametrize(
    "register",
    [
        lambda m, own: m.register_forward_hook(lambda module, args, result: result * own.k),
        lambda m, own: m.register_forward_pre_hook(lambda module, args: args[0] * own.k),
        lambda m, own: m.register_full_backward_hook(lambda module, i, o: (i[0] * own.k,)),
        lambda m, own: m.register_full_backward_pre_hook(lambda module, o: (o[0] * own.k,)),
        lambda m, own: nn.modules.module.register_module_forward_hook(
            lambda module, args, result: result * own.k
        ),
        lambda m, own: m.register_forward_hook(lambda module, args, result: own.scaled(result)),
    ],
    ids=["forward", "pre", "backward", "backward pre", "global", "method"],
)
def test_what_hooks_of_modules_read(register: Any) -> None:
    own, module = Base(), nn.Identity()
    handle = register(module, own)
    modules = [module]
    try:
        seen(with_gradient(lambda x: modules[0](x)), lambda: setattr(own, "k", 5.0))
    finally:
        handle.remove()


class Gained(vt.optim.SGD):
    gain = 2.0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.gain * FACTOR)
        return super().step(closure)


class Own(vt.optim.Optimizer):
    gain = 2.0

    @vt.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.gain * FACTOR)
                p.sub_(p.grad)


@pytest.mark.parametrize("make", [lambda p: Gained(p, lr=0.1), lambda p: Own(p, {})])
@pytest.mark.parametrize("held", [False, True], ids=["named", "in a list"])
@pytest.mark.parametrize("name", ["gain", "global", "hook"])
def test_what_optimizers_read(
    make: Any, held: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hooked = vt.ones(2, requires_grad=True), Base()
    optimizer = make([weight])

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        weight.grad.mul_(hooked.k)

    optimizer.register_step_pre_hook(hook)
    optimizers = [optimizer]

    def steps_listed() -> None:
        optimizers[0].step()

    def steps_named() -> None:
        optimizer.step()

    def step(x: Any) -> Any:
        weight.grad = None
        (weight * x).sum().backward()
        steps()
        return weight.grad * 1

    steps = steps_listed if held else steps_named

    def change() -> None:
        if name == "global":
            monkeypatch.setitem(globals(), "FACTOR", 5.0)
        elif name == "gain":
            optimizer.gain = 5.0
        else:
            hooked.k = 5.0

    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    seen(step, change)


def test_a_counter_of_a_hook_is_no_reason() -> None:
    class Counter:
        calls = 0

        def __call__(self, module: Any, args: Any, result: Any) -> Any:
            self.calls += 1
            return result * 2

    module, counter = nn.Identity(), Counter()
    module.register_forward_hook(counter)
    modules = [module]
    step = capture(lambda x: modules[0](x))
    for _ in range(6):
        assert step(X).tolist() == [2.0, 2.0]
    assert len(step.variants) == 1 and step.last.replays == 5
