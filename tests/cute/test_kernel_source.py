"""The keys of users' compiled kernels: another kernel has another key, the same kernel the same one in
another process, and none where that cannot be told."""

from __future__ import annotations

import enum
import functools
import importlib
import linecache
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vibetensor.cute_kernels import kernel_source, user_ops

KERNEL = """
SCALE = 2
class Kernel:
    def __init__(self, width):
        self.width = width
    def __call__(self, x, y, stream):
        return twice(x) * SCALE
def twice(x):
    return x + x
"""
REGISTER = """
from vibetensor import cute_kernels
from vibetensor.cute_kernels import Contract, Extent, Tensor
op = cute_kernels.register("test_source::op", "(Tensor x) -> Tensor y", kernel=KERNEL,
    contract=Contract((Extent("n"),), (Tensor("x", "float32", ("n",)),
                                       Tensor("y", "float32", ("n",), "write"))),
    reference=lambda x: x + 1, capture="pointwise")
"""


def digest(kernel: Any, values: tuple[Any, ...] = (None,), sources: tuple[Path, ...] = ()) -> str:
    return kernel_source.read(kernel, values, sources).digest


_cells = iter(range(1000))


def cell(text: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs a notebook's cell: no file, and its text in linecache."""
    name = f"<cell {next(_cells)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    names = {"__name__": "__main__"} if names is None else names
    exec(compile(text, name, "exec"), names)
    return names


def test_an_edited_kernel_in_a_notebook() -> None:
    def made(text: str, width: int = 8) -> str:
        return digest(cell(text)["Kernel"](width))

    first = made(KERNEL)
    assert len(first) == 64 and made(KERNEL) == first
    for old, new in (
        ("twice(x) * SCALE", "twice(x) / SCALE"),  # the kernel
        ("x + x", "x - x"),  # what it calls
        ("SCALE = 2", "SCALE = 3"),  # a value that it names
    ):
        assert old in KERNEL and made(KERNEL.replace(old, new)) not in ("", first)
    assert made(KERNEL, width=16) not in ("", first)  # an attribute
    # Another cell changes what the kernel names.
    names = cell(KERNEL)
    assert digest(names["Kernel"](8)) == first
    cell("SCALE = 3\n", names)
    assert digest(names["Kernel"](8)) not in ("", first)


def test_code_without_a_text() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def kernel(x, y, stream): pass\n", "<stdin>", "exec"), names)
    found = kernel_source.read(names["kernel"], [None], [])
    assert found.digest == "" and found.problem == "kernel has no source"
    assert digest(len) == ""


def kernel_of(width: int, stages: int = 1) -> Callable[..., Any]:
    def kernel(x: Any, y: Any, stream: Any) -> int:
        return width * stages

    return kernel


class Slots:
    __slots__ = ("width",)

    def __init__(self, width: Any) -> None:
        self.width = width

    def __call__(self, x: Any, y: Any, stream: Any) -> None: ...


@dataclass(frozen=True)
class Tile:
    name: str
    rows: Any = 1

    def __call__(self, x: Any, y: Any, stream: Any) -> None: ...

    def bound(self, x: Any, y: Any, stream: Any) -> None: ...


class Order(enum.Enum):
    ROWS = 1
    COLUMNS = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (functools.partial(kernel_of, 1), functools.partial(kernel_of, 2)),
        (functools.partial(kernel_of, 1), functools.partial(kernel_of, 1, stages=2)),
        (functools.partial(kernel_of, 1), functools.partial(Tile, 1)),
        (kernel_of(1), kernel_of(2)),
        (Slots(1), Slots(1.0)),
        (Slots([1, {"a": 2}]), Slots([1, {"a": 3}])),
        (Slots({1, 2}), Slots({1, 3})),
        (Slots(Order.ROWS), Slots(Order.COLUMNS)),
        (Slots(Tile("a")), Slots(Tile("b"))),
        (Slots(Slots), Slots(Tile)),
        (Tile("a"), Tile("a", 2)),
        (Tile("a").bound, Tile("a", 2).bound),
    ],
)
def test_kernels_that_differ_in_what_they_hold(one: Any, other: Any) -> None:
    a, b = digest(one), digest(other)
    assert a and b and a != b
    assert digest(one) == a


