"""What can be trained by name: each task makes its model and batches, scores it, and shows off."""

from __future__ import annotations

from typing import Any

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor.examples import reverse
from vibetensor.examples.minigpt import GPT, GPTConfig
from vibetensor.examples.vit import ViT, ViTConfig
from vibetensor.train.config import TrainConfig, seed_of
from vibetensor.train.image_data import (
    ImageBatches,
    Images,
    channel_statistics,
    load_images,
    normalised,
)
from vibetensor.train.text_data import (
    TextBatches,
    Vocabulary,
    read_text,
    token_tensor,
    unigram_entropy,
)


class Task:
    """The trainer's view of a task. `assets` is what a checkpoint must hold beside weights for the
    model to be used without the data (a vocabulary, say)."""

    unit = "tok"  # what speed is counted in
    baseline: tuple[str, float] | None = None  # a loss to compare with, for the picture
    assets: dict[str, Any] = {}

    def __init__(self, config: TrainConfig):
        self.config = config

    def describe(self) -> list[str]:
        """Lines to print before training."""
        return []

    def build_model(self) -> Any:
        raise NotImplementedError

    def batch(self, number: int) -> tuple[Any, Any]:
        """Training batch `number`; a function of the seed and the number alone."""
        raise NotImplementedError

    def units(self, x: Any) -> int:
        return x.numel()

    def loss(self, model: Any, x: Any, y: Any) -> Any:
        return model(x, y)[1]

    def evaluate(self, model: Any) -> dict[str, float]:
        """At least val_loss. The model is in eval mode and no graph is recorded."""
        raise NotImplementedError

    def showcase(self, model: Any) -> list[str]:
        """Lines that end a run: a sample of what was learned."""
        return []

    def mean_loss(self, model: Any, batches: Any) -> float:
        device = self.config.device
        losses = []
        for number in range(self.config.eval_batches):
            x, y = (part.to(device) for part in batches(number))
            losses.append(self.loss(model, x, y).item())
        return sum(losses) / len(losses)


class MiniGPT(Task):
    def __init__(self, config: TrainConfig):
        super().__init__(config)
        train, held_out, self._source = read_text(config.data)
        self.vocabulary = Vocabulary.of(config.vocab, train)
        self.assets = {"vocabulary": self.vocabulary.to_json()}
        train_tokens = self.vocabulary.encode(train)
        held_out_tokens = self.vocabulary.encode(held_out)
        self._sizes = len(train_tokens), len(held_out_tokens)
        self._entropy = unigram_entropy(held_out_tokens)
        self.baseline = ("unigram entropy", self._entropy)
        shape = (config.block, config.batch)
        self._train = TextBatches(token_tensor(train_tokens), *shape, config.seed)
        self._held_out = TextBatches(token_tensor(held_out_tokens), *shape, config.seed + 1)

    def describe(self) -> list[str]:
        return [
            f"text: {self._source}; {self._sizes[0]:,} {self.config.vocab} tokens to train on, "
            f"{self._sizes[1]:,} for validation, vocabulary {len(self.vocabulary)}",
            f"unigram entropy of the validation text: {self._entropy:.3f} nats",
        ]

    def build_model(self) -> GPT:
        return build_gpt(self.config, self.assets)

    def batch(self, number: int) -> tuple[Any, Any]:
        return self._train(number)

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"val_loss": self.mean_loss(model, self._held_out)}

    def showcase(self, model: Any) -> list[str]:
        text = sample_text(model, self.vocabulary, "\nclass ", 300, 0.8, 40, self.config.seed)
        return ["sample:", text.strip("\n")]


def build_gpt(config: TrainConfig, assets: dict[str, Any]) -> GPT:
    size = len(Vocabulary(**assets["vocabulary"]))
    return GPT(
        GPTConfig(size, config.block, config.layers, config.heads, config.width, config.dropout)
    )


