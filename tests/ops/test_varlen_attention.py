"""varlen_attn against softmax over an explicit mask, sequence by sequence, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE
from vibetensor.torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out

TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
LENGTHS = {
    "equal": ([5, 12, 1], [5, 12, 1]),
    "empty": ([0, 7, 0, 3, 0], [0, 7, 4, 0, 0]),
    "more keys": ([3, 130], [9, 300]),
    "fewer keys": ([40, 200], [7, 70]),
    "long": ([513], [513]),
    "none": ([0], [0]),
}


def starts(lengths: list[int], first: int = 0) -> Any:
    return vt.tensor(np.cumsum([first, *lengths]).astype(np.int32))


def packed(
    lengths: tuple[list[int], list[int]], heads: int, key_heads: int, d: int, dv: int,
    dtype: str = "float64", padding: int = 0,
) -> list[Any]:  # fmt: skip
    rng = np.random.default_rng(sum(map(sum, lengths)) + d)
    tq, tk = (sum(n) + padding for n in lengths)
    shapes = [(tq, heads, d), (tk, key_heads, d), (tk, key_heads, dv), (tq, heads, dv)]
    return [
        vt.tensor(rng.standard_normal(s), dtype=vt.float64).to(getattr(vt, dtype)) for s in shapes
    ]


def window_mask(queries: int, keys: int, window: tuple[int, int]) -> np.ndarray:
    level = np.arange(queries)[:, None] + keys - queries
    key = np.arange(keys)[None, :]
    left, right = window
    seen = np.ones((queries, keys), bool)
    if left >= 0:
        seen &= key >= level - left
    if right >= 0:
        seen &= key <= level + right
    return seen


def reference(
    operands: list[Any], lengths: tuple[list[int], list[int]], window: tuple[int, int],
    scale: float | None, first: tuple[int, int] = (0, 0),
) -> list[np.ndarray]:  # fmt: skip
    """Output, log-sum-exps and the three gradients for the gradient that is the fourth operand."""
    q, k, v, g = (x.detach().double().numpy() for x in operands)
    group = q.shape[1] // k.shape[1]
    factor = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out, lse = np.zeros_like(g), np.full(q.shape[:2], -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    q0, k0 = first
    for queries, keys in zip(*lengths, strict=True):
        at, to = slice(q0, q0 + queries), slice(k0, k0 + keys)
        q0, k0 = q0 + queries, k0 + keys
        seen = window_mask(queries, keys, window)
        for h in range(q.shape[1]):
            kv = h // group
            scores = np.where(seen, q[at, h] @ k[to, kv].T * factor, -np.inf)
            top = scores.max(1, keepdims=True, initial=-np.inf)
            some = np.isfinite(top)
            e = np.where(some, np.exp(scores - np.where(some, top, 0)), 0)
            total = e.sum(1, keepdims=True)
            p = e / np.where(total > 0, total, 1)
            with np.errstate(divide="ignore"):
                lse[at, h] = (top + np.log(total))[:, 0]
            out[at, h] = p @ v[to, kv]
            dp = g[at, h] @ v[to, kv].T
            ds = p * (dp - (dp * p).sum(1, keepdims=True)) * factor
            dq[at, h] = ds @ k[to, kv]
            dk[to, kv] += ds.T @ q[at, h]
            dv[to, kv] += p.T @ g[at, h]
    return [out, lse, dq, dk, dv]


def run(
    operands: list[Any], cu: tuple[Any, Any], window: tuple[int, int], scale: float | None = None
) -> list[np.ndarray]:
    leaves = [x.detach().requires_grad_() for x in operands[:3]]
    out, lse = varlen_attn(
        *leaves, *cu, 0, 0, window_size=window, scale=scale, return_aux=AuxRequest(lse=True),
        enable_gqa=leaves[0].size(1) != leaves[1].size(1),
    )  # fmt: skip
    assert out.dtype == operands[0].dtype
    out.backward(operands[3])
    return [x.detach().double().numpy() for x in (out, lse, *(leaf.grad for leaf in leaves))]


def compare(ours: list[np.ndarray], other: list[np.ndarray], tolerance: float) -> None:
    for a, b in zip(ours, other, strict=True):
        finite = np.abs(b[np.isfinite(b)])
        atol = tolerance * max(1.0, float(finite.max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol)


WINDOWS = [(-1, -1), (-1, 0), (3, 0), (0, 0), (2, 5), (-1, 4), (100, -1), (300, 300), (70, 0)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_windows(lengths: str, window: tuple[int, int]) -> None:
    both = LENGTHS[lengths]
    operands = packed(both, 2, 2, 6, 5)
    cu = (starts(both[0]), starts(both[1]))
    compare(run(operands, cu, window), reference(operands, both, window, None), 1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("window", [(-1, 0), (33, 2)])
def test_dtypes_widths_and_shared_heads(
    dtype: str, d: int, key_heads: int, window: tuple[int, int]
) -> None:
    both = ([70, 0, 90, 5], [70, 3, 90, 5])
    operands = packed(both, 4, key_heads, d, d, dtype)
    cu = (starts(both[0]), starts(both[1]))
    compare(run(operands, cu, window), reference(operands, both, window, None), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_window_much_shorter_than_the_sequence(dtype: str) -> None:
    both = ([1500, 300], [1500, 300])
    operands = packed(both, 1, 1, 8, 8, dtype)
    cu = (starts(both[0]), starts(both[1]))
    for window in ((40, 0), (255, 1), (256, 0), (0, 600)):
        compare(
            run(operands, cu, window, 0.4),
            reference(operands, both, window, 0.4),
            TOLERANCE[dtype],
        )


def test_tokens_of_no_sequence_are_zeros() -> None:
    both = ([4, 9], [6, 2])
    operands = packed(both, 2, 1, 4, 4, padding=11)
    cu = (starts(both[0], 5), starts(both[1], 3))
    ours = run(operands, cu, (-1, 0))
    compare(ours, reference(operands, both, (-1, 0), None, (5, 3)), 1e-10)
    assert not ours[0][:5].any() and not ours[0][18:].any()
    assert np.isneginf(ours[1][:5]).all() and np.isneginf(ours[1][18:]).all()
    assert not ours[3][:3].any() and not ours[3][11:].any()


def test_layouts() -> None:
    """Slices of one projection, transposed heads, and int64 starts."""
    both = ([5, 8], [5, 8])
    whole = vt.tensor(np.random.default_rng(2).standard_normal((13, 3, 2, 6)))
    operands = [*whole.unbind(1), vt.ones(2, 13, 6, dtype=vt.float64).transpose(0, 1)]
    cu = starts(both[0]).long()
    compare(run(operands, (cu, cu), (2, 0)), reference(operands, both, (2, 0), None), 1e-10)


def test_causal_attention_of_equal_lengths_is_scaled_dot_product_attention() -> None:
    q, k, v = (vt.randn(3, 2, 150, 16) for _ in range(3))
    want = vt.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    flat = [x.transpose(1, 2).reshape(450, 2, 16) for x in (q, k, v)]
    cu = starts([150, 150, 150])
    got = varlen_attn(*flat, cu, cu, 150, 150, window_size=(-1, 0))
    got = got.reshape(3, 150, 2, 16).transpose(1, 2)
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [(-1, -1), (2, 1)])
def test_gradcheck(window: tuple[int, int]) -> None:
    both = ([3, 0, 5], [4, 1, 5])
    leaves = [x.requires_grad_() for x in packed(both, 2, 1, 3, 2)[:3]]
    cu = (starts(both[0]), starts(both[1]))
    assert vt.autograd.gradcheck(
        lambda q, k, v: varlen_attn(q, k, v, *cu, 5, 5, window_size=window, enable_gqa=True), leaves
    )


def test_sequences_do_not_depend_on_others() -> None:
    both = ([60, 130], [60, 130])
    operands = packed(both, 2, 2, 8, 8, "float32")
    cu = starts(both[0])
    together = run(operands, (cu, cu), (50, 0))
    for index, (begin, end) in enumerate(itertools.pairwise(np.cumsum([0, *both[0]]))):
        alone = starts([both[0][index]])
        part = run([x[begin:end] for x in operands], (alone, alone), (50, 0))
        for a, b in zip(together, part, strict=True):
            assert (a[begin:end] == b).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the CPU's bytes")
def test_no_matrix_of_scores() -> None:
    from vibetensor import _C

    t = 6000
    leaves = [vt.randn(t, 1, 8, requires_grad=True) for _ in range(3)]
    cu = starts([t])
    varlen_attn(*leaves, cu, cu, t, t, window_size=(64, 0)).sum().backward()
    before = _C._cpu_memory_stats()["allocated_bytes"]
    _C._cpu_reset_peak_memory()
    varlen_attn(*leaves, cu, cu, t, t, window_size=(64, 0)).sum().backward()
    assert _C._cpu_memory_stats()["peak_bytes"] - before < 20 * t * 8 * 4 < t * t / 8


def test_out_and_autocast() -> None:
    q, k, v = (vt.randn(9, 2, 4) for _ in range(3))
    cu = starts([4, 5])
    want = varlen_attn(q, k, v, cu, cu, 5, 5)
    out = vt.empty_like(q)
    assert varlen_attn_out(out, q, k, v, cu, cu, 5, 5) is out
    assert (out == want).all()
    with vt.autocast(q.device.type, dtype=vt.bfloat16):
        assert varlen_attn(q, k, v, cu, cu, 5, 5).dtype == vt.bfloat16


def test_errors() -> None:
    q, k, v = (vt.randn(9, 2, 4) for _ in range(3))
    cu = starts([4, 5])
    three = vt.randn(9, 3, 4)
    for call, error, message in (
        (lambda: varlen_attn(three, k, v, cu, cu, 5, 5), ValueError, "enable_gqa"),
        (lambda: varlen_attn(three, k, v, cu, cu, 5, 5, enable_gqa=True), ValueError, "multiple"),
        (lambda: varlen_attn(q[0], k, v, cu, cu, 5, 5), RuntimeError, "tokens, heads, width"),
        (lambda: varlen_attn(q, k[..., :3], v, cu, cu, 5, 5), RuntimeError, "do not fit"),
        (lambda: varlen_attn(q, k.double(), v, cu, cu, 5, 5), RuntimeError, "one floating dtype"),
        (lambda: varlen_attn(q, k, v, cu, cu[:2], 5, 5), RuntimeError, "cu_seq_q and cu_seq_k"),
        (lambda: varlen_attn(q, k, v, cu.float(), cu, 5, 5), RuntimeError, "int32 or int64"),
        (lambda: varlen_attn(q, k, v, cu, None, 5, 5), ValueError, "block_table"),
        (
            lambda: varlen_attn(q, k, v, cu, cu, 5, 5, seqused_k=cu[1:]),
            NotImplementedError,
            "seqused_k",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    if DEVICE == "cpu":
        for bad in ([0, 4, 10], [0, 5, 4], [-1, 4, 9]):
            with pytest.raises(RuntimeError, match="cu_seq_q must rise"):
                varlen_attn(q, k, v, vt.tensor(bad), cu, 5, 5)


def test_signature_is_torchs() -> None:
    torch_varlen = pytest.importorskip("torch.nn.attention.varlen")
    import inspect

    for name in ("varlen_attn", "varlen_attn_out"):
        mine = inspect.signature(globals()[name]).parameters
        other = inspect.signature(getattr(torch_varlen, name)).parameters
        if "block_table" not in other:
            pytest.skip("torch 2.13 has it so")
        assert [(n, p.default, p.kind) for n, p in mine.items()] == [
            (n, p.default, p.kind) for n, p in other.items()
        ]