def test_values_of_variants() -> None:
    found = [digest(kernel_of, (v,)) for v in ("a", "b", Tile("a"), Tile("a", 2), Tile("b"))]
    assert all(found) and len(set(found)) == len(found)
    assert digest(kernel_of, (Tile("a"),)) == found[2]


def test_what_python_does_not_show() -> None:
    import vibetensor.torch as torch

    for held in (torch.ones(1), iter([]), threading.Lock()):
        found = kernel_source.read(Slots(held), [None], [])
        assert found.digest == "" and "state Python does not show" in found.problem
    assert digest(Slots(torch.float32)) not in ("", digest(Slots(torch.float16)))


def test_nesting() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in kernel_source.read(Slots(deep), [None], []).problem
    # What holds itself is no trouble.
    kernel = Slots(None)
    kernel.width = [kernel]
    assert digest(kernel) == digest(kernel) != ""


def test_other_processes_have_the_same_key(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Whatever the seed of hashes, and wherever the file lies."""
    text = KERNEL + "kernel = Kernel({'a', 'b', 'c'})\n"
    show = (
        "import vibetensor.cute_kernels.kernel_source as s, k; print(s.read(k.kernel, [None], []))"
    )
    keys = set()
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "k.py").write_text(text)
        time.sleep(0.05)  # the start of processes is known to 10 ms
        done = run_python(show, cwd=tmp_path / seed, env={"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        keys.add(done.stdout.split("'")[1])
    assert len(keys) == 1 and len(keys.pop()) == 64


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes and imports a module of a fresh name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def write(text: str) -> Any:
        name = f"kernel_module_{len(made)}_{time.monotonic_ns()}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        made.append(name)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield write
    for name in made:
        sys.modules.pop(name, None)
    user_ops._registered.pop("test_source::op", None)
    from vibetensor.torch import _custom_op

    _custom_op._ops.pop("test_source::op", None)


def test_a_file_that_is_being_imported_is_what_is_registered(module: Any) -> None:
    made = module(KERNEL + "kernel = Kernel(8)\n" + REGISTER.replace("KERNEL", "kernel"))
    op = user_ops.registered()["test_source::op"]
    assert op.key and op.source.changed() is None
    # A text that changes before the first call is not compiled under that key.
    before = op.key
    path = Path(made.__file__)
    path.write_text(path.read_text().replace("x + x", "x - x"))
    assert op.key == before and op.source.changed() == path
    with pytest.raises(user_ops.BuildError, match="has changed since the op was registered"):
        op._check_source()


def test_code_that_was_imported_before_an_edit(module: Any) -> None:
    """Which text was imported cannot be told of files that are younger than the process."""
    made = module(KERNEL)
    path = Path(made.__file__)
    path.write_text(path.read_text().replace("x + x", "x - x"))
    found = kernel_source.read(made.Kernel(8), [None], [])
    assert found.digest == "" and "was written after the program started" in found.problem
    assert digest(Tile("a"), sources=(path,)) == ""


def test_files_of_sources_count(tmp_path: Path) -> None:
    extra = tmp_path / "table.json"
    extra.write_text("1")
    one = digest(Tile("a"), sources=(extra,))
    extra.write_text("2")
    assert one and digest(Tile("a"), sources=(extra,)) not in ("", one) and one != digest(Tile("a"))


def test_without_a_key_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    text = KERNEL + "kernel = Kernel(8)\n" + REGISTER.replace("KERNEL", "kernel")
    exec(compile(text, "<stdin>", "exec"), names)
    op = user_ops.registered()["test_source::op"]
    try:
        assert op.key == "" and op.find() is None
        with pytest.raises(
            user_ops.BuildError, match="cannot be kept: Kernel.__call__ has no source"
        ):
            op.build(tmp_path)
        folders = []

        def compile_objects(stem: str, key: str, jobs: Any, folder: Path, check: Any) -> Any:
            folders.append(folder)
            assert folder.is_dir()
            raise user_ops.BuildError("far enough")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(user_ops.objects, "compile_objects", compile_objects)
        with user_ops.contextlib.ExitStack() as kept, pytest.raises(user_ops.BuildError):
            op._compile_now(kept)
        (folder,) = folders
        assert not folder.exists() and not list(tmp_path.iterdir())
    finally:
        from vibetensor.torch import _custom_op

        del user_ops._registered["test_source::op"], _custom_op._ops["test_source::op"]
