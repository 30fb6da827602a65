"""GPT: pre-norm blocks of attention and MLP. miniGPT, GPT-2, sequence reversal, Shakespeare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GPTConfig:
    """tied: the head's weight is the token embedding's. causal: no token sees those after it."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocab: int
    bias: bool = True
    tied: bool = False
    causal: bool = True
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"L{self.layers} d{self.width} T{self.context} B{self.batch}"

    @property
    def samples(self) -> int:
        """Tokens a step."""
        return self.batch * self.context


def make(t: Any, config: GPTConfig) -> Any:
    """The model in library `t`: called with tokens and targets, both (batch, context), it returns
    the loss."""
    nn, F = t.nn, t.nn.functional
    width, heads = config.width, config.heads

    def drop() -> Any:
        return nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1 = nn.LayerNorm(width, bias=config.bias)
            self.ln2 = nn.LayerNorm(width, bias=config.bias)
            self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
            self.out = nn.Linear(width, width, bias=config.bias)
            self.up = nn.Linear(width, 4 * width, bias=config.bias)
            self.down = nn.Linear(4 * width, width, bias=config.bias)
            self.drop1, self.drop2 = drop(), drop()

        def attend(self, x: Any) -> Any:
            b, s, d = x.shape
            q, k, v = self.qkv(x).split(width, dim=2)
            q, k, v = (z.view(b, s, heads, d // heads).transpose(1, 2) for z in (q, k, v))
            rate = config.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=config.causal)
            return self.out(y.transpose(1, 2).reshape(b, s, d))

        def forward(self, x: Any) -> Any:
            x = x + self.drop1(self.attend(self.ln1(x)))
            return x + self.drop2(self.down(F.gelu(self.up(self.ln2(x)))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(config.vocab, width)
            self.places = nn.Embedding(config.context, width)
            self.drop = drop()
            self.blocks = nn.ModuleList([Block() for _ in range(config.layers)])
            self.norm = nn.LayerNorm(width, bias=config.bias)
            self.head = nn.Linear(width, config.vocab, bias=False)
            if config.tied:
                self.head.weight = self.tokens.weight

        def forward(self, x: Any, y: Any) -> Any:
            places = t.arange(x.shape[1], device=x.device)
            h = self.drop(self.tokens(x) + self.places(places))
            for block in self.blocks:
                h = block(h)
            logits = self.head(self.norm(h))
            return F.cross_entropy(logits.view(-1, config.vocab), y.reshape(-1))

    return GPT()


def next_token_batch(config: GPTConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random text, and the same text one token on."""
    text = rng.integers(0, config.vocab, (config.batch, config.context + 1))
    return text[:, :-1].copy(), text[:, 1:].copy()


def reversed_batch(config: GPTConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random sequences, and the same ones backwards."""
    x = rng.integers(0, config.vocab, (config.batch, config.context))
    return x, x[:, ::-1].copy()
