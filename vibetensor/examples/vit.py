"""A small vision transformer: patches, a class token, blocks without a causal mask."""

from __future__ import annotations

from dataclasses import dataclass

import vibetensor.torch as torch
from vibetensor.examples.minigpt import Block, GPTConfig, init_weights
from vibetensor.torch import nn


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 32
    channels: int = 3
    classes: int = 10
    patch: int = 4
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        if config.image_size % config.patch:
            raise ValueError(
                f"images of {config.image_size} do not divide into {config.patch}² patches"
            )
        self.config = config
        patches = (config.image_size // config.patch) ** 2
        block = GPTConfig(
            layers=config.layers, heads=config.heads, width=config.width, dropout=config.dropout
        )
        self.patches = nn.Conv2d(
            config.channels, config.width, kernel_size=config.patch, stride=config.patch
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(block, causal=False) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        init_weights(self, config.layers)

    def forward(self, images):
        """images (B, C, H, W) float → logits (B, classes)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.size(0), -1, -1), x), dim=1)
        x = self.dropout(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
