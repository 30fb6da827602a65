"""What a training run can be told: one table of options, from which the command line is made and
which is stored in every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


def option(
    default: Any, text: str, choices: tuple[str, ...] | None = None, kind: Any = None
) -> Any:
    """A field with its help text; `kind` converts the command line's string."""
    metadata = {"help": text, "choices": choices, "kind": kind or type(default)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    task: str

    # Data
    data: str | None = option(None, "file or folder to train on", kind=str)
    vocab: str = option("byte", "minigpt: one token a byte or a character", ("byte", "char"))
    length: int = option(12, "reverse: symbols in a sequence")
    symbols: int = option(10, "reverse: different symbols")

    # Model
    layers: int = option(4, "transformer blocks")
    heads: int = option(4, "attention heads a block")
    width: int = option(128, "features a token")
    block: int = option(64, "minigpt: tokens the model can look back on")
    patch: int = option(4, "vit: pixels a patch side")
    dropout: float = option(0.0, "probability of dropping a feature")

    # Optimisation
    steps: int = option(2000, "optimizer steps")
    batch: int = option(12, "sequences or images a step")
    lr: float = option(2e-3, "peak learning rate")
    min_lr: float | None = option(
        None, "learning rate at the last step (default: lr / 10)", kind=float
    )
    warmup: int = option(100, "steps over which the learning rate rises to its peak")
    weight_decay: float = option(0.1, "AdamW's decay of matrices")
    beta1: float = option(0.9, "AdamW's first moment")
    beta2: float = option(0.99, "AdamW's second moment")
    clip: float = option(1.0, "largest gradient norm; 0 turns clipping off")

    # Machine
    device: str = option("cpu", "where to train")
    dtype: str = option("fp32", "fp32, or bf16 autocast with fp32 weights", ("fp32", "bf16"))
    threads: int | None = option(
        None, "CPU threads (default: VT_NUM_THREADS or all cores)", kind=int
    )
    seed: int = option(1337, "seed of weights, batches and dropout")

    # Run
    out: str | None = option(None, "run folder (default: runs/TASK-DATE-TIME)", kind=str)
    eval_interval: int = option(250, "steps between validations")
    eval_batches: int = option(40, "batches a validation")
    save_interval: int = option(
        500, "steps between checkpoints (also one at the end and on Ctrl-C)"
    )
    keep: int = option(2, "checkpoints to keep, the newest")

    def __post_init__(self) -> None:
        if self.task not in TASK_DEFAULTS:
            raise ValueError(f"there is no task {self.task!r}; it is one of {[*TASK_DEFAULTS]}")
        for field in dataclasses.fields(self)[1:]:
            self._check_kind(field)
        for name in ("layers", "heads", "width", "block", "patch", "batch", "length", "symbols"):
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZE:
                raise ValueError(f"--{name} must be from 1 to {LARGEST_SIZE}, got {value}")
        for name in ("steps", "eval_interval", "eval_batches", "save_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"--threads must be from 1 to 1024, got {self.threads}")
        for name in ("warmup", "weight_decay", "clip", "min_lr"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be from 0 to below 1, got {getattr(self, name)}")
        check_seed(self.seed)
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be from 0 to below 1, got {self.dropout}")
        if self.lr <= 0:
            raise ValueError(f"--lr must be above 0, got {self.lr}")

    def _check_kind(self, field: dataclasses.Field[Any]) -> None:
        """The command line converts strings; a checkpoint's JSON may hold anything."""
        value, kind = getattr(self, field.name), field.metadata["kind"]
        name = "--" + field.name.replace("_", "-")
        if value is None and field.default is None:
            return
        accepted = (int, float) if kind is float else kind
        if value is None or isinstance(value, bool) or not isinstance(value, accepted):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
        if kind is int and abs(value) >= 2**63 and field.name != "seed":
            raise ValueError(f"{name} {value} is out of range")
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any], where: str, **given: Any) -> TrainConfig:
        """The configuration a checkpoint's state.json holds, with `given` options over it. Raises
        ValueError, naming the folder `where`, for one that this version does not understand."""
        saved = {name: value for name, value in saved.items() if name != "assets"}
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, saved.keys() - known))
        if unknown:
            raise ValueError(f"'{where}' has options of another version: {', '.join(unknown)}")
        if "task" not in saved:
            raise ValueError(f"'{where}' is damaged: its config has no task")
        for name in SHAPING:
            if name in given and given[name] != saved.get(name, given[name]):
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} {given[name]} does not fit the saved model, which has {option} "
                    f"{saved[name]}; a resumed run keeps it"
                )
        return cls(**{**saved, **given})


# Of what is an extent of a tensor. No product of two of these overflows a count of bytes: tensors
# that are too large are an error about memory.
LARGEST_SIZE = 2**24

# What decides the shapes of the weights, or what they mean: a resumed run cannot change it.
SHAPING = ("vocab", "length", "symbols", "layers", "heads", "width", "block", "patch")


def seed_of(seed: int, number: int) -> int:
    """The seed of draw `number` of a run with `seed`."""
    return (seed * 1_000_003 + number) % 2**64


def check_seed(seed: int) -> None:
    """Raises ValueError for what `manual_seed` does not take."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must be from -2^63 to 2^64 - 1, got {seed}")


# Where a task's defaults differ from the table's.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "minigpt": {},
    "reverse": {"layers": 2, "width": 64, "batch": 64, "steps": 1500, "eval_batches": 8},
    "vit": {"batch": 64, "lr": 1e-3, "steps": 3000, "weight_decay": 0.05, "eval_batches": 16},
}


def default_config(task: str, **given: Any) -> TrainConfig:
    """The configuration of `task` with `given` options over its defaults."""
    return TrainConfig(task=task, **{**TASK_DEFAULTS[task], **given})


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr` at the last step; steps count from 0."""
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    span = max(1, config.steps - 1 - config.warmup)
    progress = min(1.0, (step - config.warmup) / span)
    return low + 0.5 * (config.lr - low) * (1 + math.cos(math.pi * progress))
