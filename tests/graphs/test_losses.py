"""Captured steps with losses and attention beyond torch's: eager's bits."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from vibetensor.graphs import capture
from vibetensor.torch.nn.attention.varlen import varlen_attn


class Model(vt.nn.Module):
    """A table, a projection for attention within sequences, and a head."""

    def __init__(self, loss: str, dtype: Any = vt.float32) -> None:
        super().__init__()
        vt.manual_seed(1)
        self.table = vt.nn.Embedding(11, 8)
        self.qkv = vt.nn.Linear(8, 24)
        self.loss = loss
        self.to(dtype)

    def forward(self, tokens: Any, target: Any, cu: Any) -> Any:
        x = self.table(tokens)
        if self.loss == "varlen":
            qkv = self.qkv(x).reshape(-1, 3, 2, 4)
            x = varlen_attn(*qkv.unbind(1), cu, cu, 12, 12, window_size=(3, 0)).reshape(-1, 8)
        if self.loss.startswith("chunks"):
            return F.linear_cross_entropy(
                x, self.table.weight, target, z_loss=0.01, label_smoothing=0.1, ignore_index=2,
                options=vt.nn.LinearCrossEntropyOptions(batch_chunk_size=5),
                reduction=self.loss.partition(" ")[2] or "mean",
            ).sum()  # fmt: skip
        return F.cross_entropy(F.linear(x, self.table.weight), target, z_loss=0.02, ignore_index=2)


def run(wrap: Any, loss: str, dtype: Any, optimizer: str) -> tuple[list[Any], Any]:
    model = Model(loss, dtype)
    options = {"stochastic_rounding": True} if optimizer == "AdamW" else {}
    update = getattr(vt.optim, optimizer)(
        [p for p in model.parameters() if optimizer != "Muon" or p.ndim == 2], lr=0.05, **options
    )

    def train_step(tokens: Any, target: Any, cu: Any) -> Any:
        update.zero_grad()
        result = model(tokens, target, cu)
        result.backward()
        update.step()
        return result

    step = wrap(train_step)
    vt.manual_seed(2)
    seen: list[Any] = []
    for i in range(6):
        tokens, target = vt.randint(0, 11, (12,)), vt.randint(0, 11, (12,))
        cu = vt.tensor([0, i, 7, 12], dtype=vt.int32)
        seen.append(step(tokens, target, cu).item())
    seen += [p.detach().double().tolist() for p in model.parameters()]
    return seen, step


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["z", "chunks", "chunks none", "varlen"])
def test_captured_steps(loss: str, dtype: Any, optimizer: str) -> None:
    eager, _ = run(lambda f: f, loss, dtype, optimizer)
    captured, step = run(capture, loss, dtype, optimizer)
    assert captured == eager
    assert len(step.variants) == 1 and step.variants[0].replays >= 2


def test_the_report_says_why_logits_keep_their_memory() -> None:
    _, step = run(capture, "z", vt.float32, "Muon")
    assert "what the loss keeps for it is read elsewhere" in str(step.report())