def sample_text(
    model: GPT,
    vocabulary: Vocabulary,
    prompt: str,
    count: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> str:
    """`prompt` continued by `count` tokens."""
    device = next(model.parameters()).device
    numbers = list(vocabulary.encode(prompt or "\n"))
    tokens = torch.tensor([numbers], dtype=torch.int64, device=device)
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    model.eval()
    return vocabulary.decode(
        model.generate(tokens, count, temperature, top_k, generator)[0].tolist()
    )


class Reverse(Task):
    def build_model(self) -> GPT:
        c = self.config
        return reverse.build_model(c.length, c.symbols, c.layers, c.heads, c.width)

    def describe(self) -> list[str]:
        return [f"task: reverse {self.config.length} symbols out of {self.config.symbols}"]

    def _generator(self, number: int) -> Any:
        generator = torch.Generator()
        generator.manual_seed(seed_of(self.config.seed, number))
        return generator

    def _sequences(self, count: int, number: int) -> Any:
        c = self.config
        generator = self._generator(number)
        return torch.randint(c.symbols, (count, c.length), generator=generator, device="cpu")

    def batch(self, number: int) -> tuple[Any, Any]:
        c = self.config
        return reverse.make_batch(c.batch, c.length, c.symbols, self._generator(number))

    def evaluate(self, model: Any) -> dict[str, float]:
        # Numbers that no training run reaches: the sequences are new to the model.
        loss = self.mean_loss(model, lambda number: self.batch(2**40 + number))
        c = self.config
        sequence = self._sequences(64, 2**41)
        answer = reverse.solve(model, sequence.to(c.device)).cpu()
        exact = (answer == sequence.flip(1)).all(dim=1).float().mean().item()
        return {"val_loss": loss, "accuracy": exact}

    def showcase(self, model: Any) -> list[str]:
        c = self.config
        sequence = self._sequences(3, 2**42)
        answers = reverse.solve(model, sequence.to(c.device)).tolist()
        return [f"{s} -> {a}" for s, a in zip(sequence.tolist(), answers)]


class VisionTransformer(Task):
    unit = "img"

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._train_images, self._test_images, self._format = load_images(config.data)
        mean, deviation = channel_statistics(self._train_images)
        self.assets = {
            "shape": list(self._train_images.pixels.shape[1:]),
            "mean": mean,
            "deviation": deviation,
        }
        self._mean, self._deviation = (
            torch.tensor(v, device="cpu").view(-1, 1, 1) for v in (mean, deviation)
        )
        mirror = self._format == "CIFAR-10"
        self._train = ImageBatches(
            self._train_images, config.batch, config.seed, self._mean, self._deviation, mirror
        )

    def describe(self) -> list[str]:
        train, test = self._train_images.pixels, self._test_images.pixels
        return [
            f"images: {self._format} from {self.config.data}; {len(train):,} to train on, "
            f"{len(test):,} for validation, shape {list(train.shape[1:])}"
        ]

    def build_model(self) -> ViT:
        channels, height, width = self.assets["shape"]
        if height != width:
            raise ValueError(f"vit needs square images, got {height}×{width}")
        c = self.config
        return ViT(ViTConfig(height, channels, 10, c.patch, c.layers, c.heads, c.width, c.dropout))

    def batch(self, number: int) -> tuple[Any, Any]:
        return self._train(number)

    def units(self, x: Any) -> int:
        return x.size(0)

    def loss(self, model: Any, x: Any, y: Any) -> Any:
        return F.cross_entropy(model(x), y)

    def evaluate(self, model: Any) -> dict[str, float]:
        device, batch = self.config.device, 250
        images: Images = self._test_images
        count = min(len(images.labels), self.config.eval_batches * batch)
        loss, right = 0.0, 0
        for begin in range(0, count, batch):
            chosen = slice(begin, min(begin + batch, count))
            x = normalised(images.pixels[chosen], self._mean, self._deviation).to(device)
            y = images.labels[chosen].to(device)
            logits = model(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            right += (logits.argmax(dim=1) == y).sum().item()
        return {"val_loss": loss / count, "accuracy": right / count}


TASKS: dict[str, type[Task]] = {"minigpt": MiniGPT, "reverse": Reverse, "vit": VisionTransformer}
