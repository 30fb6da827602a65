"""What all tests share: the package under test, the device it runs on, which tests need PyTorch."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import inspect
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.built import library

ROOT = Path(__file__).parent.parent

# `python -m pytest` puts the checkout on the path. Without a development build its package has no
# libraries, and the installed one is meant.
if not (ROOT / "vibetensor" / "_C.abi3.so").exists():
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


# The suites that run on any device: `pytest --device cuda`, or VT_TEST_DEVICE=cuda, makes it the
# default device of their tests, so that the tests themselves name none. Other libraries stay on the
# CPU, as the reference.
SUITES = (
    "amp", "autograd", "core", "data", "graphs", "io", "nn", "ops", "optim", "properties", "train",
)  # fmt: skip
NOT_ON_DEVICE: dict[str, str] = runpy.run_path(
    str(Path(__file__).parent / "cuda" / "not_on_device.py")
)["NOT_ON_DEVICE"]
_PROFILES = "profiles take the device's events"
NOT_SIMULATED: dict[str, str] = {
    "graphs/test_capture.py::test_the_guide_is_true": _PROFILES,
    "graphs/test_capture_copies.py::test_looking_at_what_was_compiled": _PROFILES,
    "graphs/test_capture_copies.py::test_the_trace_of_a_graph": _PROFILES,
    "graphs/test_graph.py::test_debug_dump": _PROFILES,
    "graphs/test_report_profile.py::*": _PROFILES,
}
_OLDER = runpy.run_path(str(Path(__file__).parent / "older_pytorch.py"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default=os.environ.get("VT_TEST_DEVICE", "cpu"),
        help="default device of the tests that run on any (cpu, cuda, cuda:1); or 'simulated', a "
        "device without hardware whose kernels are the CPU's (tests/simulated_cuda, in "
        "development builds)",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    os.environ["VT_TEST_DEVICE"] = device  # for what tests start, and for what names the device
    if device == "cpu":
        return
    import vibetensor.torch as torch

    if device == "simulated":
        _load_simulated_device()
    try:
        torch.set_default_device(_tensor_device(config))
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {device}: {error}") from None
    if device != "simulated":
        torch.backends.cudnn.allow_tf32 = False  # the references keep float32's bits
    _read_through_the_cpu(torch.Tensor)


def _tensor_device(config: pytest.Config) -> str:
    """The name that tensors know the device by."""
    device = config.getoption("--device")
    return "cuda" if device == "simulated" else device


def _load_simulated_device() -> None:
    """Puts the simulated device in the place of the CUDA backend, for the whole process."""
    found = library("vt_simulated_cuda")
    if found is None:
        raise pytest.UsageError("--device simulated: this tree has no build with it")
    ctypes.CDLL(str(found))
    from vibetensor.torch import cuda
    from vibetensor.torch.cuda import _backend

    # Or opening the real backend would put it in the place of this one.
    _backend._opened, _backend._problem = True, "the device is a simulated one"
    cuda.is_available = lambda: True  # autocast and GradScaler ask


def _read_through_the_cpu(tensor_type: Any) -> None:
    """Lets tests compare with NumPy on any device: `numpy()`, which raises for device tensors in
    use, copies here."""
    numpy = tensor_type.numpy

    def copied(self: Any, *, force: bool = False) -> Any:
        return numpy(self.cpu(), force=force)

    tensor_type.numpy = copied


def _on_device(item: pytest.Item) -> bool:
    """Whether --device moves this test."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return item.config.getoption("--device") != "cpu" and folder in SUITES


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Each test starts with its default device, whatever the one before left."""
    if item.config.getoption("--device") == "cpu":
        return (yield)
    import vibetensor.torch as torch

    torch.set_default_device(_tensor_device(item.config) if _on_device(item) else None)
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A kernel's failure belongs to the test that launched it, and the device is lost after it."""
    result = yield
    if _on_device(item) and item.config.getoption("--device") != "simulated":
        import vibetensor.torch as torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)  # xdist names the test and starts another worker
            pytest.exit(f"{item.nodeid} lost the device: {error}", returncode=70)
    return result


