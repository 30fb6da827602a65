"""Gradients of biases in the attention that makes the gradients of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from vibetensor.graphs.passes import attention_sums, epilogues

B, T, H, D = 2, 5, 2, 4
WIDTH = H * D
FUSED, PLAIN = "_attention_backward_sums", "_attention_backward"


def _split(qkv: Any, heads: int = H, key_heads: int = H) -> list[Any]:
    b, t, _ = qkv.shape
    widths = [n * D for n in (heads, key_heads, key_heads)]
    return [z.view(b, t, -1, D).transpose(1, 2) for z in qkv.split(widths, dim=2)]


def _slices(qkv: Any) -> list[Any]:
    b, t, _ = qkv.shape
    return list(qkv.reshape(b, t, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0))


def _interleaved(qkv: Any) -> list[Any]:
    """A head's query, key and value beside one another."""
    b, t, _ = qkv.shape
    return [z.transpose(1, 2) for z in qkv.view(b, t, H, 3 * D).split(D, dim=3)]


def _step(
    parts: Callable[[Any], list[Any]],
    rows: int = 3 * WIDTH,
    dtype: Any = vt.float32,
    change: Callable[[Any], Any] = lambda qkv: qkv,
    **options: Any,
) -> Any:
    """A step over one joined projection with a bias."""
    weight = vt.randn(rows, WIDTH).to(dtype).requires_grad_()
    bias = vt.randn(rows).to(dtype).requires_grad_()

    def step(x: Any) -> Any:
        weight.grad = bias.grad = None
        qkv = change(F.linear(x.to(dtype), weight, bias))
        y = F.scaled_dot_product_attention(*parts(qkv), **options)
        y.float().square().mean().backward()
        return y, weight.grad, bias.grad

    step.state = [weight, bias]  # type: ignore[attr-defined]
    return step


def _inputs(b: int = B, t: int = T) -> list[tuple]:
    vt.manual_seed(3)
    return [(vt.randn(b, t, WIDTH),) for _ in range(4)]


def _made() -> int:
    return sum(d.startswith("attention_sums: ") and "as one op" in d for d in decisions())


def _why() -> list[str]:
    return [d for d in decisions() if d.startswith("attention_sums: ") and "stay two ops" in d]


def _one_op(names: list[str]) -> None:
    assert names.count(FUSED) == 1 and PLAIN not in names, (names, decisions())
    assert not {"sum.dim", "_mm_row_sums"} & set(names), (names, decisions())
    assert _made() == 1 and not _why()


@pytest.fixture(params=[False, True], ids=["plain", "epilogues"], autouse=True)
def _epilogues(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sum as an op of its own, and within the product beside it."""
    if kind() != "cpu" and not request.param:
        pytest.skip("this device always has them")
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda") if request.param else ())


@pytest.fixture(autouse=True)
def _everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "wide_floats_stay" not in request.node.name:
        monkeypatch.setattr(attention_sums, "WIDE_ON", ("cpu", "cuda"))


def _bound(request: pytest.FixtureRequest) -> float:
    """Epilogues have a bound of their own."""
    return 1e-5 if "epilogues" in request.node.name else 0.0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", [_split, _slices])
@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16, vt.float16, vt.float64], ids=str)
def test_of_a_joined_projection(
    parts: Any, dtype: Any, causal: bool, request: pytest.FixtureRequest
) -> None:
    bound = _bound(request) and (2.0**-7 if dtype.itemsize == 2 else 1e-5)
    _one_op(captured_names(lambda: _step(parts, dtype=dtype, is_causal=causal), _inputs(), bound))


@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 7), (6, 1), (3, 65)])
def test_of_every_number_of_rows(b: int, t: int, request: pytest.FixtureRequest) -> None:
    _one_op(captured_names(lambda: _step(_split), _inputs(b, t), _bound(request)))


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64], ids=str)
def test_wide_floats_stay_where_kernels_do_not_sum_them(dtype: Any) -> None:
    if kind() == "cpu":
        pytest.skip("the CPU sums them")
    names = captured_names(lambda: _step(_split, dtype=dtype), _inputs(), 1e-5)
    assert PLAIN in names and FUSED not in names
    assert any("kernels of wide floats add nothing up" in why for why in _why()), decisions()


def test_with_dropout_and_mask(request: pytest.FixtureRequest) -> None:
    mask = vt.randn(T, T)
    for options in ({"dropout_p": 0.5}, {"attn_mask": mask}):
        _one_op(captured_names(lambda o=options: _step(_split, **o), _inputs(), _bound(request)))


def test_with_shared_key_heads(request: pytest.FixtureRequest) -> None:
    rows = (4 + 2 * 2) * D

    def parts(qkv: Any) -> list[Any]:
        return _split(qkv, 4, 2)

    _one_op(
        captured_names(
            lambda: _step(parts, rows, enable_gqa=True, is_causal=True), _inputs(), _bound(request)
        )
    )


def _apart(key_heads: int, change: Callable[[Any], Any]) -> Any:
    """A step over projections of their own, the value's without a bias."""
    widths = [WIDTH, key_heads * D, key_heads * D]
    linears = [vt.nn.Linear(WIDTH, w, bias=i < 2) for i, w in enumerate(widths)]
    state = [p for linear in linears for p in linear.parameters()]

    def step(x: Any) -> Any:
        for p in state:
            p.grad = None
        b, t, _ = x.shape
        q, k, v = (linear(x).view(b, t, -1, D).transpose(1, 2) for linear in linears)
        y = F.scaled_dot_product_attention(change(q), k, v, enable_gqa=key_heads != H)
        y.square().mean().backward()
        return y, [p.grad for p in state]

    step.state = state  # type: ignore[attr-defined]
    return step


@pytest.mark.parametrize("key_heads", [1, 2])
def test_of_projections_of_their_own(key_heads: int, request: pytest.FixtureRequest) -> None:
    names = captured_names(lambda: _apart(key_heads, lambda q: q), _inputs(), _bound(request))
    assert names.count(FUSED) == 1 and PLAIN not in names
    assert not {"sum.dim", "_mm_row_sums"} & set(names)
    assert _made() == 2 and not _why()


def test_of_some_gradients_alone(request: pytest.FixtureRequest) -> None:
    """What is between the projection and attention has the gradient of its rows itself."""
    names = captured_names(lambda: _apart(H, vt.sin), _inputs(), _bound(request))
    assert names.count(FUSED) == 1 and _made() == 1
    assert names.count("sum.dim") + names.count("_mm_row_sums") == 1  # the query's


def test_heads_between_one_another_stay() -> None:
    names = captured_names(lambda: _step(_interleaved), _inputs(), 1e-5)
    assert PLAIN in names and FUSED not in names
    assert any("heads are not one after the other in a row" in why for why in _why()), decisions()


def test_rows_that_change_stay() -> None:
    def parts(qkv: Any) -> list[Any]:
        q, k, v = _split(qkv)
        return [q * 2, k, v]  # so that the query's gradient is another op's

    names = captured_names(lambda: _step(parts), _inputs(), 1e-5)
    assert PLAIN in names and FUSED not in names
    assert _why(), decisions()


def _gradients(function: Callable[..., Any]) -> Any:
    """A step that does something with the gradients of attention's operands."""

    def step(x: Any) -> Any:
        leaves = [(x * c).view(-1, T, H, D).detach().requires_grad_() for c in (1, 2, 3)]
        y = F.scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves))
        grads = vt.autograd.grad(y.square().sum(), leaves)
        return function(*(g.view(-1, T, WIDTH) for g in grads))

    return step


