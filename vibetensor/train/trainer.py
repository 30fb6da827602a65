"""The training loop: steps, validations, checkpoints, and a clean stop on Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from typing import Any

import vibetensor.torch as torch
from vibetensor.examples.minigpt import configure_optimizers
from vibetensor.io.atomic import write_json
from vibetensor.torch import nn
from vibetensor.train.checkpoint import (
    brief,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside_later,
)
from vibetensor.train.config import TrainConfig, learning_rate
from vibetensor.train.metrics import Metrics
from vibetensor.train.progress import Progress, amount, duration
from vibetensor.train.tasks import TASKS
from vibetensor.viz.loss_curve import write_loss_curve


class StopRequest:
    """Set by the first SIGINT or SIGTERM, which the loop answers after its step; a second one
    interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _set(self, number: int, _: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        try:
            before = {n: signal.signal(n, self._set) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are someone else's
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Trainer:
    """Trains `config.task` in the folder `run`; with `checkpoint`, goes on from that step_N folder.

    Step n draws the batch of number n and everything random else from states that a checkpoint
    holds, so a resumed run takes exactly the steps the uninterrupted one would have taken.
    """

    def __init__(self, config: TrainConfig, run: str, checkpoint: str | None = None):
        try:
            torch.device(config.device)
        except RuntimeError as error:
            raise ValueError(f"--device {config.device}: {error}") from None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        self.run = run
        self.task = TASKS[config.task](config)
        self.model: nn.Module = self._build_model()
        self.optimizer = configure_optimizers(
            self.model, config.lr, config.weight_decay, (config.beta1, config.beta2), config.device
        )
        self.step = 0
        self.saved_step: int | None = None
        if checkpoint is not None:
            state = self._load(checkpoint)
            self.step = self.saved_step = state["step"]
            if state["cursor"] != {"next_batch": self.step}:
                raise ValueError(
                    f"{checkpoint}: the data cursor {state['cursor']} is not understood"
                )

    def _build_model(self) -> nn.Module:
        c = self.config
        try:
            model = self.task.build_model()
        except (RuntimeError, MemoryError) as error:
            why = str(error).partition("\n")[0]  # without a device's table of who holds what
            raise ValueError(
                f"no model of --layers {c.layers}, --width {c.width} can be made: {why}"
            ) from error
        try:
            return model.to(c.device)
        except RuntimeError as error:
            raise ValueError(f"the model cannot go to --device {c.device}: {error}") from error

    def _load(self, checkpoint: str) -> dict[str, Any]:
        saved = read_state(checkpoint)["config"].get("assets") or {}
        for name, what in (("vocabulary", "text"), ("shape", "images")):
            if name in saved and saved[name] != self.task.assets.get(name):
                raise ValueError(
                    f"the {what} of --data {self.config.data} give another {name} than those that "
                    f"'{checkpoint}' was trained on"
                )
        try:
            return load_checkpoint(checkpoint, self.model, self.optimizer)
        except RuntimeError as error:
            raise ValueError(
                f"'{checkpoint}' does not fit its own options: {brief(error)}"
            ) from error

    def train(self) -> int:
        """Runs to `config.steps` or until stopped. Returns the exit status: 0 when complete, 1 when
        the last save failed, 128 + signal number when stopped."""
        config = self.config
        os.makedirs(self.run, exist_ok=True)
        write_json(os.path.join(self.run, "config.json"), config.to_json())
        self.set_aside = set_aside_later(self.run, self.step)
        self.progress = Progress(self.step, config.steps, self.task.unit)
        self.metrics = Metrics(self.run, self.step, self.progress.line)
        with contextlib.closing(self.metrics):
            return self._train()

    def _train(self) -> int:
        config = self.config
        self._introduce()
        first = self.step
        started = time.monotonic()
        self.model.train()
        with StopRequest().listening() as stop:
            # A finished run, to be shown again, may have lost its metrics.
            if self.step == 0 or (
                self.step == config.steps and self._validated_step() != self.step
            ):
                self._evaluate()
            while self.step < config.steps and stop.signal is None:
                self._train_step()
                last = self.step == config.steps
                if last or self.step % config.eval_interval == 0:
                    self._evaluate()
                    self._draw_curve()
                if self.step % config.save_interval == 0 and not last:
                    self._save()
        stopped = stop.signal
        self._draw_curve()
        saved = self.saved_step == self.step or self._save()
        if stopped is not None and self.step < config.steps:
            since = "" if saved else " (from the last checkpoint that could be saved)"
            self.progress.line(
                f"stopped after step {self.step} of {config.steps}; to go on{since}:"
            )
            self.progress.line(
                f"    vibetensor train {config.task} --resume {shlex.quote(self.run)}"
            )
            return 128 + stopped
        done = f"{self.step - first} more steps, {self.step}" if first else f"{self.step} steps"
        self.progress.line(f"trained {done} in {duration(time.monotonic() - started)}")
        self._show()
        return 0 if saved else 1

    def _introduce(self) -> None:
        say = self.progress.line
        parameters = sum(p.numel() for p in self.model.parameters())
        config = self.config
        say(
            f"{config.task}: {amount(parameters)} parameters, {config.steps} steps of batch "
            f"{config.batch}, {config.dtype} on {config.device}, {torch.get_num_threads()} threads"
        )
        for line in self.task.describe():
            say(line)
        if self.step:
            say(f"resumed at step {self.step}")
        if self.set_aside:
            names = ", ".join(map(os.path.basename, self.set_aside))
            say(f"later checkpoints are no longer of this run: {names}")

    def _autocast(self) -> Any:
        if self.config.dtype == "fp32":
            return contextlib.nullcontext()
        device = self.config.device.partition(":")[0]
        return torch.autocast(device_type=device, dtype=torch.bfloat16)

    def _train_step(self) -> None:
        config, device = self.config, self.config.device
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, y = (part.to(device) for part in self.task.batch(self.step))
        with self._autocast():
            loss = self.task.loss(self.model, x, y)
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        self.step += 1
        self.progress.step(self.step, value, lr, self.task.units(x))
        self.metrics.write(
            self.step, loss=value, lr=lr, per_second=round(self.progress.units_per_second, 1)
        )

    def _diverged(self, what: str) -> ArithmeticError:
        advice = "" if self.config.dtype == "fp32" else " or --dtype fp32"
        return ArithmeticError(f"{what} at step {self.step}; try a lower --lr{advice}")

    def _evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            scores = self.task.evaluate(self.model)
        self.model.train()
        for name, value in scores.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} is {value}")
        self.metrics.write(self.step, **scores)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.progress.line(f"step {self.step}/{self.config.steps}  {shown}")
        self.progress.resume_clock()

    def _validated_step(self) -> float | None:
        """The step of the newest validation."""
        validations = self.metrics.series("val_loss")
        return validations[-1][0] if validations else None

    def _save(self) -> bool:
        """True if saved. A save that fails (disk full) does not end the run: the last good
        checkpoint is whole, and the next save may succeed. Raises ArithmeticError for weights that are
        not finite, in whose place an older checkpoint might go."""
        if not all(torch.isfinite(p).all().item() for p in self.model.parameters()):
            raise self._diverged("weights are not finite")
        try:
            path = save_checkpoint(
                self.run,
                self.step,
                self.model,
                self.optimizer,
                config={**self.config.to_json(), "assets": self.task.assets},
                cursor={"next_batch": self.step},
                keep=self.config.keep,
            )
        except OSError as error:
            self.progress.line(
                f"could not save a checkpoint: {error}; the last good one is untouched"
            )
            return False
        finally:
            self.progress.resume_clock()
        self.saved_step = self.step
        self.progress.line(f"saved {path}")
        return True

    def _draw_curve(self) -> None:
        path = os.path.join(self.run, "loss.svg")
        with contextlib.suppress(OSError):
            write_loss_curve(
                path,
                self.metrics.series("loss"),
                self.metrics.series("val_loss"),
                f"{self.config.task}: loss (nats)",
                self.task.baseline,
            )

    def _show(self) -> None:
        self.model.eval()
        with torch.no_grad():
            for line in self.task.showcase(self.model):
                self.progress.line(line)
        final = self.metrics.series("val_loss")[-1][1]
        text = f"validation loss {final:.4f}"
        if self.task.baseline:
            name, level = self.task.baseline
            text += f" ({name}: {level:.3f})"
        self.progress.line(text)
        saved = f", step_{self.step}/" if self.saved_step == self.step else ""
        self.progress.line(f"wrote {self.run}: loss.svg, metrics.jsonl{saved}")
