"""The `vibetensor` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

_EPILOG = """\
examples:
  vibetensor train minigpt                       learn Python's own sources, about two minutes
  vibetensor train minigpt --data book.txt --vocab char
  vibetensor train minigpt --resume runs/minigpt-20260102-030405
  vibetensor train reverse
  vibetensor train vit --data cifar-10-batches-bin
  vibetensor sample runs/minigpt-20260102-030405 --prompt "def main"
  vibetensor viz memory snapshot.pickle -o memory.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack characters that texts have
            stream.reconfigure(errors="replace")
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away; nothing to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not _explains_itself(error):
            raise
        print(f"vibetensor: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _explains_itself(error: Exception) -> bool:
    """True for what a user can mend (wrong options, missing or damaged files); for all else the
    traceback is worth more than a tidy line."""
    import vibetensor.torch as torch
    from vibetensor.io.safetensors import SafetensorError

    known = (ValueError, OSError, ArithmeticError, MemoryError, SafetensorError)
    return isinstance(error, (*known, torch.OutOfMemoryError))


def _one_line(error: Exception) -> str:
    """What the error says. A device's that is out of memory goes on with a table of who holds what."""
    import vibetensor.torch as torch

    text = str(error) or type(error).__name__
    return text.partition("\n")[0] if isinstance(error, torch.OutOfMemoryError) else text


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="vibetensor",
        description="Train small models, sample from them, and show what this build can do.",
        epilog=_EPILOG,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a model", epilog=_EPILOG, formatter_class=formatter
    )
    tasks = train.add_subparsers(title="tasks", required=True, metavar="TASK", dest="task")
    for task, text in (
        ("minigpt", "a small GPT on text (default: the Python standard library's sources)"),
        ("reverse", "a small GPT that learns to reverse sequences; needs no data"),
        ("vit", "a small vision transformer on CIFAR-10 or (Fashion-)MNIST files"),
    ):
        _add_train_options(tasks.add_parser(task, help=text, description=text), task)

    sample = commands.add_parser("sample", help="write text with a trained minigpt")
    sample.add_argument("folder", metavar="RUN", help="run folder, or one of its step_N folders")
    sample.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    sample.add_argument("--tokens", type=int, default=400, help="tokens to add (default: 400)")
    sample.add_argument("--temperature", type=float, default=0.8,
                        help="0 always takes the likeliest token, else at least 1e-6 (default: 0.8)")  # fmt: skip
    sample.add_argument("--top-k", type=int, default=40,
                        help="choose among the K likeliest; 0: all (default: 40)")  # fmt: skip
    sample.add_argument("--seed", type=int, default=1337, help="seed of the choice (default: 1337)")
    sample.set_defaults(run=_sample)

    viz = commands.add_parser("viz", help="draw what was recorded as a page for a browser")
    views = viz.add_subparsers(title="views", required=True, metavar="VIEW", dest="view")
    text = "a memory snapshot, as torch.cuda.memory._dump_snapshot writes it"
    memory = views.add_parser("memory", help=text, description=f"Draws {text}.")
    memory.add_argument("snapshot", metavar="PICKLE", help="the snapshot; ours or PyTorch's")
    memory.add_argument("-o", "--output", metavar="HTML",
                        help="page to write (default: the snapshot's name with .html)")  # fmt: skip
    memory.set_defaults(run=_viz_memory)

    info = commands.add_parser("info", help="show version, build, backends, devices and libraries")
    info.set_defaults(run=_info)

    fetch = commands.add_parser(
        "download", help="fetch and check a data set for vit (needs a network)"
    )
    fetch.add_argument("name", choices=("cifar10", "fashion-mnist", "mnist"))
    fetch.add_argument("folder", metavar="DIR", help="where to put it")
    fetch.set_defaults(run=_download)
    return parser


