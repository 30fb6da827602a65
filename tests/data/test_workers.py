"""Loading through worker processes: order, shared memory, seeds, errors, and no one left behind."""

import contextlib
import errno
import gc
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import textwrap
import time

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.torch.utils import data
from vibetensor.torch.utils.data.worker import numpy_seed


class Squares(data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i, vt.full((3,), float(i * i)), np.full(2, i, np.int16), f"item {i}"


class Shared(data.IterableDataset):
    """Each worker's share of a range."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        info = data.get_worker_info()
        if info is None:
            return iter(range(self.n))
        return iter(range(info.id, self.n, info.num_workers))


class Calls(data.Dataset):
    """Samples are what a function gives for the index."""

    def __init__(self, n, fn):
        self.n, self.fn = n, fn

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.fn(i)


def no_children(seconds=5.0):
    deadline = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not multiprocessing.active_children()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """After each test: no worker, no open descriptor, no mapped segment."""

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def segments():
        with open("/proc/self/maps") as maps:
            return sum("memfd:vibetensor" in line for line in maps)

    gc.collect()
    before = descriptors()
    yield
    gc.collect()
    assert no_children()
    assert descriptors() <= before
    assert segments() == 0


def plain(batch):
    numbers, squares, arrays, names = batch
    return numbers.tolist(), squares.tolist(), arrays.tolist(), list(names)


@pytest.mark.parametrize("workers,prefetch", [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_same_batches_as_without_workers(workers, prefetch, batch_size):
    options = {"batch_size": batch_size}
    expected = [plain(b) for b in data.DataLoader(Squares(13), **options)]
    loader = data.DataLoader(Squares(13), num_workers=workers, prefetch_factor=prefetch, **options)
    for _ in range(2):
        assert [plain(b) for b in loader] == expected
    assert no_children(1.0)


def test_without_batching():
    loader = data.DataLoader(Squares(3), batch_size=None, num_workers=2)
    assert [sample[0] for sample in loader] == [0, 1, 2]


DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]


def tensors_of_every_kind(i):
    base = vt.arange(12).reshape(3, 4)
    return (
        [base.to(getattr(vt, name)) for name in DTYPES],
        base.t(),
        base[:, ::2],
        vt.zeros(0, 3),
        vt.tensor(7.0),
        vt.ones(2, requires_grad=True),
        vt.ones(200, 200, dtype=vt.bfloat16),
    )


@pytest.mark.parametrize("repeat", [1, 50])
def test_every_dtype_and_layout(repeat):
    """Once through the socket and, repeated, through shared memory."""
    dataset = Calls(2, tensors_of_every_kind)
    loader = data.DataLoader(
        dataset, batch_size=repeat, sampler=[0] * repeat, num_workers=1, collate_fn=list
    )
    for sample in next(iter(loader)):
        kinds, transposed, strided, empty, scalar, leaf, large = sample
        assert [str(k.dtype) for k in kinds] == [f"torch.{name}" for name in DTYPES]
        base = np.arange(12).reshape(3, 4)
        assert all(k.to(vt.int64).tolist() == base.tolist() for k in kinds[1:])
        assert kinds[0].tolist() == base.astype(bool).tolist()
        assert transposed.tolist() == base.T.tolist()
        assert strided.tolist() == base[:, ::2].tolist()
        assert tuple(empty.shape) == (0, 3)
        assert scalar.item() == 7.0
        assert leaf.requires_grad
        assert large.dtype == vt.bfloat16
        assert large.float().sum().item() == 40000.0


def test_batches_are_writable_and_stay_valid():
    kept = [b[1] for b in data.DataLoader(Squares(8), batch_size=2, num_workers=2)]
    large = list(data.DataLoader(Calls(4, lambda i: vt.full((5000,), i)), num_workers=2))
    gc.collect()
    for i, batch in enumerate(kept):
        batch += 1
        assert batch[0, 0].item() == (2 * i) ** 2 + 1
    assert [b[0, -1].item() for b in large] == [0, 1, 2, 3]
    large[0].add_(5)
    assert large[0][0, 0].item() == 5


def large(i):
    return vt.full((5000,), float(i))


def test_batches_that_are_kept_hold_no_descriptors():
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, highest))
    try:
        kept = list(data.DataLoader(Calls(60, large), num_workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest))
    assert [batch[0, -1].item() for batch in kept] == list(range(60))


def test_no_descriptor_left_is_said():
    batches = iter(data.DataLoader(Calls(20, large), num_workers=1))
    next(batches)
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 5, highest))
    try:
        with contextlib.suppress(OSError):
            while True:
                files.append(open(os.devnull))  # noqa: SIM115
        with pytest.raises(OSError, match="files open that it may have: .*RLIMIT_NOFILE") as error:
            list(batches)
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest))
    assert error.value.errno == errno.EMFILE


def test_a_tensor_sent_twice_is_one_tensor():
    def twice(i):
        t = vt.full((2,), float(i))
        return [t, t]

    loader = data.DataLoader(
        Calls(1, twice), batch_size=None, num_workers=1, collate_fn=lambda x: x
    )
    a, b = next(iter(loader))
    assert a.tolist() == b.tolist() == [0.0, 0.0]


class Columns(dict):
    """Its tensors are made as they are asked for, and gone after that."""

    def items(self):
        return ((key, vt.full((3,), value)) for key, value in super().items())


def test_tensors_that_live_no_longer_than_their_turn():
    columns = {letter: number for number, letter in enumerate("abcdefgh")}
    loader = data.DataLoader(
        Calls(1, lambda i: Columns(columns)),
        batch_size=None,
        num_workers=1,
        collate_fn=lambda x: x,
    )
    batch = dict.items(next(iter(loader)))
    assert {key: t.tolist() for key, t in batch} == {k: [v] * 3 for k, v in columns.items()}


def test_large_arrays_and_objects():
    def sample(i):
        return np.full(100_000, i, np.float64), {"text": "x" * 100_000, "id": i}

    loader = data.DataLoader(Calls(6, sample), batch_size=2, num_workers=2, collate_fn=list)
    for number, batch in enumerate(loader):
        for offset, (array, info) in enumerate(batch):
            assert array[0] == array[-1] == number * 2 + offset == info["id"]
            assert len(info["text"]) == 100_000
            array[0] = -1  # writable


def test_many_requests_ahead_do_not_block():
    """More requests and answers than the sockets hold, in both directions at once."""
    sampler = [[0] * 1000 for _ in range(700)]
    loader = data.DataLoader(
        Calls(1, lambda i: "y" * 10),
        batch_sampler=sampler, num_workers=1, prefetch_factor=600, collate_fn=list,
    )  # fmt: skip
    assert sum(len(batch) for batch in loader) == 700_000


def test_streams_are_shared_out():
    batches = [b.tolist() for b in data.DataLoader(Shared(10), batch_size=2, num_workers=3)]
    assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert batches[:3] == [[0, 3], [1, 4], [2, 5]]
    dropped = data.DataLoader(Shared(10), batch_size=2, num_workers=3, drop_last=True)
    assert sum(len(b) for b in dropped) == 8


def test_out_of_order():
    def slow_first(i):
        time.sleep(0.3 if i == 0 else 0.0)
        return i

    options = {"batch_size": None, "num_workers": 2}
    in_order = list(data.DataLoader(Calls(6, slow_first), **options))
    as_they_come = list(data.DataLoader(Calls(6, slow_first), in_order=False, **options))
    assert in_order == sorted(as_they_come) == list(range(6))
    assert as_they_come[0] != 0


def test_persistent_workers_are_the_same_processes():
    loader = data.DataLoader(
        Calls(4, lambda i: os.getpid()), batch_size=None, num_workers=2, persistent_workers=True
    )
    first, second = set(loader), set(loader)
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first
    for _ in loader:  # an abandoned pass, then a full one
        break
    assert set(loader) == first
    assert len(list(loader)) == 4
    del loader
    assert no_children()


def test_a_restart_that_is_interrupted_has_new_workers():
    loader = data.DataLoader(
        Calls(4, lambda i: time.sleep(0.3) or i), num_workers=2, persistent_workers=True
    )
    for _ in loader:
        break

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            iter(loader)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for _ in range(2):
        assert [batch.item() for batch in loader] == [0, 1, 2, 3]
    del loader


def test_stop_iteration_of_a_dataset_that_is_no_stream():
    """It is an error of that batch, which ends a `for` loop there, and not its worker's end."""

    def stop(i):
        if i == 3:
            raise StopIteration
        return i

    for workers in (0, 1, 2):
        loader = data.DataLoader(Calls(10, stop), 2, num_workers=workers)
        assert [batch.tolist() for batch in loader] == [[0, 1]]


def test_persistent_workers_restart_streams():
    loader = data.DataLoader(Shared(5), batch_size=None, num_workers=2, persistent_workers=True)
    for _ in range(3):
        assert sorted(loader) == list(range(5))


# Seeds


def draws(i):
    info = data.get_worker_info()
    return info.id, info.seed, random.random(), vt.rand(1).item(), float(np.random.rand())


def test_workers_are_seeded_apart_and_repeatably():
    def run(seed):
        generator = vt.Generator()
        generator.manual_seed(seed)
        loader = data.DataLoader(
            Calls(8, draws), batch_size=None, num_workers=2, generator=generator
        )
        return list(loader)

    first = run(1)
    assert first == run(1)
    assert first != run(2)
    base = first[0][1]
    assert [d[0] for d in first] == [0, 1] * 4
    assert {d[1] for d in first} == {base, base + 1}
    assert (
        len({d[2] for d in first}) == len({d[3] for d in first}) == len({d[4] for d in first}) == 8
    )


def test_default_seed_comes_from_manual_seed():
    def run():
        return list(data.DataLoader(Calls(2, draws), batch_size=None, num_workers=1))

    vt.manual_seed(7)
    first, second = run(), run()
    vt.manual_seed(7)
    assert [run(), run()] == [first, second]
    assert first != second


def test_numpy_seed_is_torchs():
    worker = pytest.importorskip("torch.utils.data._utils.worker")
    for base_seed, worker_id in ((0, 0), (12345678901234567, 3), (2**63 - 1, 100)):
        assert numpy_seed(base_seed, worker_id) == worker._generate_state(base_seed, worker_id)


def test_worker_init_and_info():
    def init(worker_id):
        data.get_worker_info().dataset.offset = 100 * worker_id

    class Offset(data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return i + self.offset

    loader = data.DataLoader(Offset(), batch_size=None, num_workers=2, worker_init_fn=init)
    assert list(loader) == [0, 101, 2, 103]
    assert data.get_worker_info() is None


# Errors


class Custom(Exception):
    def __init__(self, first, second):
        super().__init__(first, second)


class Named(Exception):
    pass


def failing(kind):
    def fn(i):
        if i == 3:
            raise {
                "value": ValueError("bad sample"),
                "key": KeyError("missing"),
                "named": Named("own"),
                "custom": Custom(1, 2),
            }[kind]
        return i

    return Calls(6, fn)


@pytest.mark.parametrize(
    "kind,error",
    [("value", ValueError), ("key", KeyError), ("named", Named), ("custom", RuntimeError)],
)
def test_exceptions_come_back_with_their_traceback(kind, error):
    loader = data.DataLoader(failing(kind), batch_size=None, num_workers=2)
    seen = []
    with pytest.raises(error) as caught:
        for value in loader:
            seen.append(value)
    assert seen == [0, 1, 2]
    message = str(caught.value)
    assert "in DataLoader worker process 1" in message
    assert "Traceback (most recent call last)" in message
    assert "in fn" in message
    del caught


def test_a_pass_goes_on_after_a_bad_batch():
    iterator = iter(data.DataLoader(failing("value"), batch_size=None, num_workers=2))
    seen = []
    while True:
        try:
            seen.append(next(iterator))
        except ValueError:
            seen.append("bad")
        except StopIteration:
            break
    assert seen == [0, 1, 2, "bad", 4, 5]


def test_error_in_worker_init():
    def init(worker_id):
        raise OSError("no disk")

    loader = data.DataLoader(Squares(3), num_workers=1, worker_init_fn=init)
    with pytest.raises(OSError, match="no disk"):
        next(iter(loader))


def test_what_cannot_be_sent_is_named():
    loader = data.DataLoader(
        Calls(1, lambda i: lambda: i), batch_size=None, num_workers=1, collate_fn=lambda x: x
    )
    with pytest.raises(Exception, match="pickle"):
        next(iter(loader))
    w = vt.ones(2, requires_grad=True)
    loader = data.DataLoader(Calls(1, lambda i: w * 2), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match="detach"):
        next(iter(loader))


def test_a_killed_worker_is_named():
    def die(i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with pytest.raises(RuntimeError, match=r"worker 0 \(pid \d+\) is killed by SIGKILL"):
        list(data.DataLoader(Calls(4, die), batch_size=None, num_workers=2))
    assert no_children()


def test_a_worker_that_exits_is_named():
    with pytest.raises(RuntimeError, match="exit code 3"):
        list(data.DataLoader(Calls(2, lambda i: os._exit(3)), num_workers=1))


def test_timeout():
    def slow(i):
        time.sleep(30)

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out after"):
        next(iter(data.DataLoader(Calls(2, slow), num_workers=1, timeout=0.3)))
    assert no_children()
    assert time.monotonic() - started < 10


def test_a_failing_sampler_ends_the_workers():
    def sampler():
        yield 0
        yield 1
        raise OSError("sampler")

    loader = data.DataLoader(Squares(4), sampler=sampler(), num_workers=1, prefetch_factor=1)
    with pytest.raises(OSError, match="sampler"):
        list(loader)
    assert no_children(1.0)


def test_early_break_ends_the_workers():
    for _ in data.DataLoader(Squares(100), num_workers=2):
        break
    assert no_children()


# Whole programs


@pytest.fixture
def run_program(start_python):
    """run_program(source, interrupt_after=None, kill=None): runs a program that prints its
    workers' pids; returns (exit code, output, live workers)."""

    def run(source, *, interrupt_after=None, kill=None):
        process = start_python(source, stderr=subprocess.STDOUT, start_new_session=True)
        return watch(process, interrupt_after, kill)

    return run


def watch(process, interrupt_after, kill):
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if interrupt_after and interrupt_after in line:
                if kill:
                    os.kill(process.pid, kill)
                else:
                    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
                break
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    output = "".join(lines) + rest
    pids = [
        int(p) for line in output.splitlines() if line.startswith("pids") for p in line.split()[1:]
    ]
    assert pids, output
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.05)
    return process.returncode, output, [pid for pid in pids if is_running(pid)]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


PROGRAM = """
import os, signal, sys, time
# What started the tests may have them ignore SIGINT, as a shell does for its background jobs.
signal.signal(signal.SIGINT, signal.default_int_handler)
import vibetensor.torch as vt
from vibetensor.torch.utils import data

class Slow(data.Dataset):
    def __len__(self):
        return 100000
    def __getitem__(self, i):
        time.sleep(0.001)
        return vt.full((1000,), float(os.getpid()), dtype=vt.float64)

loader = data.DataLoader(Slow(), num_workers=2, batch_size=4)
iterator = iter(loader)
pids = {p.pid for p in iterator._workers.processes}
print("pids", *pids, flush=True)
next(iterator)
print("running", flush=True)
REST
"""


def program(rest):
    return PROGRAM.replace("REST", rest)


@pytest.mark.parametrize("rest", ["for _ in iterator: pass", "time.sleep(60)"])
def test_ctrl_c(run_program, rest):
    """While it waits for a batch, and between batches."""
    code, output, alive = run_program(program(rest), interrupt_after="running")
    assert alive == []
    assert "KeyboardInterrupt" in output
    assert output.count("Traceback") == 1, output
    assert code != 0


def test_workers_leave_when_the_loader_is_killed(run_program):
    rest = "for _ in iterator: pass"
    _, _, alive = run_program(program(rest), interrupt_after="running", kill=signal.SIGKILL)
    assert alive == []


def test_leaving_the_program_in_the_middle_is_quiet(run_program):
    code, output, alive = run_program(program("sys.exit(0)"))
    assert alive == []
    assert code == 0
    assert output.count("\n") == 2, output


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods(run_python, method, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            import vibetensor.torch as vt
            from vibetensor.torch.utils import data

            if __name__ == "__main__":
                dataset = data.TensorDataset(vt.arange(6), vt.ones(6, 50000))
                loader = data.DataLoader(
                    dataset, batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1]
                )
                print([(a.tolist(), b.sum().item()) for a, b in loader])
            """
        )
    )
    run_script = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    result = run_python(run_script, script, method)
    expected = [([i, i + 1], 100000.0) for i in (0, 2, 4)]
    assert result.stdout.strip() == str(expected), result.stderr
