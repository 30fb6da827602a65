"""Checkpoints: exact restoration, pruning, and saves that fail or are killed."""

import os
import random
import resource
import signal
import textwrap
import time

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.torch import nn
from vibetensor.train.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def small_setup(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def steps(model, optimizer, count):
    """Losses that depend on every generator a checkpoint restores."""
    losses = []
    for _ in range(count):
        x = torch.rand(5, 4) + random.random() + float(np.random.rand())
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_resuming_continues_the_identical_losses(tmp_path):
    model, optimizer = small_setup()
    steps(model, optimizer, 3)
    config, cursor = {"width": 8}, {"next_batch": 3}
    path = save_checkpoint(tmp_path, 3, model, optimizer, config=config, cursor=cursor)
    expected = steps(model, optimizer, 5)
    other, other_optimizer = small_setup(seed=1)
    steps(other, other_optimizer, 1)
    state = load_checkpoint(path, other, other_optimizer)
    assert (state["step"], state["config"], state["cursor"]) == (3, config, cursor)
    assert steps(other, other_optimizer, 5) == expected


def test_scheduler_and_scaler_are_restored(tmp_path):
    class Counter:
        def __init__(self):
            self.count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    model, optimizer = small_setup()
    scheduler, scaler = Counter(), Counter()
    scheduler.count, scaler.count = 4, 5
    extra = {"scheduler": scheduler, "scaler": scaler}
    path = save_checkpoint(tmp_path, 1, model, optimizer, config={}, **extra)
    fresh = {"scheduler": Counter(), "scaler": Counter()}
    load_checkpoint(path, model, optimizer, **fresh)
    assert fresh["scheduler"].count == 4 and fresh["scaler"].count == 5


def test_keep_removes_only_older_checkpoints(tmp_path):
    model, optimizer = small_setup()
    for step in (2, 10, 9, 11):
        save_checkpoint(tmp_path, step, model, optimizer, config={}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 11]
    assert find_checkpoint(tmp_path) == str(tmp_path / "step_11")
    assert find_checkpoint(tmp_path / "step_10") == str(tmp_path / "step_10")
    with pytest.raises(ValueError, match="keep"):
        save_checkpoint(tmp_path, 12, model, optimizer, config={}, keep=0)


def test_incomplete_folders_are_not_checkpoints(tmp_path):
    model, optimizer = small_setup()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 5, model, optimizer, config={})
    (tmp_path / "step_9.tmp").mkdir()
    (tmp_path / "step_8").mkdir()
    assert find_checkpoint(tmp_path) == str(tmp_path / "step_5")
    os.rename(tmp_path / "step_5", tmp_path / "step_5.old")  # killed between the two renames
    assert find_checkpoint(tmp_path) == str(tmp_path / "step_5.old")
    load_checkpoint(tmp_path / "step_5.old", model, optimizer)
    save_checkpoint(tmp_path, 5, model, optimizer, config={})
    assert sorted(os.listdir(tmp_path)) == ["step_5", "step_8", "step_9.tmp"]


def test_unknown_format_is_refused(tmp_path):
    model, optimizer = small_setup()
    path = save_checkpoint(tmp_path, 5, model, optimizer, config={})
    state = tmp_path / "step_5" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        load_checkpoint(path, model, optimizer)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("step", [3, 4])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, step):
    model, optimizer = small_setup()
    save_checkpoint(tmp_path, 3, model, optimizer, config={})
    before = contents(tmp_path)
    steps(model, optimizer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    try:
        with pytest.raises(OSError):
            save_checkpoint(tmp_path, step, model, optimizer, config={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path) == before


SAVE_FOREVER = """
    import itertools, sys
    from vibetensor.torch import nn
    import vibetensor.torch as torch
    from vibetensor.train.checkpoint import save_checkpoint
    model = nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    print("ready", flush=True)
    for step in itertools.count(1):
        save_checkpoint(sys.argv[1], step, model, optimizer, config={}, keep=2)
"""


def test_killed_saver_leaves_a_checkpoint_that_loads(tmp_path, start_python):
    model = nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path, 0, model, optimizer, config={})
    for pause in (0.005, 0.03, 0.1):
        child = start_python(textwrap.dedent(SAVE_FOREVER), tmp_path)
        assert child.stdout.readline() == "ready\n"
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for _, path in list_checkpoints(tmp_path)[-2:]:
            load_checkpoint(path, model, optimizer)
