"""The build backend asks for a CUDA compiler where one is needed, and only there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The backend, on a machine without nvcc."""
    spec = importlib.util.spec_from_file_location("wheel_build", ROOT / "csrc" / "wheel_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("SKBUILD_CMAKE_DEFINE", raising=False)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "TOOLKIT_NVCC", tmp_path / "nvcc")
    return module


def _compilers(requires: list[str]) -> list[str]:
    return [name for name in requires if name.startswith("nvidia-")]


def _make_nvcc(path: Path, release: str) -> None:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.48'\n")
    path.chmod(0o755)


CUDA = {"cmake.define.VT_CUDA": "ON"}


def test_cuda_without_nvcc_takes_it_from_pypi(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for requires in (
        backend.get_requires_for_build_wheel(CUDA),
        backend.get_requires_for_build_editable({"cmake.define.VT_CUDA": "1"}),
    ):
        assert _compilers(requires) == list(backend.CUDA_COMPILER)
    monkeypatch.setenv("SKBUILD_CMAKE_DEFINE", "VT_CUDA=ON")
    assert _compilers(backend.get_requires_for_build_wheel())


def test_other_builds_ask_for_no_compiler(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for settings in (None, {}, {"cmake.define.VT_CUDA": "OFF"}):
        assert not _compilers(backend.get_requires_for_build_wheel(settings))
    named = {**CUDA, "cmake.define.CMAKE_CUDA_COMPILER": "/opt/nvcc"}
    assert not _compilers(backend.get_requires_for_build_wheel(named))
    monkeypatch.setenv("CUDACXX", "/opt/nvcc")
    assert not _compilers(backend.get_requires_for_build_wheel(CUDA))
    monkeypatch.delenv("CUDACXX")
    _make_nvcc(backend.TOOLKIT_NVCC, "13.0")
    assert not _compilers(backend.get_requires_for_build_wheel(CUDA))
    backend.TOOLKIT_NVCC.unlink()
    on_path = tmp_path / "bin-nvcc"
    _make_nvcc(on_path, "14.1")
    monkeypatch.setattr(backend.shutil, "which", lambda name: str(on_path))
    assert not _compilers(backend.get_requires_for_build_wheel(CUDA))


def test_backend_builds_what_pip_asks_for(backend: Any) -> None:
    for hook in backend.__all__:
        assert callable(getattr(backend, hook))


def test_cuda_asked_for_in_cmake_args(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DVT_OTHER=x -DVT_CUDA:BOOL=ON")
    assert _compilers(backend.get_requires_for_build_wheel()) == list(backend.CUDA_COMPILER)
    monkeypatch.setenv("CMAKE_ARGS", "-DVT_CUDA=ON -DCMAKE_CUDA_COMPILER=/opt/nvcc")
    assert not _compilers(backend.get_requires_for_build_wheel())


def test_an_old_compiler_is_none(backend: Any) -> None:
    _make_nvcc(backend.TOOLKIT_NVCC, "12.4")
    assert _compilers(backend.get_requires_for_build_wheel(CUDA)) == list(backend.CUDA_COMPILER)
    backend.TOOLKIT_NVCC.write_text("no program")
    assert _compilers(backend.get_requires_for_build_wheel(CUDA))
