"""Passes over a loader: in this process, or through workers that fetch ahead."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch import _recording
from vibetensor.torch.utils.data.fetch import make_fetcher
from vibetensor.torch.utils.data.loader_processes import WorkerProcesses
from vibetensor.torch.utils.data.pin_memory import pin_memory
from vibetensor.torch.utils.data.sampler import draw_seed
from vibetensor.torch.utils.data.worker import IterationEnd, Restart, WorkerError, WorkerSetup


def _wants_pinning(loader: Any) -> bool:
    if not loader.pin_memory:
        return False
    if torch.cuda.is_available():
        return True
    warnings.warn(
        "'pin_memory' argument is set as true but no accelerator is found, then device pinned "
        "memory won't be used.",
        stacklevel=3,
    )
    return False


def _refuse_recordings() -> None:
    if _recording.recording() is not None:
        raise RuntimeError(
            "a batch of a DataLoader cannot be taken inside a captured function: every replay would "
            "have the same one. Take it outside, and pass it as an argument"
        )


class _Pass:
    """What both kinds share: the sampler's iterator and the seed."""

    def __init__(self, loader: Any) -> None:
        # A copy of the options: a persistent loader holds its iterator, and a cycle would leave
        # the workers to the garbage collector.
        self._loader = copy.copy(loader)
        self._loader._iterator = None
        self._pin = _wants_pinning(loader)
        self._begin()

    def _begin(self) -> None:
        self._requests: Iterator[Any] = iter(self._loader._index_sampler)
        self._base_seed = draw_seed(self._loader.generator)

    def __iter__(self) -> Any:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def _deliver(self, data: Any) -> Any:
        return pin_memory(data) if self._pin else data


class SingleProcessIterator(_Pass):
    """Fetches each batch when it is asked for."""

    def _begin(self) -> None:
        super()._begin()
        self._fetcher = make_fetcher(self._loader.dataset, *self._loader._fetcher_options)

    def __next__(self) -> Any:
        _refuse_recordings()
        return self._deliver(self._fetcher.fetch(next(self._requests)))


class WorkerIterator(_Pass):
    """Keeps ``prefetch_factor`` requests out with each worker and hands batches over in order.

    Requests are numbered and go to the workers in turn; answers that arrive early wait. With
    ``in_order=False`` they are handed over as they come.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        setups = [
            WorkerSetup(
                worker_id,
                loader.num_workers,
                self._base_seed,
                loader.dataset,
                loader._fetcher_options,
                loader.worker_init_fn,
            )
            for worker_id in range(loader.num_workers)
        ]
        self._workers = WorkerProcesses(loader._process_context(), setups)
        self._prime()

    def _begin(self) -> None:
        super()._begin()
        workers = range(self._loader.num_workers)
        self._sent = 0  # number of the next request
        self._owner: dict[int, int] = {}  # request -> worker, until its batch is handed over
        self._outstanding = [0] * len(workers)  # requests not yet answered, by worker
        self._results: dict[int, Any] = {}  # answers that are not handed over yet, as they came
        self._active = list(workers)  # those whose share of the data is not used up
        self._turn = 0
        self._exhausted = False  # the sampler has no more requests
        self._finished = False

    def _prime(self) -> None:
        for _ in range(self._loader.prefetch_factor * len(self._workers)):
            self._send_request()

    @property
    def has_workers(self) -> bool:
        """Whether the worker processes are still there for another pass."""
        return len(self._workers) > 0

    def restart(self) -> None:
        """Begins another pass with the same (persistent) workers."""
        self._exhausted = True  # nothing more of the old pass
        waiting = set(range(len(self._workers)))
        try:
            for worker in waiting:
                self._send(worker, Restart())
            while waiting:  # answers of an abandoned pass come first
                for worker, (_, answer) in self._workers.receive(sorted(waiting), None):
                    if isinstance(answer, Restart):
                        waiting.discard(worker)
            self._begin()
            self._prime()
        except BaseException:  # Ctrl-C, a dead worker: the next pass has new ones
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers."""
        self._finished = True
        self._results.clear()
        self._workers.close()

    def __next__(self) -> Any:
        _refuse_recordings()
        if self._finished:
            raise StopIteration
        try:
            result = self._next_result()
            self._send_request()
        except BaseException as error:
            # A dead worker, Ctrl-C, the end: only at the end do persistent workers stay.
            self._finished = True
            if not (isinstance(error, StopIteration) and self._loader.persistent_workers):
                self.close()
            raise
        if isinstance(result, WorkerError):
            result.reraise()  # this batch is lost; the pass may go on
        return self._deliver(result)

    def _next_result(self) -> Any:
        while True:
            while self._owner:
                first = self._owner if self._loader.in_order else self._results
                number = next(iter(first), None)  # the oldest request, or the oldest answer
                if number is None or number not in self._results:
                    self._receive()
                    continue
                del self._owner[number]
                result = self._results.pop(number)
                if not isinstance(result, IterationEnd):
                    return result
            self._send_request()
            if not self._owner:
                raise StopIteration

    def _receive(self) -> None:
        """Takes in at least one message."""
        busy = [worker for worker, count in enumerate(self._outstanding) if count]
        started = time.monotonic()
        messages = self._workers.receive(busy, self._loader.timeout or None)
        if not messages:
            waited = time.monotonic() - started
            raise RuntimeError(f"DataLoader timed out after {waited:.1f} seconds")
        for worker, (number, result) in messages:
            self._outstanding[worker] -= 1
            self._results[number] = result
            if isinstance(result, IterationEnd) and worker in self._active:
                self._active.remove(worker)
                self._send_request()  # the others take over its turns

    def _send_request(self) -> None:
        """Sends the next request to the next active worker that has room for it."""
        worker = None if self._exhausted else self._next_worker()
        if worker is None:
            return
        try:
            request = next(self._requests)
        except StopIteration:
            self._exhausted = True
            return
        number = self._sent
        self._sent += 1
        self._owner[number] = worker
        self._send(worker, (number, request))
        self._outstanding[worker] += 1

    def _send(self, worker: int, message: Any) -> None:
        # A worker that waits for us to take its answer must not wait while we wait for it.
        while self._outstanding[worker] and not self._workers.is_writable(worker):
            self._receive()
        self._workers.send(worker, message)

    def _next_worker(self) -> int | None:
        held = [0] * len(self._workers)
        for worker in self._owner.values():
            held[worker] += 1
        for step in range(len(held)):
            worker = (self._turn + step) % len(held)
            if worker in self._active and held[worker] < self._loader.prefetch_factor:
                self._turn = (worker + 1) % len(held)
                return worker
        return None
