"""The worker processes of one loader: started, fed, listened to, and always put away."""

from __future__ import annotations

import os
import signal
import time
import weakref
from typing import Any

from vibetensor.torch.utils.data.channel import Channel

# How long a worker may take to leave by itself before it is terminated.
GRACE_SECONDS = 2.0

# The loader's ends of all channels. A forked worker inherits copies of them and must close those:
# as long as any copy is open, no worker can see that the loader is gone.
_loader_ends: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_inherited_ends() -> None:
    """In a new worker: closes the loader's ends that fork copied."""
    for connection in list(_loader_ends):
        connection.close()
    _loader_ends.clear()


class WorkerProcesses:
    """Worker processes with one channel each.

    Nothing is shared between workers, so that one that is killed while it sends cannot block
    the others, and its end shows at once as the end of its channel. ``close`` runs when the
    object is collected or the interpreter exits, at the latest.
    """

    def __init__(self, context: Any, setups: list[Any]) -> None:
        from vibetensor.torch.utils.data.worker import worker_main

        self.processes: list[Any] = []
        self.channels: list[Channel] = []
        self._close = weakref.finalize(self, _stop, os.getpid(), self.processes, self.channels)
        by_fork = context.get_start_method() == "fork"
        for setup in setups:
            ours, theirs = context.Pipe(duplex=True)
            _loader_ends.add(ours)
            process = context.Process(
                target=worker_main, args=(theirs, setup if by_fork else None), daemon=True
            )
            try:
                _start_without_interrupts(process)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            self.processes.append(process)
            self.channels.append(Channel(ours))
            if not by_fork:
                self.channels[-1].send(setup)

    def __len__(self) -> int:
        return len(self.processes)

    def send(self, worker: int, message: Any) -> None:
        """Sends to a worker; RuntimeError when it has died."""
        try:
            self.channels[worker].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(worker) from None

    def is_writable(self, worker: int) -> bool:
        """Whether a small message to the worker would be taken without waiting for it."""
        import select

        poller = select.poll()
        poller.register(self.channels[worker].fileno(), select.POLLOUT)
        return bool(poller.poll(0))

    def receive(self, workers: list[int], timeout: float | None) -> list[tuple[int, Any]]:
        """Waits for the given workers; messages of those that have one, or [] at the timeout.

        Raises RuntimeError that names a worker that has died.
        """
        from multiprocessing.connection import wait

        by_connection = {self.channels[w].connection: w for w in workers}
        messages = []
        for connection in wait(list(by_connection), timeout):
            worker = by_connection[connection]
            try:
                messages.append((worker, self.channels[worker].receive()))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise self._death(worker) from None
        return messages

    def _death(self, worker: int) -> RuntimeError:
        process = self.processes[worker]
        process.join(timeout=1.0)
        code = process.exitcode
        how = "exited unexpectedly"
        if code is not None and code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            how = f"is killed by {name}"
        elif code is not None:
            how = f"exited unexpectedly with exit code {code}"
        return RuntimeError(f"DataLoader worker {worker} (pid {process.pid}) {how}")

    def close(self) -> None:
        """Ends the workers; those that do not leave in time are terminated. May be repeated."""
        self._close()


def _start_without_interrupts(process: Any) -> None:
    """Starts a process with Ctrl-C blocked, until the worker has chosen to ignore it."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _stop(owner_pid: int, processes: list[Any], channels: list[Channel]) -> None:
    if os.getpid() != owner_pid:
        return  # a forked copy of the loader: not its children
    for channel in channels:
        channel.close()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in late:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    for process in processes:
        process.close()
    processes.clear()
    channels.clear()
