"""Vision transformers on CIFAR's images: a convolution cuts them into patches, learned tokens join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ViTConfig:
    """extra: learned tokens before those of the patches; the first is the class token."""

    layers: int
    width: int
    heads: int
    batch: int
    patch: int = 4
    side: int = 32
    extra: int = 1
    classes: int = 10
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"L{self.layers} d{self.width} T{self.tokens} B{self.batch}"

    @property
    def tokens(self) -> int:
        """The length of the sequence of one image."""
        return (self.side // self.patch) ** 2 + self.extra

    @property
    def samples(self) -> int:
        """Tokens a step."""
        return self.batch * self.tokens


def make(t: Any, config: ViTConfig) -> Any:
    """The model in library `t`: called with images (batch, 3, side, side) and classes (batch), it
    returns the loss."""
    nn, F = t.nn, t.nn.functional
    width, heads = config.width, config.heads

    def drop() -> Any:
        return nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.drop1, self.drop2 = drop(), drop()

        def attend(self, x: Any) -> Any:
            b, s, d = x.shape
            qkv = self.qkv(x).reshape(b, s, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            rate = config.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
            return self.out(y.transpose(1, 2).reshape(b, s, d))

        def forward(self, x: Any) -> Any:
            x = x + self.drop1(self.attend(self.ln1(x)))
            return x + self.drop2(self.down(F.gelu(self.up(self.ln2(x)))))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, config.patch, stride=config.patch)
            self.extra = nn.Parameter(t.zeros(1, config.extra, width))
            self.places = nn.Parameter(t.zeros(1, config.tokens, width))
            self.drop = drop()
            self.blocks = nn.Sequential(*[Block() for _ in range(config.layers)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.classes)

        def forward(self, x: Any, y: Any) -> Any:
            h = self.patches(x).flatten(2).transpose(1, 2)
            h = t.cat([self.extra.expand(h.shape[0], -1, -1), h], dim=1) + self.places
            h = self.blocks(self.drop(h))
            return F.cross_entropy(self.head(self.norm(h[:, 0])), y)

    return ViT()


def batch(config: ViTConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random images and classes."""
    shape = (config.batch, 3, config.side, config.side)
    return rng.standard_normal(shape, dtype=np.float32), rng.integers(
        0, config.classes, config.batch
    )
