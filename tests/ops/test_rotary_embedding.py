"""rotary_embedding against the rotation written out, in float64."""

from __future__ import annotations

import numpy as np
import pytest

import vibetensor.torch as vt

SHAPES = [((2, 3, 5, 8), (5, 4)), ((5, 8), (5, 4)), ((2, 3, 5, 8), (2, 1, 5, 4)),
          ((3, 1, 2), (1, 1)), ((4, 6), (3,)), ((0, 5, 8), (5, 4))]  # fmt: skip
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    half = x.shape[-1] // 2
    first = np.s_[..., 0::2] if interleaved else np.s_[..., :half]
    second = np.s_[..., 1::2] if interleaved else np.s_[..., half:]
    out = np.empty_like(x)
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[second] * cos + x[first] * sin
    return out


def inputs(shape, angles, dtype):
    draw = np.random.default_rng(0)
    angle = draw.uniform(-3, 3, angles)
    made = [draw.standard_normal(shape), np.cos(angle), np.sin(angle)]
    tensors = [vt.tensor(a).to(getattr(vt, dtype)) for a in made]
    return tensors, [t.double().numpy() for t in tensors]  # as rounded to dtype


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "angles"), SHAPES)
def test_values(shape, angles, dtype: str, interleaved: bool) -> None:
    (x, cos, sin), exact = inputs(shape, angles, dtype)
    out = vt.rotary_embedding(x, cos, sin, interleaved)
    assert out.dtype is x.dtype and tuple(out.shape) == shape
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(
        out.double().numpy(), rotated(*exact, interleaved), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides(interleaved: bool) -> None:
    (x, cos, sin), exact = inputs((2, 3, 5, 8), (5, 4), "float32")
    moved = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not moved.is_contiguous()
    out = vt.rotary_embedding(moved, cos.t().contiguous().t(), sin, interleaved)
    np.testing.assert_allclose(out.numpy(), rotated(*exact, interleaved), atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    (x, cos, sin), _ = inputs((2, 3, 6), (3, 3), "float64")
    x.requires_grad_()

    def turn(x: vt.Tensor) -> vt.Tensor:
        return vt.rotary_embedding(x, cos, sin, interleaved)

    assert vt.autograd.gradcheck(turn, (x,)) and vt.autograd.gradgradcheck(turn, (x,))


def test_angles_that_require_grad_are_refused() -> None:
    (x, cos, sin), _ = inputs((2, 5, 8), (5, 4), "float32")
    for number in (1, 2):
        given = [x, cos, sin]
        given[number] = given[number].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="rotary_embedding: cos and sin get no gradient"):
            vt.rotary_embedding(*given)
        with vt.no_grad():
            assert vt.equal(vt.rotary_embedding(*given), vt.rotary_embedding(x, cos, sin))


@pytest.mark.parametrize(
    ("shape", "angles", "dtype", "error"),
    [((2, 7), (2, 3), "float32", RuntimeError), ((2, 8), (3, 4), "float32", RuntimeError),
     ((2, 8), (2, 8), "float32", RuntimeError), ((8,), (4,), "float32", RuntimeError)],
)  # fmt: skip
def test_what_does_not_fit(shape, angles, dtype: str, error) -> None:
    (x, cos, sin), _ = inputs(shape, angles, dtype)
    with pytest.raises(error, match="rotary_embedding: "):
        vt.rotary_embedding(x, cos, sin)


def test_integers_are_refused() -> None:
    (_, cos, sin), _ = inputs((5, 8), (5, 4), "float32")
    with pytest.raises(NotImplementedError, match="rotary_embedding. not implemented"):
        vt.rotary_embedding(vt.ones(5, 8, dtype=vt.int64), cos, sin)
