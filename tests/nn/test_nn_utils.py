"""Clipping, parameters as a vector, padded sequences: against torch."""

import math

import numpy as np
import pytest

import vibetensor.torch as vt

SHAPES = [(3, 4), (5,), (), (2, 1, 2)]


def parameters(torch, scale=1.0, dtype=None):
    rng = np.random.default_rng(0)
    made = []
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = torch.as_tensor(np.array(rng.standard_normal(shape) * scale)).to(p.dtype)
        made.append(p)
    made.append(torch.nn.Parameter(torch.zeros(2)))
    return made


@pytest.mark.torch
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, 0.0, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clip_grad_norm(against_torch, norm_type, max_norm):
    mine, theirs = parameters(vt), parameters(against_torch.torch)
    total = vt.nn.utils.clip_grad_norm_(mine, max_norm, norm_type, foreach=True)
    expected = against_torch.torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    against_torch.close(total, expected)
    for a, b in zip(mine, theirs):
        against_torch.close(a.grad, b.grad)


def test_clip_grad_norm_of_one_and_of_none():
    p = vt.nn.Parameter(vt.zeros(2))
    assert vt.nn.utils.clip_grad_norm_(p, 1.0).item() == 0
    p.grad = vt.tensor([3.0, 4.0])
    assert vt.nn.utils.clip_grad_norm_(p, 1.0).item() == pytest.approx(5)
    np.testing.assert_allclose(p.grad.numpy(), [0.6, 0.8], rtol=1e-6)


def test_order_0_of_one_tensor_is_the_norm_of_its_norm():
    p = vt.nn.Parameter(vt.zeros(3))
    p.grad = vt.tensor([1.0, 2.0, 3.0])
    assert vt.nn.utils.clip_grad_norm_(p, 1.0, norm_type=0).item() == 1
    np.testing.assert_allclose(p.grad.numpy(), [1, 2, 3], rtol=1e-5)
    assert vt.nn.utils.get_total_norm([vt.zeros(3)], 0).item() == 0
    assert vt.nn.utils.get_total_norm([p.grad, vt.zeros(2), p.grad], 0).item() == 2


def test_a_generator_of_parameters_is_read_once():
    made = parameters(vt)
    vt.nn.utils.clip_grad_norm_((p for p in made), 1e-3)
    assert vt.nn.utils.get_total_norm([p.grad for p in made[:-1]]).item() == pytest.approx(
        1e-3, rel=1e-2
    )


def test_error_if_nonfinite():
    made = parameters(vt)
    made[0].grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        vt.nn.utils.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
    assert math.isnan(vt.nn.utils.clip_grad_norm_(made, 1.0).item())


@pytest.mark.torch
def test_clip_grad_value_and_mixed_dtypes(against_torch):
    mine, theirs = parameters(vt), parameters(against_torch.torch)
    vt.nn.utils.clip_grad_value_(mine, 0.5)
    against_torch.torch.nn.utils.clip_grad_value_(theirs, 0.5)
    for a, b in zip(mine, theirs):
        against_torch.close(a.grad, b.grad)
    T = against_torch.torch
    mixed = parameters(vt, dtype=vt.bfloat16)[:2] + parameters(vt)[2:]
    other = parameters(T, dtype=T.bfloat16)[:2] + parameters(T)[2:]
    total = vt.nn.utils.clip_grad_norm_(mixed, 0.5)
    expected = T.nn.utils.clip_grad_norm_(other, 0.5)
    against_torch.close(total, expected, rtol=5e-3)
    for a, b in zip(mixed[:-1], other[:-1]):
        against_torch.close(a.grad.float(), b.grad.float(), rtol=2e-2)


def test_parameters_and_vector():
    made = parameters(vt)
    vector = vt.nn.utils.parameters_to_vector(made)
    assert vector.shape == (sum(p.numel() for p in made),) and vector.requires_grad
    values = vt.arange(vector.numel(), dtype=vt.float32)
    vt.nn.utils.vector_to_parameters(values, made)
    assert bool((vt.nn.utils.parameters_to_vector(made) == values).all())
    assert made[0].is_leaf and made[0].shape == SHAPES[0]
    with pytest.raises(TypeError):
        vt.nn.utils.vector_to_parameters([1.0], made)


@pytest.mark.torch
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_sequence(against_torch, batch_first, side):
    arrays = [against_torch.normal(n, 2) for n in (3, 1, 4)]
    got = vt.nn.utils.rnn.pad_sequence(
        [against_torch.ours(a) for a in arrays], batch_first, -1.0, side
    )
    expected = against_torch.torch.nn.utils.rnn.pad_sequence(
        [against_torch.theirs(a) for a in arrays], batch_first, -1.0, side
    )
    against_torch.close(got, expected)


def test_pad_sequence_takes_the_first_dtype():
    narrow, wide = vt.ones(2, requires_grad=True), vt.ones(3, dtype=vt.float64, requires_grad=True)
    padded = vt.nn.utils.rnn.pad_sequence([narrow, wide], padding_value=0.5)
    assert padded.dtype is vt.float32 and padded.tolist() == [[1, 1], [1, 1], [0.5, 1]]
    (padded * 2).sum().backward()
    assert narrow.grad.tolist() == [2, 2]
    assert wide.grad.dtype is vt.float64 and wide.grad.tolist() == [2, 2, 2]
    whole = vt.nn.utils.rnn.pad_sequence([vt.tensor([1]), vt.tensor([2.5, 3.5])])
    assert whole.dtype is vt.int64 and whole.tolist() == [[1, 2], [0, 3]]


def test_unpad_sequence():
    sequences = [vt.arange(3), vt.arange(1)]
    padded = vt.nn.utils.rnn.pad_sequence(sequences)
    back = vt.nn.utils.rnn.unpad_sequence(padded, vt.tensor([3, 1]))
    assert [s.tolist() for s in back] == [[0, 1, 2], [0]]
    with pytest.raises(RuntimeError):
        vt.nn.utils.rnn.pad_sequence([])
