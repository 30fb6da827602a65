"""Sequence reversal: read random symbols, then write them backwards. A task that only attention
over positions can solve, learned in a minute; the model is the GPT of `minigpt`."""

from __future__ import annotations

import vibetensor.torch as torch
from vibetensor.examples.minigpt import GPT, GPTConfig


def build_model(length: int, symbols: int, layers: int, heads: int, width: int) -> GPT:
    """A GPT over `symbols` plus the separator, with room for both halves."""
    return GPT(GPTConfig(symbols + 1, 2 * length, layers, heads, width))


def make_batch(batch: int, length: int, symbols: int, generator=None):
    """tokens and targets (B, 2·length) on the CPU: s₁ … sₙ, separator, then sₙ … s₂ as input, and sₙ … s₁ as
    what must follow. Targets are -1 (not scored) while the sequence is being read."""
    sequence = torch.randint(symbols, (batch, length), generator=generator, device="cpu")
    separator = torch.full_like(sequence[:, :1], symbols)
    reverse = sequence.flip(1)
    tokens = torch.cat((sequence, separator, reverse[:, :-1]), dim=1)
    targets = torch.cat((torch.full_like(sequence, -1), reverse), dim=1)
    return tokens, targets


def solve(model: GPT, sequence):
    """The model's own answer (B, length) for sequence (B, length), taking the likeliest symbols."""
    length = sequence.shape[1]
    separator = torch.full_like(sequence[:, :1], model.config.vocab_size - 1)
    prompt = torch.cat((sequence, separator), dim=1)
    return model.generate(prompt, length, temperature=0)[:, length + 1 :]