def _add_train_options(parser: argparse.ArgumentParser, task: str) -> None:
    """One option a field of TrainConfig. Options not given are absent from the result, so that on
    resuming only those given override the checkpoint's."""
    import dataclasses

    from vibetensor.train.config import TrainConfig, default_config

    defaults = default_config(task)
    others = {"minigpt", "reverse", "vit"} - {task}
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata.get("help")
        if text is None or any(text.startswith(f"{other}: ") for other in others):
            continue
        text = text.removeprefix(f"{task}: ")
        default = getattr(defaults, field.name)
        if default is not None:
            text += f" (default: {default})"
        choices = field.metadata["choices"]
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.metadata["kind"],
            choices=choices,
            metavar=None if choices else field.metadata["kind"].__name__.upper(),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run folder's newest checkpoint, or with a step_N folder, whose later ones "
        "are set aside; options given beside it override the saved ones, but for the model's",
    )
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from vibetensor.train.checkpoint import find_checkpoint, read_state
    from vibetensor.train.config import TrainConfig, default_config
    from vibetensor.train.trainer import Trainer

    given = {k: v for k, v in vars(options).items() if k not in ("run", "task", "resume")}
    if options.resume is None:
        config = default_config(options.task, **given)
        run = config.out or _new_run_folder(options.task)
        if os.path.isdir(run) and any(name.startswith("step_") for name in os.listdir(run)):
            raise ValueError(
                f"'{run}' holds a run already; --resume {run}, or choose another --out"
            )
        return Trainer(config, run).train()
    checkpoint = find_checkpoint(options.resume)
    state = read_state(checkpoint)
    if "out" in given:
        raise ValueError("--out cannot be combined with --resume: a run stays in its folder")
    config = TrainConfig.from_checkpoint(state["config"], checkpoint, **given)
    if config.task != options.task:
        raise ValueError(f"'{options.resume}' is a {config.task} run, not {options.task}")
    if config.steps < state["step"]:
        raise ValueError(
            f"'{checkpoint}' is at step {state['step']} already; --steps {config.steps} is before it"
        )
    run = os.path.dirname(os.path.abspath(checkpoint))
    return Trainer(
        config, os.path.relpath(run) if run.startswith(os.getcwd()) else run, checkpoint
    ).train()


def _new_run_folder(task: str) -> str:
    import time

    base = os.path.join("runs", f"{task}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder, count = base, 1
    while os.path.exists(folder):
        count += 1
        folder = f"{base}-{count}"
    return folder


def _sample(options: argparse.Namespace) -> int:
    if options.tokens < 1 or options.top_k < 0:
        raise ValueError("--tokens must be at least 1, --top-k at least 0")
    # Logits that are divided by less may leave the range of float32.
    if options.temperature != 0 and not 1e-6 <= options.temperature < float("inf"):
        raise ValueError(
            f"--temperature must be 0 or at least 1e-6, and finite, got {options.temperature}"
        )
    from vibetensor.train.config import check_seed

    check_seed(options.seed)
    from vibetensor.train.sample import load_gpt
    from vibetensor.train.tasks import sample_text

    model, vocabulary = load_gpt(options.folder)
    print(
        sample_text(
            model,
            vocabulary,
            options.prompt,
            options.tokens,
            options.temperature,
            options.top_k or None,
            options.seed,
        )
    )
    return 0


def _viz_memory(options: argparse.Namespace) -> int:
    from vibetensor.viz.memory import write_memory_page
    from vibetensor.viz.memory_snapshot import load_snapshot

    output = options.output or os.path.splitext(options.snapshot)[0] + ".html"
    if os.path.abspath(output) == os.path.abspath(options.snapshot):
        raise ValueError(f"the page would replace the snapshot '{output}'; choose another --output")
    name = os.path.basename(options.snapshot)
    write_memory_page(output, load_snapshot(options.snapshot), f"CUDA memory: {name}")
    print(f"wrote {output}")
    return 0


def _info(_: argparse.Namespace) -> int:
    from vibetensor.train.info import info_lines

    print("\n".join(info_lines()))
    return 0


def _download(options: argparse.Namespace) -> int:
    from vibetensor.train.image_data import download

    download(options.name, options.folder)
    return 0