def _skip_listed(
    config: pytest.Config,
    items: list[pytest.Item],
    listed: dict[str, str],
    where: str,
    applies: Callable[[pytest.Item], bool],
) -> None:
    """Skips the listed tests that `applies` holds for. A pattern that matches no test is an error,
    on every run, so that the list says only what is true."""
    tests = Path(__file__).parent
    names = {item: f"{item.path.relative_to(tests).as_posix()}::{item.nodeid.partition('::')[2]}"
             for item in items}  # fmt: skip
    files = {name.partition("::")[0] for name in names.values()}
    whole = not any("::" in argument for argument in config.args)
    for pattern, reason in listed.items():
        file = pattern.partition("::")[0]
        # The brackets of a parameter are no wildcards.
        glob = pattern.replace("[", "[[]")
        matched = [item for item, name in names.items() if fnmatchcase(name, glob)]
        gone = not (tests / file).exists() or (whole and file in files and not matched)
        if gone:
            raise pytest.UsageError(f"{where}: no test matches '{pattern}'")
        for item in matched:
            if applies(item):
                item.add_marker(pytest.mark.skip(reason=reason))


def _older_pytorch() -> str | None:
    """The version of an installed PyTorch that is older than the one tests compare with."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:2] if n.isdecimal())
    return version if numbers and numbers < _OLDER["VERSION"] else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Applies the list of what is not for a device, and marks what needs PyTorch."""
    _skip_listed(config, items, NOT_ON_DEVICE, "tests/cuda/not_on_device.py", _on_device)
    simulated = config.getoption("--device") == "simulated"
    _skip_listed(config, items, NOT_SIMULATED, "tests/conftest.py", lambda item: simulated)
    older = _older_pytorch()
    listed = {p: f"PyTorch {older}: {why}" for p, why in _OLDER["OLDER_PYTORCH"].items()}
    _skip_listed(config, items, listed, "tests/older_pytorch.py", lambda item: older is not None)
    _mark_torch(items)


def pytest_collection_finish() -> None:
    """Collections look at what tests make, not at the thousands of tests, which all live on."""
    gc.collect()
    gc.freeze()


def _asks_for_torch(function: Any) -> bool:
    """Whether a test or a fixture has an importorskip of PyTorch, or of one of its modules, in its
    own code."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (
        code is not None
        and "importorskip" in code.co_names
        and any(isinstance(c, str) and c.partition(".")[0] == "torch" for c in code.co_consts)
    )


def _needs_torch(item: pytest.Item) -> bool:
    """Whether a test is skipped without PyTorch: its module imports it, its own code asks for it,
    or a fixture it uses does. A fixture with parameters marks those that do by itself."""
    module = getattr(item, "module", None)
    names = (getattr(value, "__name__", "") for value in vars(module).values()
             if isinstance(value, ModuleType))  # fmt: skip
    if any(name.partition(".")[0] == "torch" for name in names):
        return True
    if _asks_for_torch(getattr(item, "function", None)):
        return True
    used = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    return any(
        definitions[-1].params is None and _asks_for_torch(definitions[-1].func)
        for definitions in used.values()
    )


def _mark_torch(items: list[pytest.Item]) -> None:
    """Marks the tests that need PyTorch, so that `-m torch` selects them. A test that is skipped
    for want of it without being marked would never run with it: see pytest_runtest_makereport."""
    for item in items:
        if _needs_torch(item):
            item.add_marker(pytest.mark.torch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    missing = report.skipped and "could not import 'torch" in str(report.longrepr)
    if missing and item.get_closest_marker("torch") is None:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} is skipped without PyTorch, and `-m torch` does not select it: mark it "
            "with pytest.mark.torch"
        )
    return report


@pytest.fixture
def start_python(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """start_python(source, *arguments, **options of Popen): a child with its output piped.

    It imports the vibetensor that is tested here, from a checkout or installed, and runs in
    `tmp_path`: `python -c` puts its working directory first on its path, and the package of a
    checkout may have no libraries.
    """
    import vibetensor

    package = str(Path(vibetensor.__file__).parents[1])

    def start(source: str, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
        settings: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "text": True,
            "cwd": tmp_path,
            **options,
        }
        # What the surrounding path adds (packages installed elsewhere) comes after the package.
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        settings["env"] = {**os.environ, "PYTHONPATH": path, **options.get("env", {})}
        return subprocess.Popen([sys.executable, "-c", source, *map(str, arguments)], **settings)

    return start


@pytest.fixture
def run_python(
    start_python: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(source, *arguments, timeout=120, **options of Popen): waits for such a child."""

    def run(
        source: str, *arguments: Any, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        with start_python(source, *arguments, **{"stderr": subprocess.PIPE, **options}) as child:
            try:
                out, err = child.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    return run
