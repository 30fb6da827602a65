"""Sums over rows of attention's gradients, by the kernels that write these and after those that do not:
the op itself, and what captured steps make of a projection's bias. Against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor import _C
from vibetensor.graphs import capture, passes
from vibetensor.torch.nn.attention import SDPBackend, sdpa_kernel

ops = _C._ops
CUDNN, OURS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
D = 64


def _poison() -> None:
    """Leaves NaN in the memory that outputs and scratch will get."""
    tensors = [torch.full((1 << n,), float("nan"), device="cuda") for n in range(7, 25)]
    tensors += [torch.full((3 << n,), float("nan"), device="cuda") for n in range(7, 23)]
    del tensors


def _operands(b: int, h: int, kv: int, t: int, dtype: Any, width: int = D) -> list[Any]:
    """Query, key, value and the output's gradient, as heads of rows (B, T, H * D), between NaN: what is
    read beyond a row, a head or a batch shows."""
    counts = [h, kv, kv, h]
    around = torch.full((b, t + 2, sum(counts) + 2, width), float("nan"), device="cuda").to(dtype)
    operands, at = [], 1
    for count in counts:
        operand = around[:, 1:-1, at : at + count].transpose(1, 2)
        operand.copy_(torch.randn(b, count, t, width, device="cuda").to(dtype))
        operands.append(operand)
        at += count
    return operands


def _saved(
    operands: list[Any], causal: bool, mask: Any = None, dropout: float = 0.0
) -> tuple[Any, ...]:
    """The arguments of both backward ops."""
    q, k, v, grad = operands
    scale = q.shape[3] ** -0.5
    out, lse, state = ops._attention(q, k, v, mask, dropout, causal, scale)
    return (grad, q, k, v, mask, out, lse, state, dropout, causal, scale)


def _gradients(operands: list[Any], causal: bool) -> list[np.ndarray]:
    """Gradients of query, key and value, in float64."""
    q, k, v, g = (x.double().cpu().numpy() for x in operands)
    sharing, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    k, v = k.repeat(sharing, 1), v.repeat(sharing, 1)
    scores = q @ k.swapaxes(-1, -2) * scale
    if causal:
        scores[..., ~np.tri(q.shape[2], dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale

    def shared(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, sharing, *x.shape[2:]).sum(2)

    return [ds @ k, shared(ds.swapaxes(-1, -2) @ q), shared(p.swapaxes(-1, -2) @ g)]


def _sums(grad: np.ndarray) -> np.ndarray:
    return grad.sum((0, 2)).reshape(-1)


def _numbers(t: Any) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def _check_sums(sums: Any, grad: Any, eps: float) -> None:
    """`grad` is what was written: sums of it in float32, rounded once to a dtype of `eps`. A row that
    is missing, or one too many, is far outside of this."""
    rows = _numbers(grad)
    want, size = _sums(rows), _sums(np.abs(rows))
    error = np.abs(_numbers(sums) - want)
    assert (error <= eps * np.abs(want) + 4e-6 * size).all(), (error - eps * np.abs(want)).max()


def _check_op(arguments: tuple[Any, ...], dtype: Any, results: tuple[Any, ...] = ()) -> list[Any]:
    """The op's gradients have the bits of the plain op's, its sums are theirs, and repeat."""
    plain = ops._attention_backward(*arguments)
    for result in results or (None, torch.float32):
        _poison()
        made = ops._attention_backward_sums(*arguments, True, True, True, result)
        _poison()
        again = ops._attention_backward_sums(*arguments, True, True, True, result)
        eps = float(torch.finfo(result or dtype).eps) / 2
        for i in range(3):
            assert np.array_equal(_numbers(made[i]), _numbers(plain[i]))
            assert made[i + 3].dtype == (result or dtype)
            _check_sums(made[i + 3], plain[i], eps)
            assert np.array_equal(_numbers(made[i + 3]), _numbers(again[i + 3]))
    return list(made)


# Up to 128 rows a head is a block's; then tiles of 64, and of 128 on Hopper.
LENGTHS = [
    1,
    2,
    15,
    16,
    17,
    33,
    63,
    64,
    65,
    79,
    80,
    81,
    97,
    127,
    128,
    129,
    191,
    192,
    200,
    255,
    257,
    511,
]
WHOLE = [128, 256, 384, 640, 1024]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, D])
@pytest.mark.parametrize("t", sorted({*LENGTHS, *WHOLE}))
def test_every_length(t: int, width: int, dtype: Any, causal: bool) -> None:
    torch.manual_seed(t)
    operands = _operands(3, 5, 5, t, dtype, width)
    with sdpa_kernel(OURS):
        made = _check_op(_saved(operands, causal), dtype)
    # The same from float64 alone: gradients are rounded, and weights before them.
    want = _gradients(operands, causal)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    size = max(np.abs(grad).max() for grad in want) * (3 * t) ** 0.5
    for sums, grad in zip(made[3:], want):
        error = np.abs(_numbers(sums) - _sums(grad))
        assert error.max() <= 3 * rounding * max(np.abs(_sums(grad)).max(), size)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("b", "h", "kv", "t"),
    [
        (1, 8, 2, 128),
        (2, 8, 2, 256),
        (1, 6, 1, 384),
        (3, 64, 16, 256),
        (2, 4, 2, 200),
        (12, 12, 12, 256),
    ],
)
def test_shared_key_heads_and_many_heads(b: int, h: int, kv: int, t: int, causal: bool) -> None:
    """More heads than a GPU has multiprocessors, whose blocks have several each."""
    torch.manual_seed(h)
    with sdpa_kernel(OURS):
        _check_op(_saved(_operands(b, h, kv, t, torch.bfloat16), causal), torch.bfloat16)


@pytest.mark.parametrize(
    ("b", "h", "kv", "t", "width"),
    [
        (64, 6, 6, 256, 64),
        (512, 6, 6, 65, 64),
        (32, 12, 12, 1024, 64),
        (8, 32, 8, 2048, 64),
        (256, 8, 8, 80, 32),
        (64, 8, 8, 128, 32),
    ],
)
def test_models_shapes(b: int, h: int, kv: int, t: int, width: int) -> None:
    torch.manual_seed(0)
    operands = _operands(b, h, kv, t, torch.bfloat16, width)
    _check_op(_saved(operands, t not in (65, 80)), torch.bfloat16, (torch.bfloat16,))


@pytest.mark.parametrize(
    ("h", "kv", "t", "width"),
    [(2, 2, 65, 64), (2, 2, 200, 64), (2, 2, 256, 64), (4, 2, 256, 64), (2, 2, 65, 32)],
)
def test_wanted_ones_alone(h: int, kv: int, t: int, width: int) -> None:
    torch.manual_seed(1)
    with sdpa_kernel(OURS):
        arguments = _saved(_operands(2, h, kv, t, torch.bfloat16, width), True)
        whole = ops._attention_backward_sums(*arguments, True, True, True, None)
        for bits in range(8):
            wanted = [bool(bits >> i & 1) for i in range(3)]
            _poison()
            made = ops._attention_backward_sums(*arguments, *wanted, None)
            for i in range(3):
                assert np.array_equal(_numbers(made[i]), _numbers(whole[i]))
                if wanted[i]:
                    assert np.array_equal(_numbers(made[i + 3]), _numbers(whole[i + 3]))
                else:
                    assert made[i + 3] is None


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("case", ["cudnn", "mask", "dropout", "width"])
def test_after_kernels_without_sums(case: str, dtype: Any) -> None:
    torch.manual_seed(2)
    width = 48 if case == "width" else D
    operands = _operands(2, 3, 3, 130, dtype, width)
    mask = torch.randn(130, 130, device="cuda").to(dtype) if case == "mask" else None
    with sdpa_kernel(CUDNN if case == "cudnn" else OURS):
        arguments = _saved(operands, case == "cudnn", mask, 0.3 if case == "dropout" else 0.0)
        _check_op(arguments, dtype, (None,))


def test_sums_of_other_dtypes() -> None:
    """float64 is summed in float64."""
    torch.manual_seed(3)
    with sdpa_kernel(OURS):
        arguments = _saved(_operands(2, 2, 2, 65, torch.bfloat16), False)
        made = ops._attention_backward_sums(*arguments, True, True, True, torch.float64)
        for sums, grad in zip(made[3:], made[:3]):
            rows = _numbers(grad)
            np.testing.assert_allclose(
                _numbers(sums), _sums(rows), rtol=1e-12, atol=1e-13 * _sums(np.abs(rows)).max()
            )


def test_without_rows_sums_are_zeros() -> None:
    for b, t in ((0, 4), (2, 0)):
        q = torch.randn(b, 2, t, D, device="cuda").to(torch.bfloat16)
        _poison()
        made = ops._attention_backward_sums(*_saved([q] * 4, False), True, True, True, None)
        assert all((_numbers(s) == 0).all() and s.numel() == 2 * D for s in made[3:])


def test_a_nan_stays_in_its_columns() -> None:
    """Rows beyond a sequence are computed, and never counted."""
    for t, width in ((65, 64), (130, 64), (256, 64), (65, 32)):
        operands = _operands(2, 2, 2, t, torch.bfloat16, width)
        operands[1][1, 1, 3, 7] = float("inf")
        with sdpa_kernel(OURS):
            arguments = _saved(operands, True)
            made = ops._attention_backward_sums(*arguments, True, True, True, None)
        for grad, sums in zip(made[:3], made[3:]):
            good = np.isfinite(_numbers(grad)).all((0, 2)).reshape(-1)
            assert np.array_equal(np.isfinite(_numbers(sums)), good)
            assert good.any()


# Captured steps.


@contextlib.contextmanager
def _without_the_pass() -> Iterator[None]:
    kept = passes.ALL
    passes.ALL = tuple(p for p in kept if p is not passes.attention_sums)
    try:
        yield
    finally:
        passes.ALL = kept


def _split(qkv: Any, h: int, kv: int) -> list[Any]:
    b, t, _ = qkv.shape
    parts = qkv.split([n * D for n in (h, kv, kv)], dim=2)
    return [z.view(b, t, -1, D).transpose(1, 2) for z in parts]


def _slices(qkv: Any, h: int, kv: int) -> list[Any]:
    b, t, _ = qkv.shape
    return list(qkv.reshape(b, t, 3, h, D).permute(2, 0, 3, 1, 4).unbind(0))


def _train(b: int, t: int, h: int, kv: int, parts: Any, causal: bool) -> tuple[Any, list[Any]]:
    torch.manual_seed(t)
    width, rows = h * D, (h + 2 * kv) * D
    weight = (torch.randn(rows, width, device="cuda") * width**-0.5).to(torch.bfloat16)
    bias = torch.randn(rows, device="cuda").to(torch.bfloat16)
    state = [weight.requires_grad_(), bias.requires_grad_()]
    out = torch.randn(b, t, width, device="cuda").to(torch.bfloat16)

    def step(x: Any) -> Any:
        for p in state:
            p.grad = None
        q, k, v = parts(F.linear(x, weight, bias), h, kv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv != h)
        (y.transpose(1, 2).reshape(b, t, width) * out).sum().backward()
        return y * 1, weight.grad * 1, bias.grad * 1

    return step, [torch.randn(b, t, width, device="cuda").to(torch.bfloat16)]


def _names(step: Any) -> list[str]:
    return [op.name for op in step.tape().ops if not op.is_view]


@pytest.mark.parametrize("backend", [OURS, CUDNN], ids=["ours", "cudnn"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("b", "t", "h", "kv", "parts"),
    [
        (8, 65, 3, 3, _slices),
        (4, 200, 3, 3, _split),
        (4, 256, 6, 6, _split),
        (2, 384, 6, 2, _split),
        (140, 128, 1, 1, _slices),
    ],
)
def test_captured(
    b: int, t: int, h: int, kv: int, parts: Any, causal: bool, backend: SDPBackend, tmp_path: Path
) -> None:
    step, inputs = _train(b, t, h, kv, parts, causal)
    with sdpa_kernel(backend):
        captured, plain = capture(step), capture(step)
        found = [[_numbers(r) for r in captured(*inputs)] for _ in range(4)]
        with _without_the_pass():
            want = [[_numbers(r) for r in plain(*inputs)] for _ in range(3)]
        eager = [_numbers(r) for r in step(*inputs)]
    names = _names(captured)
    assert names.count("_attention_backward_sums") == 1 and "cat" not in names, names
    assert "sum.dim" not in names and "_mm_row_sums" not in names, names
    assert "_attention_backward_sums" not in _names(plain)
    for results in found[1:]:
        for a, e in zip(results, found[0]):
            assert np.array_equal(a, e)
    for a, e in zip(found[-1][:2], want[-1][:2]):  # the output, and the weight's gradient
        assert np.array_equal(a, e)
    bound = captured.tape().bound
    assert bound == 2.0**-7
    for e in (want[-1][2], eager[2]):
        assert np.abs(found[-1][2] - e).max() <= bound * np.abs(e).max()
    path = tmp_path / "graph.dot"
    captured.variants[0].lowered.program.dump(str(path))
    text = path.read_text(encoding="utf-8")
    hopper = torch.cuda.get_device_capability()[0] == 9 and t % 128 == 0
    alone = kv == h and (t <= 128 or t % 128 != 0 or (causal and t <= 256))
    if backend == OURS and (hopper or alone):
        # None reads the gradients again, and the kernel that sums is one of ours.
        assert "sum_rows" not in text and "add_parts" in text
        assert any(k in text for k in ("backward_head", "tile_gradients", "long_gradients"))
    else:
        assert "sum_rows" in text


def test_fallback_costs_what_it_did(tmp_path: Path) -> None:
    """By cuDNN: the nodes of the step without the pass, one sum over all three."""
    step, inputs = _train(8, 256, 4, 4, _split, True)
    with sdpa_kernel(CUDNN):
        captured, plain = capture(step), capture(step)
        for _ in range(3):
            bits = [_numbers(r) for r in captured(*inputs)]
        with _without_the_pass():
            for _ in range(3):
                want = [_numbers(r) for r in plain(*inputs)]
    assert all(np.array_equal(a, e) for a, e in zip(bits, want))
    assert "_attention_backward_sums" in _names(captured)
    counts = [sum(s.variants[0].lowered.program.nodes()) for s in (captured, plain)]
    assert counts[0] == counts[1]


def test_fewer_nodes_by_our_kernels() -> None:
    """The reading of the gradients goes; the adding up of parts stays."""
    for b, t, causal in ((512, 65, False), (64, 200, True), (16, 256, True)):
        step, inputs = _train(b, t, 12, 12, _split, causal)
        with sdpa_kernel(OURS):
            captured, plain = capture(step), capture(step)
            for _ in range(3):
                captured(*inputs)
            with _without_the_pass():
                for _ in range(3):
                    plain(*inputs)
        counts = [sum(s.variants[0].lowered.program.nodes()) for s in (captured, plain)]
        assert counts[0] == counts[1] - 1
