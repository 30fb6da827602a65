"""AdamW that rounds bfloat16 weights and moments at random: right on average, and repeatable."""

import math

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE

SIZES = [(64, 300), (8191,), (3,), (1,), (), (0,), (2, 8193)]


def weights(sizes=SIZES, dtype=vt.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return [
        vt.nn.Parameter(vt.tensor(rng.standard_normal(s), dtype=vt.float64).to(dtype))
        for s in sizes
    ]


def set_grads(params, seed):
    rng = np.random.default_rng(seed)
    for p in params:
        p.grad = vt.tensor(rng.standard_normal(tuple(p.shape)), dtype=vt.float64).to(p.dtype)


def neighbours(exact):
    """The bfloat16 numbers at or below and at or above float32 numbers, by magnitude."""
    bits = np.asarray(exact, dtype=np.float32).view(np.uint32)
    low = (bits & 0xFFFF0000).view(np.float32)
    high = np.where(bits & 0xFFFF, (bits & 0xFFFF0000) + 0x10000, bits).astype(np.uint32)
    return low, high.view(np.float32)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "lr": 0.1}])
def test_every_element_is_one_of_its_two_neighbours(options):
    params = weights()
    wide = [vt.nn.Parameter(p.detach().float()) for p in params]
    a = vt.optim.AdamW(params, stochastic_rounding=True, **options)
    b = vt.optim.AdamW(wide, **options)
    set_grads(params, 1)
    for p, w in zip(params, wide, strict=True):
        w.grad = p.grad.float()
    vt.manual_seed(0)
    a.step()
    b.step()
    for p, w in zip(params, wide, strict=True):
        kept = [(p, w)] + [(a.state[p][k], b.state[w][k]) for k in a.state[p] if k != "step"]
        for rounded, exact in kept:
            assert rounded.dtype == vt.bfloat16
            got, want = (t.detach().float().numpy() for t in (rounded, exact))
            low, high = neighbours(want)
            # The float32 step may end an ulp of float32 apart, across a bfloat16.
            near = np.isclose(want, got, rtol=1e-6, atol=0)
            assert np.all((got == low) | (got == high) | near)


def test_the_mean_is_that_of_float32():
    """200,000 equal elements: rounded to the nearest all stay, at random they move on average."""
    n = 200_000
    for value, lr in ((1.0, 1e-4), (-3.0, 3e-4), (0.0078, 1e-6)):
        p = vt.nn.Parameter(vt.full((n,), value, dtype=vt.bfloat16))
        start = float(p[0])
        p.grad = vt.full((n,), 0.5, dtype=vt.bfloat16)
        vt.manual_seed(3)
        vt.optim.AdamW([p], lr=lr, weight_decay=0.0, stochastic_rounding=True).step()
        got = p.detach().float().numpy().astype(np.float64)
        exact = start - lr * (1 - 1e-8 / 0.5)
        low, high = sorted(float(v) for v in neighbours(exact))
        chance = (exact - low) / (high - low)
        deviation = (high - low) * math.sqrt(chance * (1 - chance) / n)
        assert set(np.unique(got)) == {low, high}
        assert abs(got.mean() - exact) < 5 * deviation
        nearest = vt.nn.Parameter(vt.full((n,), value, dtype=vt.bfloat16))
        nearest.grad = p.grad
        vt.optim.AdamW([nearest], lr=lr, weight_decay=0.0).step()
        assert (nearest == start).all()


def test_the_second_moment_shrinks():
    """0.999 of a bfloat16 is that number again, rounded to the nearest."""
    ends = []
    for rounding in (False, True):
        p = vt.nn.Parameter(vt.ones(4096, dtype=vt.bfloat16))
        optimizer = vt.optim.AdamW([p], lr=0.0, stochastic_rounding=rounding)
        p.grad = vt.ones_like(p)
        optimizer.step()
        p.grad = vt.zeros_like(p)
        for _ in range(300):
            optimizer.step()
        second = optimizer.state[p]["exp_avg_sq"].float()
        ends.append(float(second.mean()) / (0.001 * 0.999**300))
    assert ends[0] > 1.3
    assert abs(ends[1] - 1) < 0.02


