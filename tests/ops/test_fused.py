"""Fused ops against the plain ops they stand for, on random shapes, odd and empty ones too. On the
CPU bit for bit; on a device within a rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor import _C

ops = _C._ops
FLOATS = [vt.float32, vt.float64, vt.bfloat16, vt.float16]
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu"]


def _same(mine: Any, other: Any, dtype: Any = None, least: float = 1e-7) -> None:
    """Bit for bit on the CPU; elsewhere within a few roundings of the coarsest dtype, or of
    `least`."""
    assert mine.dtype == other.dtype and mine.shape == other.shape
    a, b = mine.double().cpu().numpy(), other.double().cpu().numpy()
    if mine.device.type == "cpu":
        np.testing.assert_array_equal(a, b)
        return
    eps = float(vt.finfo(dtype or mine.dtype).eps)
    scale = np.abs(b[np.isfinite(b)]).max(initial=1.0)
    bound = 8 * max(eps, least)
    np.testing.assert_allclose(a, b, rtol=bound, atol=bound * scale)


def _normal(*shape: int, dtype: Any = vt.float32) -> Any:
    return vt.randn(shape).to(dtype)


SHAPES = [(3, 5), (1, 1), (7, 64), (2, 3, 17), (33, 129), (0, 8), (5, 1100)]
PAIRS = [
    (vt.float32, vt.float32),
    (vt.float32, vt.bfloat16),
    (vt.bfloat16, vt.bfloat16),
    (vt.float16, vt.float16),
    (vt.float64, vt.float64),
    (vt.float64, vt.float32),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_residual_norm(shape: tuple, dtypes: tuple, affine: bool, centred: bool) -> None:
    vt.manual_seed(1)
    x, r = (_normal(*shape, dtype=d) for d in dtypes)
    total = x + r
    n = [shape[-1]]
    weight = _normal(n[0], dtype=total.dtype) if affine else None
    bias = _normal(n[0], dtype=total.dtype) if affine else None
    for result_dtype in {total.dtype, vt.bfloat16} if total.dtype == vt.float32 else {total.dtype}:
        if centred:
            plain = ops.native_layer_norm(total, n, weight, bias, 1e-5)
            mine = ops._residual_layer_norm(x, r, n, weight, bias, 1e-5, result_dtype)
            alone = ops._residual_layer_norm(total, None, n, weight, bias, 1e-5, result_dtype)
        else:
            plain = ops._rms_norm(total, n, weight, 1e-5)
            mine = ops._residual_rms_norm(x, r, n, weight, 1e-5, result_dtype)
            alone = ops._residual_rms_norm(total, None, n, weight, 1e-5, result_dtype)
        _same(mine[0], plain[0].to(result_dtype))
        _same(mine[1], total)
        for a, b in zip(mine[2:], plain[1:]):
            _same(a, b)
        _same(alone[0], plain[0].to(result_dtype))
        assert alone[1] is None


@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (5,), (1, 1, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_residual_norm_of_rows_that_come_again(shape: tuple, dtypes: tuple) -> None:
    vt.manual_seed(1)
    x, r = _normal(2, 3, 5, dtype=dtypes[0]), _normal(*shape, dtype=dtypes[1])
    total = x + r
    plain = ops.native_layer_norm(total, [5], None, None, 1e-5)
    mine = ops._residual_layer_norm(x, r, [5], None, None, 1e-5, total.dtype)
    for a, b in zip(mine, (plain[0], total, *plain[1:])):
        _same(a, b)
    plain, mine = (
        ops._rms_norm(total, [5], None, 1e-5),
        ops._residual_rms_norm(x, r, [5], None, 1e-5, total.dtype),
    )
    for a, b in zip(mine, (plain[0], total, *plain[1:])):
        _same(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_residual_norm_backward(
    shape: tuple, dtype: Any, affine: bool, centred: bool, with_residual: bool
) -> None:
    vt.manual_seed(2)
    x, residual = _normal(*shape, dtype=dtype), _normal(*shape, dtype=dtype)
    n = [shape[-1]]
    weight = _normal(n[0], dtype=dtype) if affine else None
    low = vt.bfloat16 if dtype == vt.float32 else None
    narrow = vt.bfloat16 if dtype == vt.float32 else dtype
    grad = _normal(*shape, dtype=narrow)
    wide = grad.to(dtype)
    kept = residual if with_residual else None
    if centred:
        _, mean, rstd = ops.native_layer_norm(x, n, weight, weight, 1e-5)
        dx, *sums = ops.native_layer_norm_backward(wide, x, n, mean, rstd, weight, weight)
        made = ops._residual_layer_norm_backward(
            grad, kept, x, n, mean, rstd, weight, weight, low, [], False
        )
        summed = ops._residual_layer_norm_backward(
            grad, kept, x, n, mean, rstd, weight, weight, low, [], True
        )
    else:
        _, rstd = ops._rms_norm(x, n, weight, 1e-5)
        dx, *sums = ops._rms_norm_backward(wide, x, n, rstd, weight)
        made = ops._residual_rms_norm_backward(grad, kept, x, n, rstd, weight, low, [], False)
        summed = ops._residual_rms_norm_backward(grad, kept, x, n, rstd, weight, low, [], True)
    total, *mine, copy, none = made
    expected = residual + dx if with_residual else dx
    _same(total, expected)
    for a, b in zip(mine, sums):
        assert (a is None) == (b is None)
        if a is not None:
            _same(a, b)
    if low is None:
        assert copy is None
    else:
        _same(copy, expected.to(low))
    assert none is None
    rows = total if copy is None else copy
    _same(summed[-1], rows.reshape(rows.numel() // n[0], n[0]).sum(0))
    for a, b in zip(summed, made[:-1]):
        assert (a is None and b is None) or bool((a == b).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradient_of_a_norm_in_terms(shape: tuple, dtype: Any, centred: bool, count: int) -> None:
    vt.manual_seed(3)
    narrow = vt.bfloat16 if dtype == vt.float32 else dtype
    x = _normal(*shape, dtype=dtype)
    n = [shape[-1]]
    weight = _normal(n[0], dtype=dtype)
    kept = _normal(*shape, dtype=dtype)
    first, *terms = (_normal(*shape, dtype=narrow) for _ in range(count + 1))
    total = first.to(dtype)
    for term in terms:
        total = total + term.to(dtype)
    if centred:
        _, mean, rstd = ops.native_layer_norm(x, n, weight, weight, 1e-5)
        rest = (kept, x, n, mean, rstd, weight, weight, None)
        expected = ops._residual_layer_norm_backward(total, *rest, [], False)
        found = ops._residual_layer_norm_backward(first, *rest, terms, False)
    else:
        _, rstd = ops._rms_norm(x, n, weight, 1e-5)
        rest = (kept, x, n, rstd, weight, None)
        expected = ops._residual_rms_norm_backward(total, *rest, [], False)
        found = ops._residual_rms_norm_backward(first, *rest, terms, False)
    for a, b in zip(found[:-2], expected[:-2]):
        _same(a, b)


def test_residual_norm_refuses_what_does_not_fit() -> None:
    x = vt.randn(3, 4)
    with pytest.raises(RuntimeError, match="one shape"):
        ops._residual_layer_norm(x, vt.randn(3, 1), [4], None, None, 1e-5, vt.float32)
    for wrong in ((2, 4), (1,), (), (1, 3, 4), (3, 4, 1)):
        with pytest.raises(RuntimeError, match="one shape"):
            ops._residual_rms_norm(x, vt.zeros(wrong), [4], None, 1e-5, vt.float32)
    with pytest.raises(RuntimeError, match="one shape"):
        ops._residual_rms_norm(x, vt.randn(4), [3, 4], None, 1e-5, vt.float32)
    with pytest.raises(RuntimeError, match="residual like the input"):
        stats = vt.zeros(3, 1)
        ops._residual_layer_norm_backward(
            x, x.double(), x, [4], stats, stats, None, None, None, [], False
        )
    with pytest.raises(RuntimeError, match="terms like the input"):
        ops._residual_rms_norm_backward(x, None, x, [4], vt.zeros(3, 1), None, None, [x[:2]], False)


@pytest.mark.parametrize("rows,classes", [(4, 5), (1, 1), (33, 67), (12, 1030), (0, 3)])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16, vt.float16, vt.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_gradient(
    rows: int, classes: int, reduction: int, smoothing: float, dtype: Any, weighted: bool
) -> None:
    vt.manual_seed(3)
    logits = _normal(rows, classes, dtype=dtype)
    target = vt.randint(0, classes, (rows,))
    if rows > 2:
        target[1] = -100
    half = dtype in (vt.bfloat16, vt.float16)
    wide = logits.float() if half else logits
    weight = vt.rand(classes).to(wide.dtype) + 0.5 if weighted else None
    loss, lse, total = ops._cross_entropy_index(wide, target, weight, reduction, -100, smoothing)
    grad_output = vt.randn(rows) if reduction == 0 else vt.tensor(0.7)
    grad_output = grad_output.to(wide.dtype)
    grad = ops._cross_entropy_index_backward(
        grad_output, wide, target, weight, reduction, -100, smoothing, lse, total
    )
    mine, gradient = ops._cross_entropy_index_gradient(
        logits, target, weight, reduction, -100, smoothing, grad_output, wide.dtype
    )
    _same(mine, loss)
    _same(gradient, grad.to(dtype))


def test_cross_entropy_gradient_checks_targets() -> None:
    logits = vt.randn(3, 4)
    with pytest.raises(IndexError, match="out of bounds"):
        ops._cross_entropy_index_gradient(
            logits, vt.tensor([0, 4, 1]), None, 1, -100, 0.0, vt.tensor(1.0), vt.float32
        )


def _apply(name: str, x: Any) -> Any:
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return getattr(F, name)(x)


def _derivative(name: str, grad: Any, saved: Any) -> Any:
    if name == "relu":
        return ops.threshold_backward(grad, saved, 0)
    if name == "silu":
        return ops.silu_backward(grad, saved)
    return ops.gelu_backward(grad, saved, "tanh" if name == "gelu_tanh" else "none")


PRODUCTS = [
    (3, 4, 5),
    (1, 1, 1),
    (96, 64, 128),
    (130, 33, 71),
    (64, 700, 40),
    (0, 3, 4),
    (257, 96, 1100),
]


@pytest.mark.parametrize("m,k,n", PRODUCTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_linear_activation(m: int, k: int, n: int, activation: str, dtype: Any, keep: bool) -> None:
    vt.manual_seed(4)
    x, w, b = (_normal(*s, dtype=dtype) for s in ((m, k), (n, k), (n,)))
    for bias in (b, None):
        plain = F.linear(x, w, bias)
        result, kept = ops._linear_activation(x, w, bias, activation, keep)
        _same(result, _apply(activation, plain))
        if keep:
            _same(kept, plain)
        else:
            assert kept is None


@pytest.mark.parametrize("m,k,n", PRODUCTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mm_activation_backward(m: int, k: int, n: int, activation: str, dtype: Any) -> None:
    vt.manual_seed(5)
    a, b, saved = (_normal(*s, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
    # cuBLASLt has a tanh of fewer bits for this one.
    least = 1.25e-6 if activation == "gelu_tanh" and dtype == vt.float32 else 1e-7
    mine, *none = ops._mm_activation_backward(a, b, saved, activation, False)
    assert none == [None, None]
    _same(mine, _derivative(activation, a @ b, saved), least=least)
    for again in (False, True):
        other, sums, activated = ops._mm_activation_backward(a, b, saved, activation, True, again)
        _same(other, mine, least=least)
        _same(sums, mine.sum(0), least=least)
        assert (activated is not None) is again
        if again:
            _same(activated, _apply(activation, saved))
    across = b.t().contiguous().t()
    mine = ops._mm_activation_backward(a, across, saved.t().contiguous().t(), activation, False)
    _same(mine[0], _derivative(activation, a @ across, saved), least=least)


@pytest.mark.parametrize("m,k,n", PRODUCTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mm_row_sums(m: int, k: int, n: int, dtype: Any) -> None:
    vt.manual_seed(6)
    grad, x = _normal(k, m, dtype=dtype), _normal(k, n, dtype=dtype)
    product, sums = ops._mm_row_sums(grad.t(), x)
    _same(product, grad.t() @ x)
    _same(sums, grad.sum(0))


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64], ids=str)
@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("scale", [0.001, 10.0, float("nan")])
def test_clip_coefficient(dtype: Any, order: float, scale: float) -> None:
    vt.manual_seed(7)
    tensors = [_normal(5, 7, dtype=dtype) * scale, _normal(1100, dtype=dtype)]
    if scale == 0.001:
        tensors = [t * 1e-3 for t in tensors]
    norm = ops._multi_tensor_norm(tensors, order)
    coefficient = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    numbers = [vt.tensor(v, dtype=vt.float64, device="cpu") for v in (1.0, 1e-6, 1.0)]
    mine = ops._clip_coefficient(tensors, order, *numbers, dtype)
    _same(mine[0], norm)
    _same(mine[1], coefficient)


@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("narrow", [vt.bfloat16, vt.float16], ids=str)
def test_norm_of_narrow_tensors_is_that_of_wide_ones(order: float, narrow: Any) -> None:
    vt.manual_seed(7)
    shapes = [(5, 7), (1100,), (3, 8192), (1,), (8195,), (4096, 4)]
    tensors = [_normal(*shape, dtype=dtype) for shape in shapes for dtype in (vt.float32, narrow)]
    wide = [t.to(vt.float32) for t in tensors]
    numbers = [vt.tensor(v, dtype=vt.float64, device="cpu") for v in (1.0, 1e-6, 1.0)]
    for a, b in zip(
        ops._clip_coefficient(tensors, order, *numbers, vt.float32),
        ops._clip_coefficient(wide, order, *numbers, vt.float32),
    ):
        assert a.dtype == vt.float32
        _same(a, b)


def _lists(dtype: Any) -> list[list[Any]]:
    shapes = [(3, 5), (), (1030,), (64, 33)]
    return [[_normal(*s, dtype=dtype) for s in shapes] for _ in range(3)] + [
        [_normal(*s, dtype=dtype).abs() for s in shapes] for _ in range(2)
    ]


def _copies(lists: list[list[Any]]) -> list[list[Any]]:
    return [[t.clone() for t in tensors] for tensors in lists]


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64], ids=str)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("scaled,counted", [(True, True), (True, False), (False, True)])
def test_scaled_adam(
    dtype: Any, decoupled: bool, amsgrad: bool, scaled: bool, counted: bool
) -> None:
    vt.manual_seed(8)
    lists = _lists(dtype)
    steps = [vt.tensor(float(i + 1)) for i in range(4)]
    lists.append(steps)
    mine = _copies(lists)
    factor = vt.tensor(0.3, dtype=dtype)
    count = vt.tensor(1, device="cpu")
    options = dict(beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, maximize=False)
    p, g, m, v, top, s = lists
    if scaled:
        ops._foreach_mul_(g, factor)
    if counted:
        ops._foreach_add_(s, 1)
    update = ops._fused_adamw_ if decoupled else ops._fused_adam_
    update(p, g, m, v, top if amsgrad else [], s, lr=1e-2, amsgrad=amsgrad, **options)
    p, g, m, v, top, s = mine
    ops._scaled_adam_(
        p, g, m, v, top if amsgrad else [], s, [],
        lr=vt.tensor(1e-2, dtype=vt.float64, device="cpu"),
        factor=factor if scaled else None, count=count if counted else None,
        amsgrad=amsgrad, decoupled=decoupled, **options,
    )  # fmt: skip
    for one, other in zip(mine, lists):
        for a, b in zip(one, other):
            _same(a, b)


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64], ids=str)
@pytest.mark.parametrize("momentum,nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("first", [True, False])
def test_scaled_sgd(dtype: Any, momentum: float, nesterov: bool, first: bool) -> None:
    vt.manual_seed(9)
    lists = _lists(dtype)[:3]
    mine = _copies(lists)
    factor = vt.tensor(0.3, dtype=dtype)
    options = dict(
        weight_decay=0.1, momentum=momentum, dampening=0.0, nesterov=nesterov, maximize=True,
        is_first_step=first,
    )  # fmt: skip
    p, g, b = lists
    ops._foreach_mul_(g, factor)
    ops._fused_sgd_(p, g, b if momentum else [], lr=1e-2, **options)
    p, g, b = mine
    lr = vt.tensor(1e-2, dtype=vt.float64, device="cpu")
    ops._scaled_sgd_(p, g, b if momentum else [], [], lr=lr, factor=factor, **options)
    for one, other in zip(mine, lists):
        for x, y in zip(one, other):
            _same(x, y)


@pytest.mark.parametrize("narrow", [vt.bfloat16, vt.float16], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kind", ["adam", "amsgrad", "sgd", "momentum"])
def test_updates_from_narrow_gradients(narrow: Any, scaled: bool, kind: str) -> None:
    vt.manual_seed(11)
    shapes = [(3, 5), (), (1030,), (64, 33), (8195,)]
    lists = [[_normal(*s) for s in shapes] for _ in range(3)]
    lists += [[_normal(*s).abs() for s in shapes] for _ in range(2)]
    # One gradient is float32 already.
    sources = [_normal(*s, dtype=vt.float32 if i == 2 else narrow) for i, s in enumerate(shapes)]
    lists[1] = [source.to(vt.float32).clone() for source in sources]
    mine = _copies(lists)
    mine[1] = [sources[i] if i == 2 else vt.full_like(t, 7.0) for i, t in enumerate(mine[1])]
    lr = vt.tensor(1e-2, dtype=vt.float64, device="cpu")
    factor = vt.tensor(0.3) if scaled else None
    for (p, g, m, v, top), read in ((lists, []), (mine, sources)):
        if kind in ("adam", "amsgrad"):
            steps = [vt.tensor(float(i + 1)) for i in range(len(shapes))]
            ops._scaled_adam_(
                p, g, m, v, top if kind == "amsgrad" else [], steps, read, lr=lr, factor=factor,
                count=None, amsgrad=kind == "amsgrad", decoupled=True, beta1=0.9, beta2=0.99,
                weight_decay=0.1, eps=1e-8, maximize=False,
            )  # fmt: skip
        else:
            ops._scaled_sgd_(
                p, g, m if kind == "momentum" else [], read, lr=lr, factor=factor,
                weight_decay=0.1, momentum=0.9 if kind == "momentum" else 0.0, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
    for one, other in zip(mine, lists):
        for x, y in zip(one, other):
            _same(x, y)


def test_addmm_into_itself() -> None:
    vt.manual_seed(10)
    total, a, b = vt.randn(40, 30), vt.randn(40, 50), vt.randn(50, 30)
    expected = vt.addmm(total, a, b)
    vt.addmm(total, a, b, out=total)
    np.testing.assert_array_equal(total.cpu().numpy(), expected.cpu().numpy())


HEADS = [
    (2, 3, 3, 5, 5, 4),
    (1, 4, 2, 7, 9, 8),
    (3, 1, 1, 65, 65, 16),
    (2, 2, 2, 0, 0, 4),
    (0, 2, 1, 3, 3, 4),
]


def _operands(b: int, h: int, kv: int, t: int, s: int, d: int, dtype: Any, rows: bool) -> list[Any]:
    """Gradient, query, key, value; with `rows` as the heads of rows (B, T, H * D)."""
    shapes = [(b, h, t, d), (b, h, t, d), (b, kv, s, d), (b, kv, s, d)]
    made = [_normal(*shape, dtype=dtype) for shape in shapes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made] if rows else made


@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("result", [None, vt.float32, vt.float64], ids=str)
def test_attention_backward_sums(shape: tuple, dtype: Any, rows: bool, result: Any) -> None:
    vt.manual_seed(7)
    grad, q, k, v = _operands(*shape, dtype, rows)
    out, lse, state = ops._attention(q, k, v, None, 0.0, True, 0.5)
    rest = (None, out, lse, state, 0.0, True, 0.5)
    plain = ops._attention_backward(grad, q, k, v, *rest)
    for wanted in [(True, True, True), (True, False, False), (False, True, True), (False,) * 3]:
        made = ops._attention_backward_sums(grad, q, k, v, *rest, *wanted, result)
        for mine, other, sums, asked in zip(made[:3], plain, made[3:], wanted):
            _same(mine, other)
            assert mine.stride() == other.stride()
            if not asked:
                assert sums is None
                continue
            by_rows = other.transpose(1, 2).sum((0, 1), dtype=result)
            want = by_rows if rows else other.sum((0, 2), dtype=result)
            _same(sums, want.reshape(-1), dtype=dtype)


def test_attention_backward_sums_takes_floats() -> None:
    q = _normal(1, 1, 2, 4)
    out, lse, state = ops._attention(q, q, q, None, 0.0, False, 1.0)
    with pytest.raises(RuntimeError, match="_attention_backward_sums: expected float16.*got int64"):
        ops._attention_backward_sums(
            q, q, q, q, None, out, lse, state, 0.0, False, 1.0, True, True, True, vt.int64
        )
