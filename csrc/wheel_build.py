"""The build backend: scikit-build-core's, which with CUDA asked for also gets a compiler for it.

pip reads the build's requirements before CMake runs. A CUDA build on a machine without nvcc adds
the compiler's packages to them, so nothing has to be installed by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from scikit_build_core.settings.skbuild_read_settings import SettingsReader

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# nvcc and all it needs to compile and link; csrc/cuda/toolkit.cmake finds them. One minor release,
# so that the parts fit each other and the oldest driver that runs the result is known.
CUDA_COMPILER = tuple(
    f"{name}==13.0.*"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
        "nvidia-nvvm",
    )
)


# Where CMake looks beside the PATH.
TOOLKIT_NVCC = Path("/usr/local/cuda/bin/nvcc")


# The first release whose code the oldest supported driver runs, and that knows C++20 as we use it.
OLDEST_RELEASE = 13


def _define(settings: Any, name: str) -> str:
    """A CMake definition of the build, from pyproject.toml, -C or the environment."""
    value = str(settings.cmake.define.get(name, ""))
    for argument in (*settings.cmake.args, *shlex.split(os.environ.get("CMAKE_ARGS", ""))):
        key, _, given = argument.removeprefix("-D").partition("=")
        if argument.startswith("-D") and key.partition(":")[0] == name:
            value = given
    return value


def _release(nvcc: str | Path) -> int:
    """The major release of a compiler; 0 for one that does not run."""
    try:
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    found = re.search(r"release (\d+)\.", shown.stdout)
    return int(found[1]) if found else 0


def needs_cuda_compiler(config_settings: Mapping[str, Any] | None) -> bool:
    """Whether the build wants CUDA and the machine has no nvcc, or one that is too old, where CMake
    looks for one."""
    settings = SettingsReader.from_file("pyproject.toml", config_settings or {}).settings
    if _define(settings, "VT_CUDA").upper() not in ("ON", "1", "TRUE", "YES", "Y"):
        return False
    if _define(settings, "CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX"):
        return False
    nvcc = shutil.which("nvcc") or TOOLKIT_NVCC
    return _release(nvcc) < OLDEST_RELEASE


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    requires = _build.get_requires_for_build_wheel(config_settings)
    return [*requires, *(CUDA_COMPILER if needs_cuda_compiler(config_settings) else ())]


def get_requires_for_build_editable(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """What pip installs before it builds an editable install."""
    requires = _build.get_requires_for_build_editable(config_settings)
    return [*requires, *(CUDA_COMPILER if needs_cuda_compiler(config_settings) else ())]