def test_draws_are_independent_and_repeatable():
    def run(seed, steps=3):
        vt.manual_seed(seed)
        params = weights([(4096,), (4096,)], seed=5)
        with vt.no_grad():
            params[1].copy_(params[0])
        optimizer = vt.optim.AdamW(params, lr=1e-3, stochastic_rounding=True)
        for step in range(steps):
            for p in params:
                p.grad = vt.full_like(p, 0.5 + step)
            optimizer.step()
        return [p.detach().float().numpy() for p in params]

    a, b, c = run(1), run(1), run(2)
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert (a[0] != c[0]).any()
    assert (a[0] != a[1]).any()  # tensors draw numbers of their own


def test_results_do_not_depend_on_threads():
    results = []
    threads = vt.get_num_threads()
    try:
        for count in (1, 2):
            vt.set_num_threads(count)
            vt.manual_seed(4)
            params = weights()
            optimizer = vt.optim.AdamW(params, stochastic_rounding=True)
            set_grads(params, 2)
            optimizer.step()
            results.append([p.tolist() for p in params])
    finally:
        vt.set_num_threads(threads)
    assert results[0] == results[1]


def test_inf_and_nan_are_not_rounded():
    p = vt.nn.Parameter(vt.tensor([0.0, 0.0, math.nan, 1.0], dtype=vt.bfloat16))
    p.grad = vt.tensor([-1.0, 1.0, 0.0, math.nan], dtype=vt.bfloat16)
    vt.optim.AdamW([p], lr=3e38, weight_decay=0.0, stochastic_rounding=True).step()
    got = p.tolist()
    assert got[0] == math.inf and got[1] == -math.inf
    assert math.isnan(got[2]) and math.isnan(got[3])


def test_other_dtypes_are_updated_as_without():
    for dtype in (vt.float32, vt.float64, vt.float16):
        results = []
        for rounding in (False, True):
            params = weights([(5, 3)], dtype)
            optimizer = vt.optim.AdamW(params, stochastic_rounding=rounding)
            set_grads(params, 1)
            optimizer.step()
            results.append(params[0].tolist())
        assert results[0] == results[1]


def test_a_group_chooses_and_state_dicts_keep_it():
    params = weights([(300,), (300,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "stochastic_rounding": False}]
    optimizer = vt.optim.AdamW(groups, stochastic_rounding=True)
    assert [g["stochastic_rounding"] for g in optimizer.param_groups] == [True, False]
    fresh = vt.optim.AdamW([{"params": [p]} for p in weights([(300,), (300,)])])
    fresh.load_state_dict(optimizer.state_dict())
    assert [g["stochastic_rounding"] for g in fresh.param_groups] == [True, False]
    plain = vt.optim.AdamW(weights([(3,)]))
    assert "stochastic_rounding" not in plain.state_dict()["param_groups"][0]


def test_what_has_no_fused_step_is_refused():
    for options in (
        {"foreach": False},
        {"fused": False},
        {"differentiable": True},
        {"betas": (vt.tensor(0.9), vt.tensor(0.999))},
    ):
        with pytest.raises(ValueError, match="stochastic_rounding"):
            vt.optim.AdamW(weights([(3,)]), stochastic_rounding=True, **options)


def test_an_overflow_skips_the_step():
    p = vt.nn.Parameter(vt.ones(8, dtype=vt.bfloat16))
    optimizer = vt.optim.AdamW([p], lr=0.25, fused=True, stochastic_rounding=True)
    scaler = vt.amp.GradScaler(DEVICE, init_scale=4.0)
    seen = []
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(p.tolist())
    assert seen[0] == seen[1] != seen[2]
    assert optimizer.state[p]["step"].item() == 2.0


def test_strided_weights():
    p = vt.zeros(6, 4, dtype=vt.bfloat16).t().requires_grad_()
    p.grad = vt.ones(4, 6, dtype=vt.bfloat16)
    vt.optim.AdamW([p], lr=0.5, stochastic_rounding=True).step()
    assert (p == -0.5).all()
