"""Checkpoints: exact restoration, pruning, and saves that fail or are killed."""

import os
import random
import resource
import signal
import sys
import textwrap
import time

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.io import safetensors
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


def test_milestones_are_reached_after_resuming(tmp_path):
    def setup():
        model, optimizer = small_setup()
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def rates(optimizer, scheduler, count):
        seen = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            seen.append(scheduler.get_last_lr())
        return seen

    model, optimizer, scheduler = setup()
    rates(optimizer, scheduler, 1)
    path = save_checkpoint(tmp_path, 1, model, optimizer, config={}, scheduler=scheduler)
    expected = rates(optimizer, scheduler, 4)
    other, other_optimizer, other_scheduler = setup()
    load_checkpoint(path, other, other_optimizer, scheduler=other_scheduler)
    assert rates(other_optimizer, other_scheduler, 4) == expected


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


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("state.json", b"", ValueError),
        ("state.json", b'{"format": 1', ValueError),
        ("state.json", b"[1]", ValueError),
        ("state.json", b"\xff\xfe", ValueError),
        ("optimizer.safetensors", b"\x02\0\0\0\0\0\0\0{}", ValueError),
        ("optimizer.safetensors", b"", safetensors.HeaderTooSmall),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0{", safetensors.InvalidHeaderLength),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0{}", RuntimeError),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(tmp_path, name, content, error):
    model, optimizer = small_setup()
    path = save_checkpoint(tmp_path, 5, model, optimizer, config={})
    (tmp_path / "step_5" / name).write_bytes(content)
    with pytest.raises(error):
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


def save_and_die(run, step, model, optimizer, fatal):
    """The exit code of a child that saves, and is killed before its `fatal`-th change of the disk:
    a rename, a removal, a new folder, an opened file."""
    pid = os.fork()
    if pid == 0:
        events = 0

        def count(event, arguments):
            nonlocal events
            if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or (
                event == "open" and str(run) in str(arguments[0])
            ):
                events += 1
                if events == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            fill(model, 7.0)
            save_checkpoint(run, step, model, optimizer, config={"new": True}, keep=1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fill(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("step", [5, 6], ids=["same step", "next step"])
def test_saver_killed_before_each_change_of_the_disk(tmp_path, step):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())

    def is_new(run):
        state = load_checkpoint(find_checkpoint(run), model, optimizer)
        expected = 7.0 if state["config"]["new"] else 3.0
        assert all((p == expected).all() for p in model.parameters())
        return state["config"]["new"]

    outcomes = []
    for fatal in range(1, 100):
        run = tmp_path / str(fatal)
        run.mkdir()
        fill(model, 3.0)
        save_checkpoint(run, 5, model, optimizer, config={"new": False})
        code = save_and_die(run, step, model, optimizer, fatal)
        outcomes.append(is_new(run))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for again in range(1, 6):  # killed again while it mends what the first kill left
            save_and_die(run, step, model, optimizer, again)
            is_new(run)
        assert save_and_die(run, step, model, optimizer, 0) == 0
        assert [path.name for path in run.iterdir()] == [f"step_{step}"]
    assert outcomes[0] is False and outcomes[-1] is True
    assert outcomes == sorted(outcomes) and len(outcomes) > 5


FILL_THE_DISK = """
    import errno, os, sys
    import vibetensor.torch as torch
    from vibetensor.torch import nn
    from vibetensor.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
    run = sys.argv[1]
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(run, 1, model, optimizer, config={})
    filler = os.path.join(run, "filler")
    for left in (40_000, 20_000, 17_000, 8_000, 1_000, 0):
        space = os.statvfs(run)
        with open(filler, "wb") as file:
            try:
                file.write(bytes(max(0, space.f_bavail * space.f_frsize - left)))
                file.flush()
            except OSError:
                pass
        for step in (1, 2):
            try:
                save_checkpoint(run, step, model, optimizer, config={}, keep=1)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                assert "No space left" in str(error), error
                print("refused")
            load_checkpoint(find_checkpoint(run), model, optimizer)
        assert not [n for n in os.listdir(run) if "tmp" in n]
        os.remove(filler)
    save_checkpoint(run, 3, model, optimizer, config={}, keep=1)
    print(*os.listdir(run))
"""


def test_full_file_system(tmp_path, run_python):
    """A real one: a small tmpfs of its own mount namespace, where that is permitted."""
    prelude = """
    import ctypes, os, sys
    libc = ctypes.CDLL(None, use_errno=True)
    CLONE_NEWNS, MS_REC_PRIVATE = 0x20000, 0x44000
    mounted = (
        libc.unshare(CLONE_NEWNS) == 0
        and libc.mount(None, b"/", None, MS_REC_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=160k") == 0
    )
    if not mounted:
        raise SystemExit(77)
    """
    done = run_python(textwrap.dedent(prelude) + textwrap.dedent(FILL_THE_DISK), tmp_path)
    if done.returncode == 77:
        pytest.skip("may not mount a file system")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines.count("refused") >= 3 and lines[-2] == "step_3"
