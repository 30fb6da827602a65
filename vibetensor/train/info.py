"""What `vibetensor info` shows."""

from __future__ import annotations

import os
import platform
import sys

import vibetensor.torch as torch
from vibetensor import _C


def info_lines() -> list[str]:
    """Version, build, machine, backends and libraries, one fact a line."""
    facts = {
        "vibetensor": torch.__version__,
        "folder": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        "core": os.path.basename(_C.__file__),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores",
        "CPU kernels": _C._cpu_capability(),
        "BLAS": _blas(),
        "threads": str(torch.get_num_threads()),
    }
    facts["CUDA"] = "available" if torch.cuda.is_available() else "not available"
    for name in ("numpy", "safetensors", "tensorboardX", "tensorboard"):
        facts[name] = _version(name)
    width = max(map(len, facts))
    return [f"{name.ljust(width)}  {value}" for name, value in facts.items()]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _blas() -> str:
    """What the OpenBLAS of the package says of itself: its version and the kernels it chose."""
    import ctypes

    folder = os.path.join(os.path.dirname(os.path.abspath(_C.__file__)), "lib")
    try:
        library = ctypes.CDLL(os.path.join(folder, "libscipy_openblas.so"))
        config = library.scipy_openblas_get_config
    except (OSError, AttributeError) as error:
        return f"unknown ({error})"
    config.restype = ctypes.c_char_p
    return config().decode().strip()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (optional)"
