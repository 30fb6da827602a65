"""NVIDIA's libraries are found where packages put them; a missing one is named with its command."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vibetensor.torch.backends import cudnn
from vibetensor.torch.cuda import _backend
from vibetensor.train.info import info_lines

PACKAGES = {
    "cuBLASLt": "nvidia-cublas",
    "cuDNN": "nvidia-cudnn-cu13",
    "NVRTC": "nvidia-cuda-nvrtc",
    "nvJitLink": "nvidia-nvjitlink",
    "NCCL": "nvidia-nccl-cu13",
}

needs_backend = pytest.mark.skipif(
    _backend.native() is None, reason="this build has no CUDA backend"
)


@needs_backend
def test_each_library_is_found_or_named_with_its_command() -> None:
    reports = _backend.native().libraries()
    assert [name for name, *_ in reports] == list(PACKAGES)
    for name, version, path, problem in reports:
        if path:
            assert re.fullmatch(r"\d+\.\d+(\.\d+)?", version) and not problem
        else:
            assert f"pip install {PACKAGES[name]} " in problem
            assert "pip install 'vibetensor[cuda13]'" in problem
            assert not version


@needs_backend
def test_info_shows_the_libraries() -> None:
    lines = {line.split()[0]: line for line in info_lines()}
    for name, version, path, _ in _backend.native().libraries():
        wanted = f"{version} ({path})" if path else f"pip install {PACKAGES[name]}"
        assert wanted in lines[name]


@needs_backend
def test_absent_cudnn_is_a_state_not_an_error() -> None:
    found = dict((name, path) for name, _, path, _ in _backend.native().libraries())["cuDNN"]
    if found:
        assert cudnn.version() >= 90000
    else:
        assert cudnn.version() is None and not cudnn.is_available()
        assert "pip install nvidia-cudnn-cu13" in _backend.native().cudnn_problem()


@needs_backend
def test_package_folders_are_searched(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in with")
    folder = tmp_path / "site" / "nvidia" / "nccl" / "lib"
    folder.mkdir(parents=True)
    source = tmp_path / "nccl.c"
    source.write_text("int ncclGetVersion(int* v) { *v = 22703; return 0; }\n")
    library = folder / "libnccl.so.2"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    child = run_python(
        "import sys\n"
        "sys.modules['cuda.pathfinder'] = None  # only the folders on sys.path\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from vibetensor.torch.cuda import _backend\n"
        "print([r for r in _backend.native().libraries() if r[0] == 'NCCL'])\n"
    )
    assert child.returncode == 0, child.stderr
    assert f"('NCCL', '2.27.3', '{library}', '')" in child.stdout


def test_switches_are_kept_without_a_backend(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    child = run_python(
        "import sys\n"
        "sys.modules['vibetensor._cuda'] = None\n"
        "import vibetensor.torch as torch\n"
        "from vibetensor.torch.backends import cudnn, cuda\n"
        "assert cudnn.version() is None and not cudnn.is_available()\n"
        "assert cudnn.enabled and cudnn.allow_tf32\n"
        "assert not cudnn.benchmark and not cudnn.deterministic\n"
        "cudnn.benchmark = True\n"
        "assert torch.backends.cudnn.benchmark\n"
        "with cudnn.flags(enabled=False, deterministic=True):\n"
        "    assert not cudnn.enabled and cudnn.deterministic and not cudnn.benchmark\n"
        "assert cudnn.enabled and cudnn.benchmark and not cudnn.deterministic\n"
        "cuda.enable_cudnn_sdp(False)\n"
        "assert not cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled()\n"
        "torch.use_deterministic_algorithms(True)\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "torch.set_float32_matmul_precision('medium')\n"
        "assert cuda.matmul.allow_tf32\n"
        "cuda.matmul.allow_tf32 = False\n"
        "assert torch.get_float32_matmul_precision() == 'highest'\n"
        "try:\n"
        "    cudnn.enabled = 3\n"
        "except RuntimeError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    assert child.returncode == 0, child.stderr
