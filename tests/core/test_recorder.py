"""Every op passes the one consumer point: a training step runs again from its record alone."""

from __future__ import annotations

import vibetensor.torch as vt
from vibetensor import _C


def _model() -> tuple[vt.nn.Module, vt.optim.Optimizer, vt.Tensor, vt.Tensor]:
    vt.manual_seed(0)
    model = vt.nn.Sequential(
        vt.nn.Embedding(11, 16),
        vt.nn.LayerNorm(16),
        vt.nn.Linear(16, 32),
        vt.nn.GELU(),
        vt.nn.Dropout(0.2),
        vt.nn.Linear(32, 11),
    )
    optimizer = vt.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, vt.randint(0, 11, (4, 6)), vt.randint(0, 11, (4, 6))


def _step(
    model: vt.nn.Module, optimizer: vt.optim.Optimizer, x: vt.Tensor, y: vt.Tensor
) -> vt.Tensor:
    loss = vt.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    vt.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def test_a_training_step_replays_from_its_record() -> None:
    model, optimizer, x, y = _model()
    _step(model, optimizer, x, y)  # makes the optimizer's state

    def state() -> list[vt.Tensor]:
        moments = [
            t for s in optimizer.state.values() for t in s.values() if isinstance(t, vt.Tensor)
        ]
        return [*(p.detach() for p in model.parameters()), *moments]

    before = [t.clone() for t in state()]
    recorder = _C.Recorder()
    with recorder:
        loss = _step(model, optimizer, x, y)
    after = [t.clone() for t in state()]
    assert any((a != b).any() for a, b in zip(after, before))
    recorded_loss = loss.item()

    with vt.no_grad():
        for live, old in zip(state(), before):
            live.copy_(old)
        loss.data.fill_(-1.0)
    recorder.replay()
    assert loss.item() == recorded_loss
    for live, expected in zip(state(), after):
        assert vt.equal(live, expected)


def test_the_record_names_ops_and_holds_their_outputs() -> None:
    a, b = vt.ones(2, 3), vt.ones(3)
    recorder = _C.Recorder()
    with recorder:
        c = (a + b).view(6)
    calls = recorder.calls()
    assert [name for name, _, _ in calls] == ["add", "view"]
    assert calls[1][2][0].shape == (6,)
    assert calls[1][2][0].data_ptr() == c.data_ptr()
    assert len(recorder) == 2


def test_random_ops_draw_the_same_numbers_again() -> None:
    x = vt.ones(100)
    recorder = _C.Recorder()
    with recorder:
        y = vt.nn.functional.dropout(x, 0.5)
    first = y.clone()
    y.zero_()
    recorder.replay()
    assert vt.equal(y, first)
