"""Data loading, activation checkpointing and hook handles."""

from vibetensor.torch.utils import checkpoint, data, hooks

__all__ = ["checkpoint", "data", "hooks"]
