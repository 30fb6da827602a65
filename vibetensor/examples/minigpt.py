"""A small GPT: pre-norm blocks, tied weights, and a sampler.

Written as for torch; only the import differs. `vibetensor train minigpt` trains it.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor.torch import nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 256
    block_size: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, causal: bool = True):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not a multiple of {config.heads} heads")
        self.heads = config.heads
        self.causal = causal
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x):
        batch, time, width = x.shape
        split = (batch, time, self.heads, width // self.heads)
        q, k, v = (part.view(split).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        y = y.transpose(1, 2).reshape(batch, time, width)
        return F.dropout(self.proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.proj = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.proj(F.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, causal: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config, causal)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(model: nn.Module, layers: int) -> None:
    """Normal weights of deviation 0.02; what writes into the residual stream is scaled down by the
    number of writers, so that the stream's variance does not grow with depth."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = 1 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 1.0
        nn.init.normal_(parameter, mean=0.0, std=0.02 * scale)


def configure_optimizers(model: nn.Module, lr: float, weight_decay: float, betas, device: str):
    """AdamW that decays matrices and leaves biases and norms alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = "fused" in inspect.signature(torch.optim.AdamW).parameters
    return torch.optim.AdamW(groups, lr=lr, betas=betas, **({"fused": True} if fused else {}))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.block_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        init_weights(self, config.layers)

    def forward(self, tokens, targets=None):
        """tokens (B, T) int64 → logits (B, T, vocab) and, with targets (B, T), the mean
        cross-entropy over the targets that are not -1."""
        time = tokens.size(1)
        if time > self.config.block_size:
            raise ValueError(f"{time} tokens do not fit a block of {self.config.block_size}")
        positions = torch.arange(time, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, tokens, count: int, temperature: float = 1.0, top_k=None, generator=None):
        """Appends `count` sampled tokens to tokens (B, T). Temperature 0 takes the likeliest."""
        for _ in range(count):
            logits, _ = self(tokens[:, -self.config.block_size :])
            logits = logits[:, -1, :].float()
            if temperature == 0:
                following = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    least, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                    logits[logits < least[:, [-1]]] = -math.inf
                probabilities = F.softmax(logits, dim=-1)
                following = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, following), dim=1)
        return tokens
