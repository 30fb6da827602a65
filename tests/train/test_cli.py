"""The command line on tiny configurations."""

import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import sys
import time
import xml.dom.minidom

import pytest

import vibetensor.torch as torch
from tests.device import DEVICE_NAME
from vibetensor.train.cli import main
from vibetensor.train.config import TrainConfig, default_config, learning_rate
from vibetensor.train.metrics import Metrics, read_metrics
from vibetensor.train.progress import Progress, amount, duration
from vibetensor.viz.loss_curve import loss_curve, nice_ticks, smoothed

TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--batch", "4", "--warmup", "2",
        "--eval-batches", "2", "--device", DEVICE_NAME]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 50)
    return str(path)


def losses(run):
    return [r["loss"] for r in read_metrics(os.path.join(run, "metrics.jsonl")) if "loss" in r]


def minigpt(run, text, *more):
    return main(
        ["train", "minigpt", *TINY, "--block", "16", "--data", text, "--out", str(run), *more]
    )


def test_weights_that_are_not_finite_are_not_saved(tmp_path, text, capsys):
    run = tmp_path / "run"
    assert minigpt(run, text, "--steps", "2", "--lr", "1e-3", "--warmup", "0") == 0
    assert minigpt(tmp_path / "bad", text, "--steps", "1", "--lr", "1e30", "--warmup", "0") == 1
    error = capsys.readouterr().err
    assert re.search(r"val_loss is (nan|inf) at step 1; try a lower --lr$", error, re.M), error
    assert not [name for name in os.listdir(tmp_path / "bad") if name.startswith("step_")]
    for line in (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines():
        assert all(map(math.isfinite, json.loads(line).values()))
    options = ["--steps", "8", "--save-interval", "3", "--eval-interval", "100", "--keep", "1"]
    rest = ["--lr", "1e30", "--warmup", "2"]
    assert minigpt(tmp_path / "later", text, *options, *rest) == 1
    assert "try a lower --lr" in capsys.readouterr().err
    assert not [name for name in os.listdir(tmp_path / "later") if name.startswith("step_")]


def test_terminals_that_lack_characters(tmp_path, run_python):
    (tmp_path / "text.txt").write_text("größe und maß; " * 100, encoding="utf-8")
    options = [*TINY, "--block", "16", "--data", str(tmp_path / "text.txt"), "--steps", "2"]
    options += ["--vocab", "char", "--out", str(tmp_path / "run")]
    done = run_python(
        "import sys; from vibetensor.train.cli import main; sys.exit(main(sys.argv[1:]))",
        *["train", "minigpt", *options],
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "trained 2 steps" in done.stdout and done.stdout.isascii()


def test_minigpt_trains_and_samples(tmp_path, text, capsys):
    run = tmp_path / "run"
    assert minigpt(run, text, "--steps", "60", "--lr", "1e-2", "--eval-interval", "20") == 0
    out = capsys.readouterr().out
    entropy = float(re.search(r"unigram entropy of the validation text: ([\d.]+)", out)[1])
    final = float(re.search(r"validation loss ([\d.]+)", out)[1])
    assert final < entropy - 0.5
    assert "sample:" in out and f"wrote {run}" in out and "tok/s" in out and "\r" not in out
    assert sorted(os.listdir(run))[:3] == ["config.json", "loss.svg", "metrics.jsonl"]
    xml.dom.minidom.parse(str(run / "loss.svg"))
    assert len(losses(run)) == 60
    for extra in ([], ["--temperature", "0"], ["--top-k", "0", "--seed", "2"]):
        assert main(["sample", str(run), "--prompt", "the qu", "--tokens", "20", *extra]) == 0
        assert capsys.readouterr().out.startswith("the qu")
    main(["sample", str(run / "step_60"), "--seed", "5"])
    first = capsys.readouterr().out
    main(["sample", str(run), "--seed", "5"])
    assert capsys.readouterr().out == first


def test_resume_continues_the_identical_losses(tmp_path, text, capsys):
    options = ["--steps", "12", "--dropout", "0.2", "--save-interval", "5", "--vocab", "char"]
    assert minigpt(tmp_path / "whole", text, *options) == 0
    assert minigpt(tmp_path / "parts", text, *options) == 0
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == expected
    assert sorted(n for n in os.listdir(tmp_path / "parts") if n.startswith("step")) == [
        "step_10",
        "step_12",
    ]
    resumed = main(["train", "minigpt", "--resume", str(tmp_path / "parts" / "step_10")])
    assert resumed == 0 and losses(tmp_path / "parts") == expected
    assert "resumed at step 10" in capsys.readouterr().out


def test_options_beside_resume_override(tmp_path, text):
    run = tmp_path / "run"
    minigpt(run, text, "--steps", "4")
    assert main(["train", "minigpt", "--resume", str(run), "--steps", "7"]) == 0
    assert len(losses(run)) == 7


def checkpoints(run):
    return sorted(name for name in os.listdir(run) if name.startswith("step_"))


def test_resuming_an_earlier_checkpoint_leaves_the_later_path(tmp_path, text, capsys):
    run = tmp_path / "run"
    options = ["--steps", "8", "--save-interval", "2"]
    assert minigpt(run, text, *options, "--keep", "9") == 0
    resume = ["train", "minigpt", "--keep", "2", "--resume"]
    for count, aside in ((1, ""), (2, "2")):
        assert main([*resume, str(run / "step_4"), "--steps", str(5 + count)]) == 0
        assert f"of this run: step_6.aside{aside}" in capsys.readouterr().out
        if count == 1:  # the branch of 6 steps goes on from its own newest checkpoint
            assert checkpoints(run) == ["step_4", "step_6", "step_6.aside", "step_8.aside"]
    assert checkpoints(run) == [
        "step_6", "step_6.aside", "step_6.aside2", "step_7", "step_8.aside",
    ]  # fmt: skip
    capsys.readouterr()
    assert main([*resume, str(run), "--steps", "9"]) == 0
    out = capsys.readouterr().out
    assert "resumed at step 7" in out and "trained 2 more steps, 9 in" in out
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] == [
        *range(1, 10)
    ]
    # What was set aside is whole, and can be gone on with by its name.
    assert main([*resume, str(run / "step_8.aside")]) == 0
    assert "resumed at step 8" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_says_how_to_resume(tmp_path, text, start_python, number):
    run = tmp_path / "run"
    source = "import sys; from vibetensor.train.cli import main; sys.exit(main(sys.argv[1:]))"
    child = start_python(source, "train", "minigpt", *TINY, "--block", 16, "--data", text,
                         "--out", run, "--steps", 1000000)  # fmt: skip
    deadline = time.time() + 60
    metrics = run / "metrics.jsonl"
    while time.time() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert f"vibetensor train minigpt --resume {run}" in out
    step = int(re.search(r"stopped after step (\d+)", out)[1])
    taken = losses(run)
    assert len(taken) == step
    assert main(["train", "minigpt", "--resume", str(run), "--steps", str(step + 2)]) == 0
    assert losses(run)[:step] == taken and len(losses(run)) == step + 2


def test_bf16_and_reverse(tmp_path, capsys):
    options = ["--steps", "15", "--length", "4", "--symbols", "3", "--dtype", "bf16"]
    assert main(["train", "reverse", *TINY, *options, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "->" in out


@pytest.mark.parametrize("kind", ["cifar", "idx"])
def test_vit(tmp_path, capsys, write_cifar, write_idx, kind):
    data = tmp_path / "data"
    data.mkdir()
    write_cifar(data) if kind == "cifar" else write_idx(data, zipped=True)
    run = tmp_path / "run"
    options = ["--steps", "6", "--data", str(data), "--out", str(run)]
    assert main(["train", "vit", *TINY, *options]) == 0
    out = capsys.readouterr().out
    assert "img/s" in out and "accuracy" in out and len(losses(run)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "vit"], "vibetensor download"),
        (["train", "minigpt", "--data", "/nonexistent"], "No such file"),
        (["train", "minigpt", "--width", "10"], "multiple of --heads"),
        (["train", "minigpt", "--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        (["train", "minigpt", "--device", "cuda:99"], "--device cuda:99: "),
        (["train", "minigpt", "--steps", "0"], "--steps must be at least 1"),
        (["train", "minigpt", "--resume", "/nonexistent"], "no checkpoint"),
        (["sample", "/nonexistent"], "no checkpoint"),
        (["sample", "/nonexistent", "--temperature", "nan"], "--temperature must be 0 or at least"),
        (["sample", "/nonexistent", "--temperature", "1e-40"], "at least 1e-6, and finite, got 1e"),
        (["sample", "/nonexistent", "--seed", "9" * 30], "--seed must be from -2^63"),
        (["train", "reverse", "--seed", "9" * 30], "--seed must be from -2^63 to 2^64 - 1"),
        (
            ["train", "reverse", "--batch", "9" * 30],
            "--batch 999999999999999999999999999999 is out",
        ),
        *(
            (
                ["train", task, f"--{name}", 2**63 - 1],
                f"--{name} must be from 1 to 16777216, got 9223372036854775807",
            )
            for task, name in [
                ("reverse", "batch"),
                ("reverse", "symbols"),
                ("reverse", "length"),
                ("reverse", "width"),
                ("minigpt", "block"),
                ("vit", "patch"),
            ]
        ),
        (
            ["train", "reverse", "--width", 2**24, "--symbols", 2**24],
            "--width 16777216 can be made: ",
        ),
        (["train", "reverse", "--warmup", "-5"], "--warmup must be at least 0, got -5"),
        (["train", "reverse", "--clip", "-1"], "--clip must be at least 0, got -1.0"),
        (["train", "reverse", "--min-lr", "-1"], "--min-lr must be at least 0, got -1.0"),
        (["train", "reverse", "--weight-decay", "-1"], "--weight-decay must be at least 0"),
        (["train", "reverse", "--beta2", "1"], "--beta2 must be from 0 to below 1"),
        (["train", "reverse", "--lr", "nan"], "--lr must be a finite number, got nan"),
        (["train", "reverse", "--dropout", "inf"], "--dropout must be a finite number"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert one_line(capsys, arguments, message)


def one_line(capsys, arguments, message):
    """Whether the command fails with just this message."""
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert one_line(capsys, ["train", "reverse", "--device", "cuda"], "--device cuda: ")


def test_errors_of_the_first_step_are_one_line(tmp_path, capsys):
    sizes = ["--batch", "16777216", "--length", "1000000", "--out", str(tmp_path / "run")]
    assert main(["train", "reverse", *TINY, *sizes]) == 1
    assert re.search("vibetensor: error: (CPU|CUDA) out of memory", capsys.readouterr().err)


def test_the_largest_seeds(tmp_path):
    for name, seed in (("a", 2**64 - 1), ("b", -(2**63))):
        options = ["--seed", str(seed), "--steps", "1", "--out", str(tmp_path / name)]
        assert main(["train", "reverse", *TINY, *options]) == 0
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_options_that_do_not_fit_a_checkpoint(tmp_path, text, capsys):
    run = tmp_path / "run"
    minigpt(run, text, "--steps", "3", "--vocab", "char")
    capsys.readouterr()
    other = tmp_path / "other.txt"
    other.write_text("THE QUICK BROWN FOX " * 50)
    resume = ["train", "minigpt", "--resume", run]
    assert one_line(capsys, [*resume, "--width", 32], "--width 32 does not fit the saved model")
    assert one_line(capsys, [*resume, "--vocab", "byte"], "which has --vocab char")
    assert one_line(capsys, [*resume, "--steps", 2], "is at step 3 already; --steps 2 is before it")
    assert one_line(capsys, [*resume, "--data", other], "give another vocabulary")
    assert main([*map(str, resume), "--steps", "3"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("config"), 'no "config" that is a dict'),
        (lambda s: s.update(step="3"), 'no "step" that is a int'),
        (lambda s: s["config"].update(colour=3), "options of another version: colour"),
        (lambda s: s["config"].pop("task"), "its config has no task"),
        (lambda s: s["config"].update(task="chess"), "there is no task 'chess'"),
        (lambda s: s["config"].update(layers="many"), "--layers must be of type int, got 'many'"),
        (lambda s: s["config"].update(vocab="word"), "--vocab must be one of byte, char"),
        (lambda s: s["config"].update(width=24), "does not fit its own options"),
        (lambda s: s["rng"].pop("python"), "generator states are not understood (KeyError"),
        (lambda s: s["rng"].update(vibetensor="xx"), "generator states are not understood"),
        (lambda s: s["rng"].update(python=[3, ["a"], None]), "generator states are not understood"),
        (lambda s: s.pop("cursor"), "the data cursor None is not understood"),
    ],
)
def test_a_damaged_state_is_named(tmp_path, text, capsys, change, message):
    run = tmp_path / "run"
    minigpt(run, text, "--steps", "1")
    capsys.readouterr()
    path = run / "step_1" / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    assert one_line(capsys, ["train", "minigpt", "--resume", run, "--steps", 2], message)


def test_sampling_a_damaged_checkpoint(tmp_path, text, capsys):
    run = tmp_path / "run"
    minigpt(run, text, "--steps", "1")
    capsys.readouterr()
    path = run / "step_1" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "config": {**state["config"], "width": 32}}))
    assert one_line(capsys, ["sample", run], "does not hold the model of its state.json")
    del state["config"]["assets"]
    path.write_text(json.dumps(state))
    assert one_line(capsys, ["sample", run], "it has no vocabulary")


def test_run_folders_are_not_overwritten(tmp_path, text, capsys):
    run = tmp_path / "run"
    minigpt(run, text, "--steps", "1")
    assert minigpt(run, text, "--steps", "1") == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "reverse", "--resume", str(run)]) == 1
    assert "is a minigpt run" in capsys.readouterr().err


