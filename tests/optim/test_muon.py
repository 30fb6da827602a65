"""Muon against torch and against the singular vectors it approximates."""

import inspect

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE
from vibetensor.torch.optim import muon
from vibetensor.torch.optim.muon import zeropower

SHAPES = [(5, 3), (3, 5), (4, 4), (5, 3), (16, 48), (1, 7), (5, 3), (64, 32)]
COEFFICIENTS = (3.4445, -4.775, 2.0315)
OPTIONS = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "original", "momentum": 0.5},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]


def arrays(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def make(api, dtype="float32"):
    return [api.nn.Parameter(api.tensor(a).to(getattr(api, dtype))) for a in arrays(0)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_follows_torch(options, dtype, torch):
    if dtype == "bfloat16" and options.get("nesterov") is False:
        pytest.skip("torch normalises the momentum buffer itself there")
    ours, theirs = make(vt, dtype), make(torch, dtype)
    a = vt.optim.Muon(ours, lr=0.05, **options)
    b = torch.optim.Muon(theirs, lr=0.05, **options)
    for step in range(4):
        for i, (p, q, g) in enumerate(zip(ours, theirs, arrays(step + 1), strict=True)):
            skip = step == 1 and i == 3
            p.grad = None if skip else vt.tensor(g).to(p.dtype)
            q.grad = None if skip else torch.tensor(g).to(q.dtype)
        a.step()
        b.step()
    # A direction is bfloat16 of many roundings: an element is right to a few hundredths. Nearly all
    # are equal, which a wrong rate or order would not leave.
    scale = 0.2 * 8 if options.get("adjust_lr_fn") == "match_rms_adamw" else 1.5
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            p.detach().double().numpy(),
            q.detach().double().numpy(),
            rtol=1e-2 if dtype == "bfloat16" else 1e-6,
            atol=4 * 0.05 * scale * 0.04,
        )
    mine, other = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for i, state in other["state"].items():
        assert mine["state"][i].keys() == state.keys()
        buffer = mine["state"][i]["momentum_buffer"]
        assert str(buffer.dtype) == str(state["momentum_buffer"].dtype)
        np.testing.assert_allclose(
            buffer.double().numpy(),
            state["momentum_buffer"].double().numpy(),
            rtol=1e-2 if dtype == "bfloat16" else 1e-6,
            atol=1e-2 if dtype == "bfloat16" else 1e-7,
        )


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (16, 48), (1, 7), (64, 64), (100, 30)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_zeropower_keeps_singular_vectors(shape, scale):
    """The polynomial acts on singular values alone; five rounds bring them near 1."""
    g = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * scale
    u, s, v = np.linalg.svd(g.astype(np.float64) / np.linalg.norm(g), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.3 and s.max() < 1.3
    (x,) = zeropower([vt.tensor(g)], COEFFICIENTS, 5, 1e-7)
    assert x.dtype == vt.bfloat16
    np.testing.assert_allclose(x.double().numpy(), (u * s) @ v, rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(5, 3), (16, 48), (64, 64)])
def test_a_batch_is_its_matrices(shape, monkeypatch):
    rng = np.random.default_rng(2)
    matrices = [vt.tensor(rng.standard_normal(shape).astype(np.float32)) for _ in range(5)]
    together = zeropower(matrices, COEFFICIENTS, 5, 1e-7)
    for matrix, x in zip(matrices, together, strict=True):
        (alone,) = zeropower([matrix], COEFFICIENTS, 5, 1e-7)
        np.testing.assert_allclose(x.float().numpy(), alone.float().numpy(), rtol=0, atol=0.02)
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", 2 * matrices[0].numel())
    assert muon._batches([*matrices, vt.ones(2, 2)]) == [[0, 1], [2, 3], [4], [5]]


def test_a_zero_gradient_and_an_empty_weight_stay_finite():
    weights = [vt.nn.Parameter(vt.ones(3, 2)), vt.nn.Parameter(vt.ones(0, 4))]
    weights.append(vt.nn.Parameter(vt.ones(4, 0)))
    optimizer = vt.optim.Muon(weights, lr=0.5, weight_decay=0.5)
    for p in weights:
        p.grad = vt.zeros_like(p)
    optimizer.step()
    assert weights[0].tolist() == [[0.75, 0.75]] * 3


@pytest.mark.parametrize("device", ["cpu", DEVICE])
@pytest.mark.parametrize("dtype", [vt.float32, vt.float64])
def test_a_rate_in_a_tensor_is_its_number(dtype, device):
    results = []
    for lr in (0.25, vt.tensor(0.25, dtype=dtype, device=device)):
        p = make(vt)
        optimizer = vt.optim.Muon(p, lr=lr)
        for q, g in zip(p, arrays(3), strict=True):
            q.grad = vt.tensor(g)
        optimizer.step()
        results.append([q.tolist() for q in p])
    assert results[0] == results[1]


def test_state_dicts_go_from_torch_to_us(torch):
    theirs = make(torch)
    b = torch.optim.Muon(theirs, lr=0.05)
    for q, g in zip(theirs, arrays(1), strict=True):
        q.grad = torch.tensor(g)
    b.step()
    ours = [vt.nn.Parameter(vt.tensor(q.detach().numpy())) for q in theirs]
    a = vt.optim.Muon(ours, lr=1.0)
    saved = b.state_dict()
    state = {
        i: {"momentum_buffer": vt.tensor(s["momentum_buffer"].numpy())}
        for i, s in saved["state"].items()
    }
    a.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for p, q, g in zip(ours, theirs, arrays(2), strict=True):
        p.grad, q.grad = vt.tensor(g), torch.tensor(g)
    a.step()
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), rtol=0, atol=5e-3)


