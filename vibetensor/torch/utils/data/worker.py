"""What a worker process does: set itself up, then fetch batches until the loader is gone."""

from __future__ import annotations

import os
import sys
from typing import Any

import vibetensor.torch as torch
from vibetensor.torch.utils.data.dataset import IterableDataset
from vibetensor.torch.utils.data.fetch import make_fetcher

_worker_info: WorkerInfo | None = None


class WorkerInfo:
    """``id``, ``num_workers``, ``seed`` of this worker and its copy of the ``dataset``."""

    def __init__(self, id: int, num_workers: int, seed: int, dataset: Any) -> None:
        self.id = id
        self.num_workers = num_workers
        self.seed = seed
        self.dataset = dataset

    def __repr__(self) -> str:
        items = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"WorkerInfo({items})"


def get_worker_info() -> WorkerInfo | None:
    """The :class:`WorkerInfo` of the worker process that calls it; None in the main process."""
    return _worker_info


class WorkerSetup:
    """What a worker needs to know before its first batch."""

    def __init__(
        self,
        worker_id: int,
        num_workers: int,
        base_seed: int,
        dataset: Any,
        fetcher: tuple[Any, ...],
        init_fn: Any,
    ) -> None:
        self.worker_id = worker_id
        self.num_workers = num_workers
        self.base_seed = base_seed
        self.dataset = dataset
        self.fetcher = fetcher
        self.init_fn = init_fn


class IterationEnd:
    """Sent by a worker whose share of an iterable dataset is used up."""


class Restart:
    """Sent to a persistent worker before a new pass over the dataset."""


class WorkerError:
    """An exception of a worker, as it will be raised again by the loader.

    Keeps the type and the formatted traceback, not the traceback itself: its frames would keep
    the batch alive, and could not be sent.
    """

    def __init__(self, error: BaseException, where: str) -> None:
        import pickle
        import traceback

        self.where = where
        self.text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.kind: Any = type(error)
        try:
            pickle.dumps(self.kind)
        except Exception:  # a class made inside a function has no name to be sent by
            self.kind = RuntimeError

    def reraise(self) -> None:
        """Raises the type of the worker's exception with its traceback in the message."""
        message = f"Caught {self.kind.__name__} {self.where}.\nOriginal {self.text}"
        if self.kind is KeyError:
            message = _PlainRepr(message)
        try:
            error = self.kind(message)
        except Exception:  # its constructor wants other arguments
            raise RuntimeError(message) from None
        raise error


class _PlainRepr(str):
    """KeyError shows the repr of its message, in which a traceback would lose its lines."""

    def __repr__(self) -> str:
        return str(self)


def numpy_seed(base_seed: int, worker_id: int) -> list[int]:
    """The four 32-bit words that seed NumPy in a worker: a SeedSequence's, as in torch.

    Melissa O'Neill's seed_seq (pcg-random.org) over ``[worker_id, low, high, 0]``, written out
    so that seeding needs no NumPy of any version.
    """
    mask = 0xFFFFFFFF
    entropy = [worker_id & mask, base_seed & mask, (base_seed >> 32) & mask, 0]
    hash_const = 0x43B0D7E5

    def mixed_in(value: int) -> int:
        nonlocal hash_const
        value = (value ^ hash_const) & mask
        hash_const = (hash_const * 0x931E8875) & mask
        value = (value * hash_const) & mask
        return value ^ (value >> 16)

    def mix(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & mask
        return value ^ (value >> 16)

    pool = [mixed_in(word) for word in entropy]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mix(pool[target], mixed_in(pool[source]))

    state = []
    hash_const = 0x8B51F9DD
    for word in pool:
        word = (word ^ hash_const) & mask
        hash_const = (hash_const * 0x58F38DED) & mask
        word = (word * hash_const) & mask
        state.append(word ^ (word >> 16))
    return state


class _NumpySeeding:
    """Seeds NumPy's global generator once it is there; datasets may import it late."""

    def __init__(self, base_seed: int, worker_id: int) -> None:
        self._words: list[int] | None = numpy_seed(base_seed, worker_id)

    def apply(self) -> None:
        numpy = sys.modules.get("numpy")
        if self._words is not None and numpy is not None and hasattr(numpy, "random"):
            numpy.random.seed(self._words)
            self._words = None


def _parent_is_alive(parent_pid: int) -> bool:
    import multiprocessing

    parent = multiprocessing.parent_process()
    return os.getppid() == parent_pid and (parent is None or parent.is_alive())


def worker_main(connection: Any, setup: WorkerSetup | None) -> None:
    """The body of a worker process. ``setup`` comes over the channel where fork did not bring it.

    Leaves when the loader closes its end, or died.
    """
    import random
    import signal
    from multiprocessing.connection import wait

    from vibetensor.torch.utils.data import loader_processes
    from vibetensor.torch.utils.data.channel import Channel

    global _worker_info
    # Ctrl-C reaches the whole process group; the loader decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    loader_processes.forget_inherited_ends()
    parent_pid = os.getppid()
    channel = Channel(connection)
    try:
        if setup is None:
            setup = channel.receive()
        assert setup is not None
        where = f"in DataLoader worker process {setup.worker_id}"
        seed = setup.base_seed + setup.worker_id
        torch.set_num_threads(1)
        torch.set_default_device(None)  # a fork inherits it, but cannot use the device
        random.seed(seed)
        torch.manual_seed(seed)
        numpy_seeding = _NumpySeeding(setup.base_seed, setup.worker_id)
        numpy_seeding.apply()
        _worker_info = WorkerInfo(setup.worker_id, setup.num_workers, seed, setup.dataset)

        fetcher: Any = None
        failure: WorkerError | None = None
        try:
            if setup.init_fn is not None:
                setup.init_fn(setup.worker_id)
            numpy_seeding.apply()
            fetcher = make_fetcher(setup.dataset, *setup.fetcher)
        except Exception as error:
            failure = WorkerError(error, where)
        ended = False

        while True:
            while not wait([connection], timeout=5.0):
                if not _parent_is_alive(parent_pid):
                    return
            task = channel.receive()
            if task is None:
                return
            if isinstance(task, Restart):
                ended = False
                try:
                    fetcher = make_fetcher(setup.dataset, *setup.fetcher)
                except Exception as error:
                    failure = WorkerError(error, where)
                channel.send((None, task))
                continue
            index, request = task
            result: Any
            if failure is not None:
                result, failure = failure, None
            elif ended or fetcher is None:
                result = IterationEnd()
            else:
                try:
                    result = fetcher.fetch(request)
                except StopIteration as error:
                    if isinstance(setup.dataset, IterableDataset):
                        result, ended = IterationEnd(), True
                    else:
                        result = WorkerError(error, where)
                except Exception as error:
                    result = WorkerError(error, where)
            numpy_seeding.apply()
            try:
                channel.send((index, result))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # the batch cannot be pickled, or memory is out
                channel.send((index, WorkerError(error, where)))
            del result, request, task
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        channel.close()