CASES: dict[str, tuple[Callable[..., Any], str]] = {
    "others": (lambda q, k, v: q.sum(1), "it sums something else than all rows"),
    "of columns": (lambda q, k, v: q.sum((1, 2)), "it sums something else than all rows"),
    "a part": (lambda q, k, v: q[:, 1:].sum((0, 1)), "it sums something else than all rows"),
    "half": (lambda q, k, v: q.view(-1, WIDTH)[T:].sum(0), "it sums part of them, or more"),
    "columns": (lambda q, k, v: q[..., 1:].sum((0, 1)), "it sums part of them, or more"),
    "wide": (lambda q, k, v: q.double().sum((0, 1)) + q.sum((0, 1), dtype=vt.float64), "float64"),
    "twice": (
        lambda q, k, v: (q.sum((0, 1)), q.view(-1, WIDTH).sum(0, keepdim=True)),
        "another sum has them",
    ),
    "changed": (lambda q, k, v: q.mul_(2).sum((0, 1)), "changes the rows first"),
    "joined": (lambda q, k, v: (vt.cat([q, q], 2).sum((0, 1)), q), "cat is between"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_near_misses(name: str) -> None:
    function, why = CASES[name]
    names = captured_names(lambda: _gradients(function), _inputs(), 1e-5)
    assert any(why in text for text in _why()), (names, decisions())
    assert names.count(FUSED) == (name == "twice")


@pytest.mark.parametrize("early", [False, True])
def test_memory_in_use_stays(early: bool) -> None:
    def make() -> Any:
        total = vt.zeros(WIDTH)

        def sums(q: Any, k: Any, v: Any) -> Any:
            before = total * 1 + k[0, 0] if early else k[0, 0] * 1  # after attention
            vt.sum(q, (0, 1), out=total)
            return before, total * 1

        return _gradients(sums)

    names = captured_names(make, _inputs(), 1e-5)
    assert (FUSED in names) is not early, decisions()
    why = "the sums' memory is in use before"
    assert any(why in text for text in _why()) is early, decisions()


@pytest.mark.parametrize("keep", [False, True])
def test_sums_in_float32_of_16_bits(keep: bool) -> None:
    def function(q: Any, k: Any, v: Any) -> Any:
        return k.sum((0, 1), keepdim=keep, dtype=vt.float32), v.sum((0, 1), dtype=vt.float32)

    def half(x: Any) -> Any:
        return _gradients(function)(x.to(vt.bfloat16))

    names = captured_names(lambda: half, _inputs(), 2.0**-7 if kind() != "cpu" else 0.0)
    assert names.count(FUSED) == 1 and "sum.dim" not in names, decisions()
    assert _made() == 2
