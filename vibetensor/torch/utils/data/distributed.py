"""Splitting a dataset among the processes of a distributed run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch.utils.data.sampler import Sampler


class DistributedSampler(Sampler):
    """Every ``num_replicas``-th index, from ``rank`` on, of an order that all ranks share.

    The order is shuffled from ``seed + epoch``: call ``set_epoch`` before each epoch. All ranks
    get equally many indices: the first ones again fill up the last round, or with ``drop_last``
    the tail is dropped. ``num_replicas`` and ``rank`` default to the process group's.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if num_replicas is None or rank is None:
            distributed: Any = getattr(torch, "distributed", None)
            if distributed is None or not distributed.is_initialized():
                raise RuntimeError(
                    "DistributedSampler needs a process group: initialise one, or give "
                    "num_replicas and rank"
                )
            num_replicas = distributed.get_world_size() if num_replicas is None else num_replicas
            rank = distributed.get_rank() if rank is None else rank
        assert num_replicas is not None and rank is not None
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"Invalid rank {rank}, rank should be in the interval [0, {num_replicas - 1}]"
            )
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.seed = seed
        n = len(dataset)
        rounded_down = drop_last and n % num_replicas != 0
        self.num_samples = n // num_replicas if rounded_down else math.ceil(n / num_replicas)
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            order = torch.randperm(n, generator=generator, device="cpu").tolist()
        else:
            order = list(range(n))
        if not self.drop_last and order:
            order *= math.ceil(self.total_size / n)
        order = order[: self.total_size]
        return iter(order[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, so that each one has another order."""
        self.epoch = epoch
