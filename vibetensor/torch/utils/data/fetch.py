"""Fetchers: from what a sampler gave to a collated batch. They run in workers and without them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from vibetensor.torch.utils.data.dataset import IterableDataset, fetch_many


class _MapFetcher:
    """Indexes a dataset."""

    def __init__(self, dataset: Any, batched: bool, collate_fn: Callable) -> None:
        self.dataset = dataset
        self.batched = batched
        self.collate_fn = collate_fn

    def fetch(self, indices: Any) -> Any:
        if self.batched:
            return self.collate_fn(fetch_many(self.dataset, indices))
        return self.collate_fn(self.dataset[indices])


class _StreamFetcher:
    """Takes as many samples from an iterator as it was given indices; StopIteration at its end."""

    def __init__(self, dataset: Any, batched: bool, collate_fn: Callable, drop_last: bool) -> None:
        self.iterator = iter(dataset)
        self.batched = batched
        self.collate_fn = collate_fn
        self.drop_last = drop_last

    def fetch(self, indices: Any) -> Any:
        if not self.batched:
            return self.collate_fn(next(self.iterator))
        samples = list(islice(self.iterator, len(indices)))
        if not samples or (self.drop_last and len(samples) < len(indices)):
            raise StopIteration
        return self.collate_fn(samples)


def make_fetcher(dataset: Any, batched: bool, collate_fn: Callable, drop_last: bool) -> Any:
    """The fetcher for a dataset; ``batched`` says that requests are lists of indices."""
    if isinstance(dataset, IterableDataset):
        return _StreamFetcher(dataset, batched, collate_fn, drop_last)
    return _MapFetcher(dataset, batched, collate_fn)
