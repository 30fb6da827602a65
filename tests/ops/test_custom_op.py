"""Ops of the user's own under torch's names: schemas, binding, gradients, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.graphs import capture
from vibetensor.torch import Tensor

_numbers = itertools.count()


def fresh() -> str:
    return f"test_custom::op{next(_numbers)}"


def scaled(name: str = "", **options: Any) -> Any:
    @torch.library.custom_op(name or fresh(), mutates_args=(), **options)
    def op(x: Tensor, w: Optional[Tensor], scale: float = 2.0, *, shift: int = 0) -> Tensor:  # noqa: UP045
        """x w scale + shift."""
        return x * (1.0 if w is None else w) * scale + shift

    return op


def test_schema_from_annotations_and_text() -> None:
    assert scaled().schema == "(Tensor x, Tensor? w, float scale=2.0, *, int shift=0) -> Tensor"

    def f(x: Tensor, sizes: Sequence[int], p: Sequence[float], d: torch.dtype, on: torch.device,
          how: str, flag: bool) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    assert torch.library.infer_schema(f, mutates_args=("x",)) == (
        "(Tensor! x, int[] sizes, float[] p, dtype d, device on, str how, bool flag) -> "
        "(Tensor, Tensor)"
    )
    text = "(Tensor(a!) x, int[] n=[1, 2], *, bool flag=True) -> ()"
    op = torch.library.custom_op(fresh(), lambda *a, **k: None, mutates_args="x", schema=text)
    assert op.schema == "(Tensor! x, int[] n=[1, 2], *, bool flag=True) -> ()"


def test_is_called_by_name_with_defaults_and_keywords() -> None:
    name = fresh()
    op = scaled(name)
    x = torch.tensor([1.0, 2.0])
    found = getattr(torch.ops.test_custom, name.partition("::")[2])
    assert found is op and op.__doc__ == "x w scale + shift." and name in repr(op)
    assert name.partition("::")[2] in dir(torch.ops.test_custom)
    assert "test_custom" in dir(torch.ops)
    np.testing.assert_array_equal(found(x, None).numpy(), [2, 4])
    np.testing.assert_array_equal(found(x, w=x, scale=3, shift=1).numpy(), [4, 13])
    with pytest.raises(AttributeError, match="no custom op is called 'test_custom::nothing'"):
        torch.ops.test_custom.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op, x: op(x), "missing argument 'w'"),
        (lambda op, x: op(x, x, 1.0, 2), "takes 3 positional arguments but 4 were given"),
        (lambda op, x: op(x, x, x=x), "multiple values for argument 'x'"),
        (lambda op, x: op(x, x, size=1), "unexpected keyword argument 'size'"),
        (lambda op, x: op(1.0, x), "argument 'x' must be Tensor, not float"),
        (lambda op, x: op(x, x, "a"), "argument 'scale' must be float, not str"),
        (lambda op, x: op(x, 3), "argument 'w' must be Tensor or None, not int"),
        (lambda op, x: op(x, x, shift=1.5), "argument 'shift' must be int, not float"),
    ],
)
def test_wrong_calls(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(scaled(), torch.ones(2))


def test_gradients() -> None:
    op = scaled()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        op(x, w).sum().backward()

    def setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        x, w, ctx.scale = inputs
        assert keyword_only_inputs == {"shift": 1} and output.shape == x.shape
        ctx.save_for_backward(x, w)

    def backward(ctx: Any, grad: Any) -> Any:
        x, w = ctx.saved_tensors
        return grad * w * ctx.scale, grad * x * ctx.scale if ctx.needs_input_grad[1] else None, None

    op.register_autograd(backward, setup_context=setup)
    assert torch.autograd.gradcheck(lambda x, w: op(x, w, 1.5, shift=1), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: op(x, w, 1.5, shift=1), (x, w))
    (only,) = torch.autograd.grad(op(x, w.detach(), 1.5, shift=1).sum(), x)
    np.testing.assert_allclose(only.numpy(), (w * 1.5).detach().numpy())
    op.register_autograd(lambda ctx, grad: grad)
    with pytest.raises(RuntimeError, match="returned 1 gradients for 3 arguments"):
        op(x, w).sum().backward()


def test_several_results_and_changed_arguments() -> None:
    @torch.library.custom_op(fresh(), mutates_args={"count"})
    def split(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        count += 1
        return x * 2, x * 3

    count = torch.zeros(())
    two, three = split(torch.ones(2), count)
    assert count.item() == 1 and two.sum().item() == 4 and three.sum().item() == 6
    with pytest.raises(RuntimeError, match="changes 'count' in place, which requires grad"):
        split(torch.ones(2), count.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="changes its arguments in place has no gradient"):
        split.register_autograd(lambda ctx, *grads: None)


def test_what_an_implementation_may_not_return() -> None:
    def make(function: Callable[..., Any]) -> Any:
        return torch.library.custom_op(
            fresh(), function, mutates_args=(), schema="(Tensor x) -> Tensor"
        )

    with pytest.raises(RuntimeError, match="result 0 is the argument 'x' itself"):
        make(lambda x: x)(torch.ones(1))
    for view in (lambda x: x.view(2, 1), lambda x: x[1:], lambda x: x.detach(), lambda x: x[:0]):
        with pytest.raises(RuntimeError, match="result 0 is a view of the argument 'x'"):
            make(view)(torch.ones(2))
    assert make(lambda x: x[:0].clone())(torch.ones(2)).numel() == 0
    split = torch.library.custom_op(
        fresh(),
        lambda x: (x * 2).unbind(),
        mutates_args=(),
        schema="(Tensor x) -> (Tensor, Tensor)",
    )
    assert [r.item() for r in split(torch.ones(2))] == [2, 2]  # views of what is new are results
    with pytest.raises(TypeError, match="must return a tensor, .* and returned tuple"):
        make(lambda x: (x + 1, x))(torch.ones(1))


def test_without_any_tensor() -> None:
    op = torch.library.custom_op(
        fresh(), lambda x: torch.ones(1), mutates_args=(), schema="(Tensor? x) -> Tensor"
    )
    with pytest.raises(RuntimeError, match="every tensor is None"):
        op(None)


def test_implementations_by_device() -> None:
    op = scaled(device_types="cuda")
    if torch.empty(0).is_cpu:
        with pytest.raises(NotImplementedError, match="no implementation for cpu"):
            op(torch.ones(1), None)
    torch.library.register_kernel(op, "cpu", lambda x, w, scale, *, shift: x + 7)
    assert op(torch.ones(1, device="cpu"), None).item() == 8
    with pytest.raises(ValueError, match="unknown device type 'tpu'"):
        op.register_kernel("tpu", lambda x: x)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("Tensor x -> Tensor", "expected '\\(ARGUMENTS\\) -> RESULTS'"),
        ("(Tensor x, complex y) -> Tensor", "'complex y' is no argument"),
        ("(Tensor x, Tensor x) -> Tensor", "named twice: x"),
        ("(float x) -> Tensor", "at least one tensor"),
        ("(Tensor x, int! n) -> Tensor", "only tensors are changed in place"),
        ("(Tensor x) -> ()", "has results or changes an argument"),
        ("(Tensor x) -> int", "the results are tensors, not 'int'"),
        ("(Tensor x, int n=f()) -> Tensor", "no default value"),
    ],
)
def test_wrong_schemas(schema: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.library.custom_op(fresh(), lambda x: x, mutates_args=(), schema=schema)


def test_wrong_definitions() -> None:
    def bare(x, y: int) -> Tensor: ...

    def listed(x: list[Tensor]) -> Tensor: ...

    def result(x: Tensor) -> int: ...

    for function, message in ((bare, "'x' needs a type"), (listed, "which no op takes"),
                              (result, "the return type must be")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            torch.library.custom_op(fresh(), function, mutates_args=())
    with pytest.raises(ValueError, match="it is 'namespace::name'"):
        scaled("plain")
    name = fresh()
    scaled(name)
    scaled(name)  # the same function again, as when a module is loaded anew
    with pytest.raises(ValueError, match="is registered already"):
        torch.library.custom_op(name, lambda x: x, mutates_args=(), schema="(Tensor x) -> Tensor")
    with pytest.raises(ValueError, match="no custom op is called 'a::b'"):
        torch.library.register_fake("a::b", lambda x: x)


def test_in_a_captured_step() -> None:
    op = scaled()
    op.register_autograd(
        lambda ctx, grad: (grad * 2.0, None, None), setup_context=lambda ctx, **_: None
    )
    w = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.25)

    @capture
    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (op(w, None) * x).sum()
        loss.backward()
        optimizer.step()
        return loss

    expected = np.ones(4)
    for i in range(4):
        x = torch.full((4,), float(i))
        assert step(x).item() == pytest.approx((2 * expected * i).sum())
        expected -= 0.25 * 2 * i
    np.testing.assert_allclose(w.detach().cpu().numpy(), expected)


def test_arguments_changed_by_other_means_than_ops_count_as_changed() -> None:
    def double(x: Tensor) -> None:
        x.numpy()[...] *= 2

    op = torch.library.custom_op(fresh(), double, mutates_args=("x",), device_types="cpu")
    w = torch.ones(3, device="cpu", requires_grad=True)
    buffer = torch.full((3,), 3.0, device="cpu")
    product = w * buffer
    before = buffer._version
    op(buffer)
    assert buffer._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_captures_notice_other_kernels_and_gradients() -> None:
    op = torch.library.custom_op(
        fresh(), lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_autograd(lambda ctx, grad: grad * 2, setup_context=lambda ctx, **_: None)
    w = torch.ones(3, requires_grad=True)

    @capture
    def step(x: Tensor) -> Tensor:
        w.grad = None
        y = op(w)
        (y * x).sum().backward()
        return y.detach()

    def found() -> tuple[float, float]:
        out = step(torch.ones(3))
        assert w.grad is not None
        return out[0].item(), w.grad[0].item()

    assert [found() for _ in range(4)] == [(2.0, 2.0)] * 4
    op.register_autograd(lambda ctx, grad: grad * 7, setup_context=lambda ctx, **_: None)
    assert [found() for _ in range(3)] == [(2.0, 7.0)] * 3
    op.register_kernel(w.device.type, lambda x: x * 13)
    assert [found() for _ in range(3)] == [(13.0, 7.0)] * 3


@pytest.mark.parametrize("library", ["vibetensor", pytest.param("torch", marks=pytest.mark.torch)])
def test_numbers_are_converted(library: str) -> None:
    api = torch if library == "vibetensor" else pytest.importorskip("torch")
    seen: list[Any] = []

    def function(x, n, p, b, s, q):  # type: ignore[no-untyped-def]
        seen.append((n, p, b, list(s), list(q)))
        return x * 1

    kinds = {"n": int, "p": float, "b": bool, "s": Sequence[int], "q": Sequence[float]}
    function.__annotations__ = {"x": api.Tensor, **kinds, "return": api.Tensor}
    op = api.library.custom_op(fresh(), function, mutates_args=())
    x = api.ones(1)
    for given, expected in (
        ((np.int64(3), np.float32(2), np.bool_(True), [np.int32(1), 2], [1, np.float64(2.5)]),
         (3, 2.0, True, [1, 2], [1.0, 2.5])),
        ((True, True, 1, [True], [True]), (1, 1.0, True, [1], [1.0])),
        ((1, 1, 0, (1,), (1,)), (1, 1.0, False, [1], [1.0])),
        ((1, 1.0, 2.5, [], ()), (1, 1.0, True, [], [])),
    ):  # fmt: skip
        op(x, *given)
        assert repr(seen[-1]) == repr(expected)
    for wrong in (
        (1.0, 1.0, True, [1], [1.0]),
        (1, "a", True, [1], [1.0]),
        (1, 1.0, True, [1.5], [1.0]),
        (1, 1.0, True, [1], ["a"]),
        (1, 1.0, "a", [1], [1.0]),
    ):
        with pytest.raises((TypeError, RuntimeError)):  # torch's is a RuntimeError
            op(x, *wrong)
