"""Captured steps of layers that multiply in 8 bits, and of bytes seen as 8-bit floats."""

from __future__ import annotations

from typing import Any

import vibetensor.torch as vt
from vibetensor.float8 import convert_to_float8_training
from vibetensor.graphs import capture


def make_training() -> tuple[Any, Any]:
    vt.manual_seed(0)
    layers = vt.nn.Linear(8, 32), vt.nn.GELU(), vt.nn.Linear(32, 4)
    model = convert_to_float8_training(vt.nn.Sequential(*layers))
    optimizer = vt.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x: Any, y: Any) -> Any:
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, step


def test_training_is_the_same_as_eager() -> None:
    (model, eager), (other, step) = make_training(), make_training()
    captured = capture(step)
    for _ in range(5):
        x, y = vt.randn(16, 8), vt.randn(16, 4)
        assert abs(eager(x, y).item() - captured(x, y).item()) < 1e-6
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert vt.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_conversions_and_bytes() -> None:
    def program(x: Any) -> Any:
        narrow = (x * 3).to(vt.float8_e4m3fn)
        bits = narrow.view(vt.uint8) ^ 0x80  # the other sign
        return bits.view(vt.float8_e4m3fn).float() + narrow.to(
            vt.float8_e5m2
        ).float(), narrow == 3.0

    captured = capture(program)
    for _ in range(4):
        x = vt.randn(33, 7)
        for mine, theirs in zip(captured(x), program(x), strict=True):
            assert vt.equal(mine, theirs)
