"""What docs/differences.md says is not here is not here."""

from __future__ import annotations

import re
from pathlib import Path

import vibetensor.torch as torch

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
NAMED_BUT_HERE = {"linalg_vector_norm", "torch.nn", "torch.cuda", "is_grads_batched"}


def test_not_here() -> None:
    (text,) = re.findall(r"\*\*Not here\.\*\*(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    names = set(re.findall(r"`([\w.]+)`", text)) - NAMED_BUT_HERE
    assert len(names) > 30 and {"linalg", "LSTM", "interpolate", "RMSprop"} <= names
    places = (torch, torch.nn, torch.nn.functional, torch.optim, torch.Tensor)
    assert [name for name in sorted(names) if any(hasattr(p, name) for p in places)] == []