def test_help_is_complete(capsys):
    for command in (
        [],
        ["train"],
        ["train", "minigpt"],
        ["train", "vit"],
        ["sample"],
        ["info"],
        ["download"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--resume", "--weight-decay", "--patch", "--prompt", "minigpt", "(default: 2000)"):
        assert word in out


def test_learning_rate_schedule():
    config = default_config("minigpt", steps=101, warmup=10, lr=1.0, min_lr=0.2)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    with pytest.raises(ValueError, match="--lr"):
        TrainConfig(task="minigpt", lr=0.0)


def test_progress_on_a_terminal_and_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, living in ((Terminal(), True), (io.StringIO(), False)):
        progress = Progress(0, 100, "tok", stream)
        for step in range(1, 101):
            progress.step(step, 2.5, 1e-3, 1000)
        progress.line("done")
        text = stream.getvalue()
        assert ("\r" in text) == living and text.endswith("done\n")
        assert "step 100/100" in text and "loss 2.5000" in text and "ETA 0s" in text
        assert living or text.count("\n") == 21


def test_durations_and_amounts():
    assert [duration(s) for s in (0, 59.4, 60, 3725)] == ["0s", "59s", "1:00", "1:02:05"]
    assert [amount(v) for v in (5, 31234, 4.05e6)] == ["5", "31.2k", "4.05M"]


def test_metrics_drop_what_a_resumed_run_repeats(tmp_path):
    metrics = Metrics(str(tmp_path))
    for step in range(1, 6):
        metrics.write(step, loss=float(step))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a crash
    metrics = Metrics(str(tmp_path), first_step=3)
    metrics.write(4, loss=40.0)
    metrics.close()
    assert metrics.series("loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1, 2, 3, 40]


@contextlib.contextmanager
def files_of_at_most(size):
    """Meanwhile no file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The error, not the signal; and no module is compiled into a file that is cut off.
    handler, flag = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        sys.dont_write_bytecode = flag


def test_metrics_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
    # Its events, where TensorBoard is installed, are files beside these.
    monkeypatch.setattr("vibetensor.train.metrics._tensorboard", lambda run: None)
    said = []
    metrics = Metrics(str(tmp_path), warn=said.append)
    with files_of_at_most(100):  # in the middle of a line
        for step in range(1, 21):
            metrics.write(step, loss=float(step))
        assert len(said) == 1 and "metrics.jsonl" in said[0] and "File too large" in said[0]
        assert os.path.getsize(metrics.path) == 100
    metrics.write(21, loss=21.0)
    metrics.close()
    assert len(said) == 1
    assert read_metrics(metrics.path) == metrics.records
    assert [step for step, _ in metrics.series("loss")] == list(range(1, 22))


def test_resuming_on_a_full_disk_keeps_the_metrics(tmp_path, monkeypatch):
    # Its events, where TensorBoard is installed, are files beside these.
    monkeypatch.setattr("vibetensor.train.metrics._tensorboard", lambda run: None)
    metrics = Metrics(str(tmp_path))
    for step in range(1, 21):
        metrics.write(step, loss=float(step))
    metrics.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        Metrics(str(tmp_path), first_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_events_that_cannot_be_written_end(tmp_path, monkeypatch):
    class FullBoard:
        def __call__(self, step, values):
            raise OSError("No space left on device")

    monkeypatch.setattr("vibetensor.train.metrics._tensorboard", lambda run: FullBoard())
    said = []
    metrics = Metrics(str(tmp_path), warn=said.append)
    for step in (1, 2):
        metrics.write(step, loss=0.5)
    metrics.close()
    assert len(said) == 1 and "TensorBoard's events: No space left" in said[0]
    assert len(read_metrics(metrics.path)) == 2


def test_training_goes_on_when_metrics_cannot_be_written(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    real = Metrics._write_lines

    def with_room_for_a_few(self):
        with files_of_at_most(300):
            real(self)

    monkeypatch.setattr(Metrics, "_write_lines", with_room_for_a_few)
    assert main(["train", "reverse", *TINY, "--steps", "30", "--out", str(run)]) == 0
    assert capsys.readouterr().out.count("could not write") == 1
    assert checkpoints(run) == ["step_30"]


def test_a_finished_run_without_metrics_is_validated_again(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "reverse", *TINY, "--steps", "4", "--out", str(run)]) == 0
    final = re.search(r"validation loss [\d.]+", capsys.readouterr().out)[0]
    resume = ["train", "reverse", "--resume", str(run)]
    assert main(resume) == 0
    assert final in capsys.readouterr().out
    (run / "metrics.jsonl").unlink()
    assert main(resume) == 0
    assert final in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(str(run / "metrics.jsonl"))] == [4]


def test_loss_curve():
    train = [(i, 5 / (i + 1)) for i in range(50)] + [(50, float("nan"))]
    svg = loss_curve(train, [(0, 5.0), (50, 1.0)], "a <b>", ("level & line", 3.0))
    document = xml.dom.minidom.parseString(svg)
    lines = document.getElementsByTagName("polyline")
    assert [len(line.getAttribute("points").split()) for line in lines] == [50, 50, 2]
    assert "level &amp; line 3.000" in svg and "a &lt;b&gt;" in svg
    for points in ([], [(0, 1.0)], [(0, 1.0), (1, 1.0)]):
        xml.dom.minidom.parseString(loss_curve(points, []))
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and nice_ticks(2, 2) == [2]
    assert smoothed([(0, 2.0), (1, 2.0)]) == [(0, 2.0), (1, pytest.approx(2.0))]


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("vibetensor", "Python", "threads", "CUDA", "BLAS", "OpenBLAS 0.3"):
        assert word in out
    build = re.search(r"build +(\w+), (GNU|Clang) [\d.]+, CMake \d", out)
    assert build and build[1] in ("Release", "Debug", "RelWithDebInfo", "MinSizeRel")
    assert re.search(r"flags +.*-O[0-3]|flags +-g", out)
    chosen, built = re.search(r"CPU kernels +(\w+), of ([\w, ]+) built", out).groups()
    assert chosen in built.split(", ")
