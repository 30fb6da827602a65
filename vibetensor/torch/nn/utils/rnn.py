"""Sequences of different lengths in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import vibetensor.torch as torch
from vibetensor._C import Tensor


def pad_sequence(
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Tensor:
    """Tensors (L_i, *) as one (max L, N, *), or (N, max L, *) with ``batch_first``.

    The result has the first tensor's dtype. Raises RuntimeError for no sequences and ValueError for another side than left or right.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side should be either left or right, got {padding_side}")
    sequences = list(sequences)
    if not sequences:
        raise RuntimeError("received an empty list of sequences")
    longest = max(s.shape[0] for s in sequences)
    padded = []
    for sequence in sequences:
        sequence = sequence.to(sequences[0].dtype)
        missing = longest - sequence.shape[0]
        tail = (missing, *sequence.shape[1:])
        if missing:
            filler = torch.full(tail, padding_value, dtype=sequence.dtype, device=sequence.device)
            pair = [sequence, filler] if padding_side == "right" else [filler, sequence]
            sequence = torch.cat(pair, 0)
        padded.append(sequence)
    return torch.stack(padded, 0 if batch_first else 1)


def unpad_sequence(
    padded_sequences: Tensor, lengths: Tensor, batch_first: bool = False
) -> list[Tensor]:
    """The inverse of pad_sequence (right-padded), given the lengths."""
    if not batch_first:
        padded_sequences = padded_sequences.transpose(0, 1)
    return [s[: int(n)] for s, n in zip(padded_sequences, lengths)]
