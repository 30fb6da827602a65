"""Llama: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LlamaConfig:
    """groups: heads of keys and values; each serves heads / groups heads of queries."""

    layers: int
    width: int
    heads: int
    groups: int
    hidden: int
    context: int
    batch: int
    vocab: int
    dropout: float = 0.0
    base: float = 10000.0

    def __str__(self) -> str:
        return f"L{self.layers} d{self.width} T{self.context} B{self.batch}"

    @property
    def samples(self) -> int:
        """Tokens a step."""
        return self.batch * self.context


def make(t: Any, config: LlamaConfig) -> Any:
    """The model in library `t`: called with tokens and targets, both (batch, context), it returns
    the loss."""
    nn, F = t.nn, t.nn.functional
    width, heads, groups = config.width, config.heads, config.groups
    size = width // heads

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        """Turns each pair (i, i + size / 2) of a head by its position's angle."""
        a, b = x.chunk(2, dim=-1)
        return x * cos + t.cat([-b, a], dim=-1) * sin

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(t.ones(width))

        def forward(self, x: Any) -> Any:
            return F.rms_norm(x, (width,), self.weight, 1e-5)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = Norm(), Norm()
            self.q = nn.Linear(width, heads * size, bias=False)
            self.k = nn.Linear(width, groups * size, bias=False)
            self.v = nn.Linear(width, groups * size, bias=False)
            self.out = nn.Linear(heads * size, width, bias=False)
            self.gate = nn.Linear(width, config.hidden, bias=False)
            self.up = nn.Linear(width, config.hidden, bias=False)
            self.down = nn.Linear(config.hidden, width, bias=False)
            self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

        def attend(self, x: Any, cos: Any, sin: Any) -> Any:
            b, s, _ = x.shape
            q = self.q(x).view(b, s, heads, size).transpose(1, 2)
            k = self.k(x).view(b, s, groups, size).transpose(1, 2)
            v = self.v(x).view(b, s, groups, size).transpose(1, 2)
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(y.transpose(1, 2).reshape(b, s, heads * size))

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            x = x + self.drop(self.attend(self.norm1(x), cos, sin))
            h = self.norm2(x)
            return x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(config.vocab, width)
            self.blocks = nn.ModuleList([Block() for _ in range(config.layers)])
            self.norm, self.head = Norm(), nn.Linear(width, config.vocab, bias=False)
            rates = config.base ** -(t.arange(0, size, 2).float() / size)
            angles = t.outer(t.arange(config.context).float(), rates)
            angles = t.cat([angles, angles], dim=-1)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

        def forward(self, x: Any, y: Any) -> Any:
            h = self.tokens(x)
            cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
            for block in self.blocks:
                h = block(h, cos, sin)
            logits = self.head(self.norm(h))
            return F.cross_entropy(logits.view(-1, config.vocab), y.reshape(-1))

    return Llama()


def batch(config: LlamaConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random text, and the same text one token on."""
    text = rng.integers(0, config.vocab, (config.batch, config.context + 1))
    return text[:, :-1].copy(), text[:, 1:].copy()