def test_signature_and_errors_are_torchs(torch):
    mine = inspect.signature(vt.optim.Muon).parameters
    other = inspect.signature(torch.optim.Muon).parameters
    assert [(n, p.default) for n, p in mine.items()] == [(n, p.default) for n, p in other.items()]
    bad = [
        {"lr": -1.0},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"adjust_lr_fn": "adam"},
    ]
    for options in bad:
        messages = []
        for api in (vt, torch):
            with pytest.raises(ValueError) as error:
                api.optim.Muon([api.nn.Parameter(api.ones(2, 2))], **options)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    for api in (vt, torch):
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            api.optim.Muon([api.nn.Parameter(api.ones(3))])
        with pytest.raises(ValueError, match="1-element"):
            api.optim.Muon([api.nn.Parameter(api.ones(3, 3))], lr=api.ones(2))
        for options, message in (
            ({"ns_steps": 100}, "less than 100"),
            ({"ns_coefficients": (1.0, 2.0)}, "exactly 3"),
        ):
            p = api.nn.Parameter(api.ones(2, 2))
            p.grad = api.ones(2, 2)
            with pytest.raises(ValueError, match=message):
                api.optim.Muon([p], **options).step()


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
def test_the_momentum_buffer_is_no_scratch_space(dtype):
    p = vt.nn.Parameter(vt.ones(2, 2, dtype=dtype))
    p.grad = vt.full((2, 2), 4.0, dtype=dtype)
    optimizer = vt.optim.Muon([p], momentum=0.5, nesterov=False)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].tolist() == [[2.0, 2.0]] * 2
    assert p.grad.tolist() == [[4.0, 4.0]] * 2


def test_small_decay_of_a_16_bit_weight_is_not_lost():
    p = vt.nn.Parameter(vt.full((64, 64), 1.0, dtype=vt.bfloat16))
    p.grad = vt.zeros_like(p)
    vt.optim.Muon([p], lr=0.03, weight_decay=0.1).step()
    assert (p == 0.99609375).all()  # 1 - 0.003, rounded once


def test_an_overflow_skips_the_step():
    p = vt.nn.Parameter(vt.ones(2, 3))
    optimizer = vt.optim.Muon([p], lr=0.1)
    scaler = vt.amp.GradScaler(DEVICE, init_scale=4.0)
    seen = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(p.tolist())
    assert seen[0] == seen[1] != seen[2]
    assert np.isfinite(seen[2]).all()
