"""What tune.py measures beside rows and products: attention of few keys, dropout, embeddings, AdamW and
the loss whose gradients lie over its logits. Each case names its extents as the contracts do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F

ROWS = (1024, 8192, 16384, 32768)
# Rows of logits for each size of a vocabulary.
VOCABULARIES = (
    (65, ROWS),
    (4096, ROWS),
    (32000, ROWS[:3]),
    (50304, ROWS),
    (131072, (4096,)),
)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass
class Case:
    """A shape: its extents in the contract, the arguments of a variant and the library's call."""

    extents: dict[str, int]
    arguments: Callable[[Any], dict[str, Any]]  # of a variant
    library: Callable[[], object]


def attention(backward: bool) -> Iterator[tuple[str, Case]]:
    """Heads of 64 in the layout of a packed projection, which the models have."""
    for b, h in ((12, 6), (64, 6), (256, 6), (64, 12), (128, 16)):
        for t in (64, 128, 197, 256):
            for causal in (False, True):
                packed = torch.randn(b, t, 3, h, 64, device="cuda").to(torch.bfloat16)
                q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
                o, grad = (
                    torch.randn(b, t, h, 64, device="cuda").to(torch.bfloat16).transpose(1, 2)
                    for _ in range(2)
                )
                lse = torch.zeros(b, h, t, device="cuda")
                grads = [torch.empty_like(packed)[:, :, i].transpose(1, 2) for i in range(3)]
                heads = (q, k, v)

                def given(_, t=(heads, o, lse, grad, grads)) -> dict[str, Any]:
                    (q, k, v), o, lse, grad, grads = t
                    named = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "scale": 0.125}
                    if backward:
                        named |= dict(zip(("grad_q", "grad_k", "grad_v"), grads)) | {"grad": grad}
                    return named

                leaves = [x.detach().requires_grad_() for x in heads]
                made = F.scaled_dot_product_attention(*leaves, is_causal=causal)

                def library(t=(heads, leaves, made, grad), causal=causal) -> object:
                    heads, leaves, made, grad = t
                    if backward:
                        return torch.autograd.grad(made, leaves, grad, retain_graph=True)
                    return F.scaled_dot_product_attention(*heads, is_causal=causal)

                extents = {"b": b, "h": h, "t": t, "width": 64, "causal": int(causal)}
                yield "bf16", Case(extents, given, library)


def dropout() -> Iterator[tuple[str, Case]]:
    for code, dtype in DTYPES.items():
        for n in (1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26):
            x = torch.randn(n, device="cuda").to(dtype)
            y, mask = torch.empty_like(x), torch.empty(n, dtype=torch.bool, device="cuda")

            def given(_, t=(x, y, mask)) -> dict[str, Any]:
                x, y, mask = t
                return {"x": x, "y": y, "mask": mask, "limit": int(0.1 * 2**32),
                        "scale": 1 / 0.9, "seed": 1, "offset": 0}  # fmt: skip

            yield (
                code,
                Case({"n": n, "words": 2}, given, lambda x=x: torch.native_dropout(x, 0.1, True)),
            )


def embedding() -> Iterator[tuple[str, Case]]:
    """The whole gradient against the launch that follows the sort of the indices, which both have:
    rows hold for differences larger than the sort."""
    for code, dtype in DTYPES.items():
        for words in (65, 1024, 32000, 50304):
            for positions in (1024, 16384, 65536):
                for d in (384, 768, 2048):
                    keys, order = torch.sort(torch.randint(0, words, (positions,), device="cuda"))
                    dy = torch.randn(positions, d, device="cuda").to(dtype)
                    table = torch.zeros(words, d, device="cuda").to(dtype)
                    narrow = keys.int(), order.int()

                    def given(_, t=(dy, narrow, table)) -> dict[str, Any]:
                        dy, (keys, order), table = t
                        return {"dy": dy, "keys": keys, "order": order, "table": table,
                                "padding_idx": -1}  # fmt: skip

                    indices = keys[torch.argsort(order)]
                    weight = table.detach().requires_grad_()
                    out = F.embedding(indices, weight)

                    def library(t=(out, weight, dy)) -> object:
                        out, weight, dy = t
                        return torch.autograd.grad(out, weight, dy, retain_graph=True)

                    extents = {"positions": positions, "words": words, "d": d}
                    yield code, Case(extents, given, library)


def adamw() -> Iterator[tuple[str, Case]]:
    """The parameters of a transformer's blocks; the library's launch writes no copies."""
    for code, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for d, blocks in ((384, 6), (768, 12), (2048, 4)):
            sizes = [
                n for _ in range(blocks) for n in (3 * d * d, d * d, 4 * d * d, 4 * d * d, d, d)
            ]
            states = []
            for n in sizes:
                w, m = (torch.randn(n, device="cuda") for _ in range(2))
                g = torch.randn(n, device="cuda").to(dtype)
                states.append((w, g, m, torch.rand(n, device="cuda"),
                               torch.empty(n, device="cuda", dtype=torch.bfloat16)))  # fmt: skip
            rows = [[*(t.data_ptr() for t in s), s[0].numel()] for s in states]
            chunks = [[i, at] for i, n in enumerate(sizes) for at in range(0, n, 8192)]
            tables = [torch.tensor(x, device="cuda") for x in (rows, chunks)]
            numbers = torch.tensor([1e-3, 2, 1.0, 0], device="cuda")

            def given(_, t=(tables, numbers, states)) -> dict[str, Any]:
                (tensors, chunks), numbers, _ = t
                return {"tensors": tensors, "chunks": chunks, "numbers": numbers, "keep1": 0.1,
                        "keep2": 0.001, "log_beta1": math.log(0.9), "log_beta2": math.log(0.999),
                        "weight_decay": 0.1, "eps": 1e-8}  # fmt: skip

            parameters = [w.detach().requires_grad_() for w, *_ in states]
            for p, (_, g, *_) in zip(parameters, states):
                p.grad = g.float()
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
            extents = {"count": len(sizes), "blocks": len(chunks)}
            yield code, Case(extents, given, optimizer.step)


def loss_in_place() -> Iterator[tuple[str, Case]]:
    """The loss and its gradient, which the library makes by two ops."""
    for code, dtype in DTYPES.items():
        for n, rows in VOCABULARIES:
            for m in rows:
                x = torch.randn(m, n, device="cuda").to(dtype)
                targets = torch.randint(0, n, (m,), device="cuda")
                losses, lse = (torch.empty(m, device="cuda") for _ in range(2))
                record = torch.zeros(3, dtype=torch.int64, device="cuda")
                one, dx = torch.ones(1, device="cuda"), torch.empty_like(x)

                def given(_, t=(x, targets, losses, lse, record, one, dx)) -> dict[str, Any]:
                    x, targets, losses, lse, record, one, dx = t
                    return {"logits": x, "targets": targets, "losses": losses, "lse": lse,
                            "record": record, "grad": one, "dx": dx, "ignore_index": -100,
                            "smoothing": 0.0}  # fmt: skip

                leaf = x.detach().requires_grad_()

                def library(t=(leaf, targets)) -> object:
                    leaf, targets = t
                    return torch.autograd.grad(F.cross_entropy(leaf, targets), leaf)

                yield code, Case({"m": m, "n": n}, given, library)
