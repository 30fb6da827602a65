"""Loss scaling against torch: the same scales, updates and skipped steps."""

import math
import pickle

import pytest

import vibetensor.torch as vt
from tests.device import DEVICE


def train(api, losses, *, fused=None, clip=False, foreach=None):
    """Steps with the given factors as losses; returns the parameters, scales and trackers seen."""
    p = api.nn.Parameter(api.tensor([1.0, -2.0]))
    optimizer = api.optim.SGD([p], lr=0.125, fused=fused, foreach=foreach)
    scaler = api.amp.GradScaler(DEVICE if api is vt else "cpu", init_scale=8.0, growth_interval=2)
    seen = []
    for factor in losses:
        optimizer.zero_grad()
        loss = (p * factor).sum()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            p.grad.clamp_(-0.5, 0.5)
        scaler.step(optimizer)
        scaler.update()
        seen.append((p.detach().tolist(), scaler.get_scale(), scaler.state_dict()))
    return seen


LOSSES = [1.0, 0.5, math.inf, 0.25, 1.0, math.nan, math.inf, 2.0, 1.0]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("form", [{}, {"fused": True}, {"foreach": False}])
def test_follows_torch(form, clip, torch):
    assert train(vt, LOSSES, clip=clip, **form) == train(torch, LOSSES, clip=clip)


def test_adamw_inside_step_does_not_count_skipped_steps():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.AdamW([p], fused=True)
    scaler = vt.amp.GradScaler(DEVICE, init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[p]["step"].item() == 2.0
    assert scaler.get_scale() == 2.0
    assert not hasattr(optimizer, "grad_scale")
    assert all(math.isfinite(v) for v in p.tolist())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("unscale", [False, True])
def test_fused_steps_without_gradients_are_torchs(name, unscale, torch):
    def outcome(api):
        idle, used = api.nn.Parameter(api.ones(3)), api.nn.Parameter(api.ones(1))
        optimizer = getattr(api.optim, name)([idle], fused=True)
        other = getattr(api.optim, name)([used], fused=True)
        scaler = api.amp.GradScaler(DEVICE if api is vt else "cpu", init_scale=4.0)
        seen = []
        for optimizers in ([optimizer, other], [optimizer]):
            scaler.scale(used.sum()).backward()
            for each in optimizers:
                if unscale:
                    scaler.unscale_(each)
                seen.append(scaler.step(each))
            with pytest.raises(RuntimeError, match="since the last update"):
                scaler.step(optimizer)
            if len(optimizers) == 2:
                scaler.update()
        with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
            scaler.update()
        return seen, idle.tolist(), used.tolist()

    (seen, *params), (torchs, *torch_params) = outcome(vt), outcome(torch)
    assert seen == torchs == [None] * 3
    assert params[0] == torch_params[0] and params[1] == pytest.approx(torch_params[1])


def test_natives_are_torchs(torch):
    for values in ([1.0, 2.0], [1.0, math.inf], [math.nan, 0.0]):
        grads, found = [vt.tensor(values), vt.ones(3)], vt.tensor(0.0)
        vt._amp_foreach_non_finite_check_and_unscale_(grads, found, vt.tensor(0.5))
        expected, flag = [torch.tensor(values), torch.ones(3)], torch.tensor(0.0)
        torch._amp_foreach_non_finite_check_and_unscale_(expected, flag, torch.tensor(0.5))
        assert found.item() == flag.item()
        assert repr([g.tolist() for g in grads]) == repr([g.tolist() for g in expected])
    for scale, tracker, found in [(8.0, 0, 0), (8.0, 1, 0), (8.0, 1, 1), (3e38, 1, 0), (8.0, 0, 2)]:
        ours = vt.tensor(scale), vt.tensor(tracker, dtype=vt.int32)
        theirs = torch.tensor(scale), torch.tensor(tracker, dtype=torch.int32)
        vt._amp_update_scale_(*ours, vt.tensor(float(found)), 2.0, 0.5, 2)
        torch._amp_update_scale_(*theirs, torch.tensor(float(found)), 2.0, 0.5, 2)
        assert [v.item() for v in ours] == [v.item() for v in theirs]


def test_disabled_is_a_no_op():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.SGD([p], lr=1.0)
    scaler = vt.amp.GradScaler(DEVICE, enabled=False)
    loss = p.sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})
    assert not scaler.is_enabled()


def test_cuda_without_a_device_disables_with_a_warning():
    if vt.cuda.is_available():
        pytest.skip("a CUDA device is present")
    with pytest.warns(UserWarning, match="CUDA is not available"):
        assert not vt.amp.GradScaler().is_enabled()


def test_scale_of_nested_outputs():
    scaler = vt.amp.GradScaler(DEVICE, init_scale=4.0)
    a, (b, c) = scaler.scale((vt.ones(1), [vt.ones(1), vt.ones(1, dtype=vt.bfloat16)]))
    assert [a.item(), b.item(), c.item()] == [4.0] * 3
    assert c.dtype == vt.bfloat16
    with pytest.raises(ValueError, match="outputs must be"):
        scaler.scale(1.0)


def test_state_dict_resumes_and_pickles():
    scaler = vt.amp.GradScaler(DEVICE, init_scale=4.0, growth_interval=5)
    scaler.scale(vt.ones(1))
    scaler.load_state_dict({**scaler.state_dict(), "scale": 32.0, "_growth_tracker": 3})
    assert scaler.get_scale() == 32.0
    assert scaler.state_dict()["_growth_tracker"] == 3
    clone = pickle.loads(pickle.dumps(scaler))
    assert clone.state_dict() == scaler.state_dict()
    fresh = vt.amp.GradScaler(DEVICE)
    fresh.load_state_dict(scaler.state_dict())
    assert fresh.scale(vt.ones(1)).item() == 32.0
    with pytest.raises(RuntimeError, match="source state dict is empty"):
        fresh.load_state_dict({})


def test_update_to_a_given_scale():
    scaler = vt.amp.GradScaler(DEVICE)
    scaler.scale(vt.ones(1))
    scaler.update(16.0)
    assert scaler.get_scale() == 16.0
    scaler.update(vt.tensor([2.0]))
    assert scaler.get_scale() == 2.0


def test_misuse_is_named():
    p = vt.nn.Parameter(vt.ones(2))
    optimizer = vt.optim.SGD([p], lr=1.0)
    scaler = vt.amp.GradScaler(DEVICE)
    with pytest.raises(AssertionError, match="no loss was scaled"):
        scaler.step(optimizer)
    scaler.scale(vt.ones(1))
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    scaler = vt.amp.GradScaler(DEVICE)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=lambda: None)
    with pytest.raises(AssertionError, match="growth factor"):
        vt.amp.GradScaler(DEVICE, growth_factor=1.0)
    with pytest.raises(AssertionError, match="backoff factor"):
        vt.amp.GradScaler(DEVICE, backoff_factor=1.0)


def test_half_gradients_cannot_be_unscaled():
    p = vt.nn.Parameter(vt.ones(2, dtype=vt.float16))
    p.grad = vt.ones(2, dtype=vt.float16)
    scaler = vt.amp.GradScaler(DEVICE)
    scaler.scale(vt.ones(1))
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(vt.optim.SGD([p], lr=1.0))
