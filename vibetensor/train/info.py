"""What `vibetensor info` shows."""

from __future__ import annotations

import os
import platform
import sys

import vibetensor.torch as torch
from vibetensor import _C


def info_lines() -> list[str]:
    """Version, build, machine, backends and libraries, one fact a line."""
    build = _C._build_info()
    facts = {
        "vibetensor": torch.__version__,
        "folder": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        "core": os.path.basename(_C.__file__),
        "build": f"{build['type']}, {build['compiler']}, CMake {build['cmake']}",
        "flags": f"{build['flags']} (kernels of the CPU add those of their level)",
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores",
        "CPU kernels": f"{_C._cpu_capability()}, of {build['cpu_levels'].replace(',', ', ')} built",
        "BLAS": _blas(),
        "threads": str(torch.get_num_threads()),
    }
    facts.update(_cuda_facts())
    facts.update(_cuda_libraries())
    for name in ("numpy", "safetensors", "tensorboardX", "tensorboard"):
        facts[name] = _version(name)
    width = max(map(len, facts))
    return [f"{name.ljust(width)}  {value}" for name, value in facts.items()]


def _cuda_facts() -> dict[str, str]:
    """What was built for CUDA, and what is there to run it."""
    if not torch.backends.cuda.is_built():
        return {"CUDA": "not built (pip install '.[cuda13]' -C cmake.define.VT_CUDA=ON builds it)"}
    from vibetensor import _cuda

    facts = {
        "CUDA": f"built with {_dotted(_cuda.runtime_version())} for "
        + ", ".join(_architecture(a) for a in _cuda.built_architectures().split(","))
    }
    if not torch.cuda.is_available():
        return {**facts, "GPU": f"none can be used: {_cuda.device_problem()}"}
    facts["CUDA driver"] = f"supports CUDA {_dotted(_cuda.driver_version())}"
    for device in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(device)
        facts[f"GPU {device}"] = (
            f"{of.name}, {of.total_memory / 2**30:.0f} GiB, compute capability {of.major}.{of.minor}"
        )
    return facts


def _dotted(version: int) -> str:
    """13000 as 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _architecture(name: str) -> str:
    """CMake's "90a-real" as sm_90a, "90-virtual" as compute_90 (PTX)."""
    number, _, kind = name.partition("-")
    return f"compute_{number} (PTX)" if kind == "virtual" else f"sm_{number}"


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


def _cuda_libraries() -> dict[str, str]:
    """NVIDIA's libraries: version and path, or how to install a missing one."""
    from vibetensor.torch.cuda import _backend

    native = _backend.native()
    if native is None:
        return {}
    return {
        name: f"{version} ({path})" if path else problem.partition("  (or")[0]
        for name, version, path, problem in native.libraries()
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (optional)"
