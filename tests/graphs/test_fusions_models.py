"""What the fusing passes find in models written from plain modules, and that training steps stay bit
for bit what they are."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from vibetensor.graphs import capture
from vibetensor.graphs.passes import attention_sums, epilogues, joined_casts

nn = vt.nn
WIDTH, HEADS, CONTEXT, VOCABULARY, LAYERS = 32, 4, 12, 29, 2


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Any) -> Any:
        b, t, d = x.shape
        q, k, v = self.qkv(self.first(x)).split(d, dim=2)
        q, k, v = (z.view(b, t, HEADS, d // HEADS).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, t, d)))
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        b, t, d = x.shape
        z = self.first(x)
        q, k, v = (
            f(z).view(b, t, -1, d // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        z = self.second(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


def _model(block: Any, norm: Any) -> Any:
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        *(block() for _ in range(LAYERS)),
        norm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY, bias=False),
    )


MODELS = {
    "gpt": lambda: _model(GPTBlock, nn.LayerNorm),
    "llama": lambda: _model(LlamaBlock, nn.RMSNorm),
}


def _train(model: Any, autocast: bool, micro: int = 1) -> Any:
    optimizer = vt.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        for i in range(micro):
            with vt.autocast(kind(), dtype=vt.bfloat16, enabled=autocast):
                logits = model((x + i) % VOCABULARY)
                loss = F.cross_entropy(logits.view(-1, VOCABULARY), y.reshape(-1))
            (loss / micro).backward()
        norm = vt.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss, norm

    return step


def _both(name: str, autocast: bool, micro: int = 1, steps: int = 6) -> tuple[Any, float]:
    """Trains the model eagerly and captured; the capture, and how far the weights are apart,
    relative to the largest."""
    vt.manual_seed(1)
    data = [[vt.randint(0, VOCABULARY, (3, CONTEXT)) for _ in "xy"] for _ in range(steps)]
    weights = []
    captured = None
    for with_capture in (False, True):
        vt.manual_seed(2)
        model = MODELS[name]()
        step = _train(model, autocast, micro)
        captured = capture(step) if with_capture else step
        for x, y in data:
            captured(x, y)
        weights.append([p.detach().double().numpy() for p in model.parameters()])
    apart = max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(*weights))
    return captured, float(apart)


def _names(captured: Any) -> Counter[str]:
    return Counter(op.name for op in captured.tape().ops if not op.is_view)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_training_is_bit_for_bit(name: str, autocast: bool) -> None:
    captured, apart = _both(name, autocast)
    assert apart == 0
    names = _names(captured)
    norm = "layer_norm" if name == "gpt" else "rms_norm"
    # Every norm but the first follows a residual add; under autocast that one has a cast.
    assert names[f"_residual_{norm}"] == 2 * LAYERS + autocast
    assert names[f"_residual_{norm}_backward"] == 2 * LAYERS + autocast
    assert names["_cross_entropy_index_gradient"] == 1
    assert names["_clip_coefficient"] == names["_scaled_adam_"] == 1
    for gone in ("_cross_entropy_index_backward", "_foreach_mul_", "_foreach_add_"):
        assert gone not in names
    assert captured.tape().bound == 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("micro", [1, 2])
def test_passes_of_cuda(
    name: str, autocast: bool, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", (kind(),))
    monkeypatch.setattr(joined_casts, "DEVICES", (kind(),))
    monkeypatch.setattr(attention_sums, "WIDE_ON", (kind(),))
    captured, apart = _both(name, autocast, micro)
    # Adam divides by the gradient's size, so that a rounding may be a whole step of a weight.
    assert apart <= (1e-2 if autocast else 1e-4 if kind() == "cpu" else 2e-3)
    names = _names(captured)
    if name == "gpt":
        assert names["_linear_activation"] == names["_mm_activation_backward"] == LAYERS * micro
        if micro == 1 or autocast:
            # Those of a projection into the residual come from the norm that makes its gradient, if
            # no dropout is between.
            made = [str(d) for d in captured.tape().decisions]
            in_norms = sum("bias_gradients" in d and "as one op" in d for d in made)
            in_attention = sum("attention_sums" in d and "as one op" in d for d in made)
            assert in_norms >= 1
            assert in_attention == names["_attention_backward_sums"] == LAYERS * micro
            # Products of one geometry are a batch, beside which their sums are ops again: one, or one
            # each where they do not fill multiples of 256 bytes.
            batches = [re.match(r"weight_gradients: (\d+) products of .* as one", d) for d in made]
            joined = sum(int(found[1]) for found in batches if found)
            apart = names["_mm_row_sums"] + names["sum.dim"] + names["_row_parts"]
            assert apart + joined + in_norms + in_attention >= 4 * LAYERS
    if micro == 2 and not autocast:
        assert names["addmm"] > 0
    if autocast:
        # Of weights, and of gradients that are accumulated: the update reads others as they are.
        assert names["_convert_all_"] >= micro
