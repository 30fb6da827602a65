"""Linear layers that multiply in 8 bits: values, gradients, conversion, captured steps, learning."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.float8 import Float8Linear, convert_to_float8_training
from vibetensor.graphs import capture
from vibetensor.torch import nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def through_8_bits(x: np.ndarray, dtype) -> np.ndarray:
    """`x` scaled by its largest magnitude, rounded to 8 bits, and scaled back, in float64."""
    scale = np.float32(torch.finfo(dtype).max) / np.float32(np.abs(x).max())
    rounded = torch.from_numpy((x.astype(np.float32) * scale).astype(np.float32)).to(dtype)
    return rounded.double().numpy() / np.float64(scale)


@pytest.mark.parametrize("size", [(16, 32, 48), (5, 7, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(size, bias) -> None:
    rows, inner, outer = size
    torch.manual_seed(2)
    layer = convert_to_float8_training(nn.Linear(inner, outer, bias=bias))
    x = torch.randn(2, rows, inner, requires_grad=True)
    y = layer(x)
    grad = torch.randn(2, rows, outer)
    y.backward(grad)
    flat = x.detach().numpy().reshape(-1, inner)
    a, w = through_8_bits(flat, E4M3), through_8_bits(layer.weight.detach().numpy(), E4M3)
    g = through_8_bits(grad.numpy().reshape(-1, outer), E5M2)
    expected = a @ w.T + (layer.bias.detach().double().numpy() if bias else 0)
    assert y.shape == (2, rows, outer) and y.dtype is torch.float32
    np.testing.assert_allclose(y.detach().numpy().reshape(-1, outer), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(x.grad.numpy().reshape(-1, inner), g @ w, rtol=0, atol=2e-5)
    np.testing.assert_allclose(layer.weight.grad.numpy(), g.T @ a, rtol=0, atol=2e-4)
    if bias:
        sums = grad.double().numpy().reshape(-1, outer).sum(0)
        np.testing.assert_allclose(layer.bias.grad.numpy(), sums, rtol=1e-5, atol=1e-5)


def test_dtypes_and_edges() -> None:
    layer = convert_to_float8_training(nn.Linear(16, 8))
    x = torch.randn(4, 16)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    result = half(x.bfloat16())
    result.float().sum().backward()
    assert result.dtype is torch.bfloat16 and half.weight.grad.dtype is torch.bfloat16
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer(torch.zeros(3, 16)).sub(layer.bias).abs().max() == 0
    assert layer(x[0]).shape == (8,) and layer(x[:0]).shape == (0, 8)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    with pytest.raises(TypeError, match="32 or 16 bits"):
        layer(x.double())
    with pytest.raises(RuntimeError):
        y = layer(x.requires_grad_())
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        g.sum().backward()


def test_conversion() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(shared, nn.ReLU(), shared), nn.Linear(4, 2)
    )
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    names, parameters = [], list(model.parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def chosen(module: nn.Module, name: str) -> bool:
        names.append(name)
        return name != "2"

    assert convert_to_float8_training(model, module_filter_fn=chosen) is model
    assert set(names) == {"0", "1.0", "2"}
    assert [type(m) for m in (model[0], model[1][0], model[1][2], model[2])] == [
        Float8Linear, Float8Linear, Float8Linear, nn.Linear,
    ]  # fmt: skip
    assert model[1][0] is model[1][2]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    x = torch.randn(3, 4)
    plain = nn.functional.linear(x, state["0.weight"], state["0.bias"]) * 2
    np.testing.assert_allclose(
        model[0](x).detach().numpy(), plain.numpy(), atol=0.3
    )  # the hook ran
    model.load_state_dict(state)
    model.eval()
    assert not model[0].training and repr(model[0]).startswith("Float8Linear(in_features=4")
    assert convert_to_float8_training(model) is model and type(model[2]) is Float8Linear


class Training:
    def __init__(self, convert: bool) -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(
            nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
        )
        if convert:
            convert_to_float8_training(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, x, y):
        loss = nn.functional.mse_loss(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def batches(count: int):
    rng = np.random.default_rng(9)
    for _ in range(count):
        x = rng.standard_normal((64, 8)).astype(np.float32)
        y = np.sin(x).sum(1, keepdims=True).astype(np.float32)
        yield torch.from_numpy(x), torch.from_numpy(y)


def test_captured_equals_eager() -> None:
    eager, captured = Training(True), Training(True)
    step = capture(captured.step)
    for x, y in batches(6):
        assert step(x, y).item() == eager.step(x, y).item()
    for a, b in zip(eager.model.parameters(), captured.model.parameters(), strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())


def test_learns_as_floats_do() -> None:
    losses = {}
    for convert in (False, True):
        training = Training(convert)
        losses[convert] = [training.step(x, y).item() for x, y in batches(400)]
    last = {k: float(np.mean(v[-30:])) for k, v in losses.items()}
    assert losses[True][0] > 2 and last[False] < 0.1
    assert last[True] < 1.5 * last[False] + 0.03, last


def test_the_guide_is_true() -> None:
    guide = Path(__file__).parents[2] / "docs" / "float8.md"
    if not guide.exists():
        pytest.skip("the guide is part of a checkout")
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(guide), "exec"), names)
    assert [type(m).__name__ for m in names["model"]] == ["Float8Linear", "GELU", "Linear"]
    exact = names["a"].double() @ names["b"].double().t()
    error = (names["product"].double() - exact).norm() / exact.norm()
    assert 0.005 < error < 0.06
