"""Forms of activations that no sample of the table calls: in place, and their backward ops."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F

ALPHA, SCALE = 1.6732632423543772, 1.0507009873554805
POINTS = [-30.0, -2.0, -0.5, 0.0, 0.25, 3.0, float("inf"), float("-inf"), float("nan")]
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def selu(x: np.ndarray) -> np.ndarray:
    return SCALE * np.where(x > 0, x, ALPHA * np.expm1(np.minimum(x, 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
def test_selu_in_place(dtype: torch.dtype, layout: str) -> None:
    base = torch.zeros(9, 4, dtype=dtype)
    x = {"contiguous": base, "strided": base[:, ::2], "transposed": base.t()}[layout]
    x.copy_(
        torch.tensor(POINTS, dtype=dtype).view(9, 1) if x.size(0) == 9 else torch.tensor(POINTS)
    )
    expected = selu(x.double().numpy())
    for call in (torch.selu_, torch.Tensor.selu_, lambda t: F.selu(t, inplace=True)):
        y = x.clone()
        assert call(y) is y and y.dtype == dtype
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=DTYPES[dtype])
    address = x.data_ptr()
    assert torch.selu_(x).data_ptr() == address
    np.testing.assert_allclose(x.double().numpy(), expected, rtol=DTYPES[dtype])


def test_selu_in_place_has_a_gradient_and_refuses_leaves() -> None:
    x = torch.tensor(POINTS[:6], dtype=torch.float64, requires_grad=True)
    y = x * 1
    torch.selu_(y)
    y.sum().backward()
    points = np.array(POINTS[:6])
    expected = SCALE * np.where(points > 0, 1, ALPHA * np.exp(np.minimum(points, 0)))
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-14)
    with pytest.raises(RuntimeError, match="leaf"):
        torch.selu_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.01, 0.0, 1.5, -0.5])
def test_leaky_relu_backward(dtype: torch.dtype, slope: float) -> None:
    x = torch.tensor(POINTS, dtype=dtype)
    grad = torch.linspace(-2, 2, len(POINTS)).to(dtype)
    result = torch._C._ops.leaky_relu_backward(grad, x, slope)
    assert result.dtype == dtype
    g = grad.double().numpy()
    expected = np.where(x.double().numpy() > 0, g, g * slope)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=DTYPES[dtype])


def test_leaky_relu_backward_can_be_differentiated() -> None:
    x = torch.tensor([-2.0, -0.5, 0.5, 3.0], dtype=torch.float64)
    grad = torch.ones(4, dtype=torch.float64, requires_grad=True)
    torch._C._ops.leaky_relu_backward(grad, x, 0.1).square().sum().backward()
    np.testing.assert_allclose(grad.grad.numpy(), [0.02, 0.02, 2, 2], rtol=1e-14)
