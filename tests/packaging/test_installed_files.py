"""The package as installed: its libraries, licences, metadata and console script."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vibetensor
from vibetensor import _C

PACKAGE = Path(vibetensor.__file__).parent
KERNELS = sorted((PACKAGE / "lib").glob("libvt_cpu_*.so"))


def distribution() -> importlib.metadata.Distribution:
    """The installed distribution, or a skip when the package runs from a checkout."""
    for found in importlib.metadata.distributions(name="vibetensor", path=[str(PACKAGE.parent)]):
        return found
    pytest.skip("vibetensor runs from a checkout, not from an installation")


def test_one_binary_serves_every_python() -> None:
    assert Path(_C.__file__).name == "_C.abi3.so"


def test_wheel_is_tagged_for_the_stable_abi() -> None:
    wheel = distribution().read_text("WHEEL")
    assert wheel is not None
    assert "Tag: cp310-abi3-" in wheel
    assert "Root-Is-Purelib: false" in wheel


def test_versions_agree() -> None:
    assert distribution().version == vibetensor.__version__


def test_libraries_travel_with_their_licences() -> None:
    names = {path.name for path in (PACKAGE / "lib").iterdir()}
    assert {"libvt_core.so", "libvt_cpu_base.so", "libscipy_openblas.so"} <= names
    licences = {Path(str(path)).name for path in distribution().files or []}
    assert {"LICENSE", "LICENSE.openblas.txt"} <= licences


def test_types_of_the_ops_ship() -> None:
    distribution()
    golden = Path(__file__).parents[1] / "ops" / "golden" / "_ops.pyi"
    assert (PACKAGE / "_ops.pyi").read_text() == golden.read_text()
    assert (PACKAGE / "py.typed").exists()


def test_build_leftovers_stay_out() -> None:
    suffixes = {Path(str(path)).suffix for path in distribution().files or []}
    assert not suffixes & {".cpp", ".h", ".a", ".o", ".cmake", ".yaml"}


@pytest.mark.parametrize("name", ["graphs", "cute_kernels"])
def test_outer_folders_ship_inside_the_package(name: str) -> None:
    module = importlib.import_module(f"vibetensor.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).parent == PACKAGE / name


@pytest.mark.parametrize("name", ["graphs/report_page", "viz/memory", "viz/page"])
def test_files_of_pages_ship(name: str) -> None:
    """Pages are put together from them; a package of Python files alone would lack them."""
    kinds = {"graphs/report_page": {".html", ".css", ".js"}}.get(name, {".css", ".js"})
    place = PACKAGE / name
    found = {path.suffix for path in place.parent.glob(f"{place.name}.*")} - {".py"}
    assert found == kinds


def test_console_script() -> None:
    distribution()
    script = Path(sys.executable).parent / "vibetensor"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("library", KERNELS, ids=lambda path: path.stem)
def test_kernel_libraries_export_nothing_of_ours(library: Path) -> None:
    """Code compiled for AVX-512 must never stand in for the same function elsewhere."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", "-C", library], capture_output=True, text=True, check=True
    ).stdout
    assert [line for line in listing.splitlines() if " vt::" in line] == []
