"""Initialisers: the distributions that torch documents, errors, and reproducibility."""

import math

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.torch.nn import init

SHAPE = (200, 50, 3)
FAN_IN, FAN_OUT = 150, 600


def uniform_bound(array, bound):
    # Five standard errors: of the mean, of the standard deviation.
    error = 5 / math.sqrt(array.size)
    assert abs(array).max() <= bound
    assert abs(array).max() > (1 - 2 * error) * bound
    assert array.std() == pytest.approx(bound / math.sqrt(3), rel=error * math.sqrt(0.2))
    assert abs(array.mean()) < error * bound / math.sqrt(3)


def normal_std(array, std):
    error = 5 / math.sqrt(array.size)
    assert array.std() == pytest.approx(std, rel=error * math.sqrt(0.5))
    assert abs(array.mean()) < error * std
    # Kurtosis tells a normal distribution from a uniform one (3 against 1.8).
    assert ((array / array.std()) ** 4).mean() == pytest.approx(3, abs=error * math.sqrt(24))


def filled(function, *args, shape=SHAPE, **options):
    vt.manual_seed(0)
    tensor = vt.empty(shape)
    assert function(tensor, *args, **options) is tensor
    return tensor.numpy()


def test_plain_distributions():
    uniform_bound(filled(init.uniform_, -0.3, 0.3), 0.3)
    normal_std(filled(init.normal_, 0.0, 0.2), 0.2)
    assert (filled(init.constant_, 2.5) == 2.5).all()
    assert (filled(init.ones_) == 1).all() and (filled(init.zeros_) == 0).all()


def test_fan_based():
    uniform_bound(filled(init.xavier_uniform_, gain=2), 2 * math.sqrt(6 / (FAN_IN + FAN_OUT)))
    normal_std(filled(init.xavier_normal_), math.sqrt(2 / (FAN_IN + FAN_OUT)))
    uniform_bound(filled(init.kaiming_uniform_, a=math.sqrt(5)), 1 / math.sqrt(FAN_IN))
    uniform_bound(
        filled(init.kaiming_uniform_, mode="fan_out", nonlinearity="relu"), math.sqrt(6 / FAN_OUT)
    )
    normal_std(filled(init.kaiming_normal_, nonlinearity="linear"), 1 / math.sqrt(FAN_IN))


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (0.5, 3.0), (-9.0, 9.0), (1.9, 2.0)])
def test_trunc_normal(bounds):
    low, high = bounds
    got = np.sort(filled(init.trunc_normal_, 0.5, 1.5, low, high, shape=(20000,)))
    assert got[0] >= low and got[-1] <= high
    # Kolmogorov-Smirnov against the truncated distribution function.
    cdf = np.array([math.erf((x - 0.5) / 1.5 / math.sqrt(2)) for x in got.astype(float)])
    ends = [math.erf((x - 0.5) / 1.5 / math.sqrt(2)) for x in bounds]
    expected = (cdf - ends[0]) / (ends[1] - ends[0])
    assert abs(expected - np.linspace(0, 1, len(got))).max() < 1.63 / math.sqrt(len(got))


def test_erfinv_inverts_erf():
    y = np.linspace(-5, 5, 2001)
    x = np.array([math.erf(v) for v in y])
    back = init._erfinv(vt.as_tensor(x)).numpy()
    # Near the ends a rounding of x already moves y by eps * exp(y^2).
    np.testing.assert_allclose(back, y, rtol=1e-12, atol=1e-15 * np.exp(y * y).max())
    middle = abs(y) < 2
    np.testing.assert_allclose(back[middle], y[middle], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (8, 2, 2)])
def test_orthogonal(shape):
    matrix = filled(init.orthogonal_, gain=2, shape=shape).reshape(shape[0], -1).astype(float) / 2
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-6)


def test_eye_dirac_sparse():
    assert (filled(init.eye_, shape=(3, 5)) == np.eye(3, 5)).all()
    weight = vt.empty(4, 2, 3)
    init.dirac_(weight, groups=2)
    x = vt.randn(1, 4, 6)
    passed = vt.nn.functional.conv1d(x, weight, padding=1, groups=2)
    np.testing.assert_array_equal(passed.numpy(), x.numpy())
    got = filled(init.sparse_, 0.3, std=1.0, shape=(10, 200))
    assert ((got == 0).sum(0) == 3).all()
    normal_std(got[got != 0], 1.0)


def test_generator_and_recording():
    p = vt.nn.Parameter(vt.empty(5))
    generators = [vt.Generator(p.device).manual_seed(3) for _ in range(2)]
    a = init.normal_(p, generator=generators[0]).detach().clone()
    b = init.normal_(p, generator=generators[1]).detach()
    assert bool((a == b).all()) and p.is_leaf and p.requires_grad


def test_gains():
    assert init.calculate_gain("linear") == 1
    assert init.calculate_gain("tanh") == 5 / 3
    assert init.calculate_gain("relu") == math.sqrt(2)
    assert init.calculate_gain("leaky_relu", 0.2) == math.sqrt(2 / 1.04)
    assert init.calculate_gain("selu") == 0.75


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: init.calculate_gain("gelu"),
        lambda: init.calculate_gain("leaky_relu", True),
        lambda: init.xavier_uniform_(vt.empty(3)),
        lambda: init.kaiming_normal_(vt.empty(3, 2), mode="fan"),
        lambda: init.orthogonal_(vt.empty(3)),
        lambda: init.eye_(vt.empty(3)),
        lambda: init.dirac_(vt.empty(3, 2)),
        lambda: init.sparse_(vt.empty(3), 0.1),
    ],
)
def test_errors(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_layers_start_as_torch_documents():
    vt.manual_seed(0)
    linear = vt.nn.Linear(400, 300)
    uniform_bound(linear.weight.detach().numpy(), 1 / 20)
    uniform_bound(linear.bias.detach().numpy(), 1 / 20)
    conv = vt.nn.Conv2d(16, 64, 5, groups=2)
    uniform_bound(conv.weight.detach().numpy(), 1 / math.sqrt(200))
    table = vt.nn.Embedding(500, 60, padding_idx=3).weight.detach().numpy()
    assert (table[3] == 0).all()
    normal_std(np.delete(table, 3, 0), 1.0)
    attention = vt.nn.MultiheadAttention(64, 4)
    uniform_bound(attention.in_proj_weight.detach().numpy(), math.sqrt(6 / (4 * 64)))
    assert bool((attention.in_proj_bias == 0).all()) and bool((attention.out_proj.bias == 0).all())
    norm = vt.nn.LayerNorm(3)
    assert bool((norm.weight == 1).all()) and bool((norm.bias == 0).all())
