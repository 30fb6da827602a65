"""Users' kernels compiled ahead of time: the command, the record, the code by its PTX and the calls of
the shared library, over a CUDA runtime that only notes launches. Needs the DSL and no GPU."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cutlass", reason="needs the CuTe DSL")

import ptx_machine
from emulate import rounded, stored
from ptx_machine import Memory, bfloat16_values

from vibetensor.cute_kernels import build, dsl, just_in_time, objects, user_ops
from vibetensor.cute_kernels import compile as compiler
from vibetensor.cute_kernels.__main__ import main
from vibetensor.cute_kernels.contract import Contract, Extent, Tensor

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

#: What the objects ask of the runtime; all other functions of it answer 0.
STUB = r"""
#include <string.h>
typedef struct { unsigned grid[3], block[3]; size_t shared; void *stream, *attributes; unsigned count; } Config;
Config last;
unsigned char values[256];
int launches, loads;
int cudaLaunchKernelExC(const Config *config, const void *kernel, void **args) {
  last = *config;
  unsigned char *to = values;
  const int sizes[] = {16, 16, 16, 4};
  for (int i = 0; i < 4; ++i, to += 16) memcpy(to, args[i], sizes[i]);
  return ++launches, kernel ? 0 : 400;
}
int cudaLibraryLoadData(void **library) { return ++loads, *library = &last, 0; }
int cudaLibraryGetKernel(void **kernel) { return *kernel = values, 0; }
static int one(int *value) { return *value = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0; }
int cudaDeviceGetAttribute(int *value) { return one(value); }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags, int *status) {
  if (status) *status = 0;
  return *f = (void *)one, 0;
}
const char *cudaGetErrorName(void) { return "none"; }
const char *cudaGetErrorString(void) { return "none"; }
"""


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import scale_add_gelu
    finally:
        sys.path.remove(str(EXAMPLES))
    return scale_add_gelu


@pytest.fixture(scope="module")
def op(example: Any) -> user_ops.CuteOp:
    return user_ops.registered()["example::scale_add_gelu"]


@pytest.fixture(scope="module")
def built(op: user_ops.CuteOp, tmp_path_factory: pytest.TempPathFactory) -> objects.Objects:
    """The example's objects over the stub."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("objects")
    runtime = build.runtime_library()
    assert runtime is not None
    source = folder / "stub.c"
    undefined = subprocess.run(["nm", "-u", runtime], capture_output=True, text=True, check=True)
    wanted = {w for w in undefined.stdout.split() if w.startswith("cuda") and w.isidentifier()}
    rest = "".join(f"int {n}(void) {{ return 0; }}\n" for n in sorted(wanted) if f" {n}(" not in STUB
                   and f"*{n}(" not in STUB)  # fmt: skip
    source.write_text(STUB + rest)
    stub = folder / "stub.o"
    subprocess.run(["cc", "-w", "-fPIC", "-c", str(source), "-o", str(stub)], check=True)
    patch = pytest.MonkeyPatch()
    patch.setattr(objects, "cuda_runtime", lambda: stub)
    # Its variables are to be seen from here.
    patch.setattr(objects, "_linker", lambda: ["cc", "-Wl,--export-dynamic"])
    try:
        made, compiled = op.build(folder)
    finally:
        patch.undo()
    assert compiled
    return made


def test_every_variant_is_there(op: user_ops.CuteOp, built: objects.Objects) -> None:
    assert [c.variant for c in built.codes] == ["bfloat16", "float16", "float32"]
    assert all(c.spilled_bytes == 0 for c in built.codes)
    again, compiled = op.build(built.library.parent)
    assert again == built and not compiled


@pytest.mark.parametrize("variant", [0, 2])
def test_a_call_of_the_shared_library(built: objects.Objects, variant: int) -> None:
    """The exported function takes what csrc/cuda/cute/packing.cpp passes."""
    library = ctypes.CDLL(str(built.library))
    code = built.codes[variant]
    module, error = ctypes.c_void_p(), ctypes.c_int(-1)
    place = ctypes.pointer(module)
    steps = (ctypes.c_void_p * 2)(ctypes.addressof(place), ctypes.addressof(error))
    getattr(library, code.init)(steps)
    assert error.value == 0
    device = ctypes.c_int(0)
    steps = (ctypes.c_void_p * 3)(
        ctypes.addressof(place), ctypes.addressof(device), ctypes.addressof(error)
    )
    getattr(library, code.load)(steps)
    assert error.value == 0

    n = 8 * 1000
    packed = [ctypes.create_string_buffer(struct.pack("<qi4x", at, n), 16) for at in (16, 32, 48)]
    scale, stream, result = ctypes.c_float(1.5), ctypes.c_void_p(0x99), ctypes.c_int(-1)
    arguments = [*packed, scale, stream, result]
    given = (ctypes.c_void_p * 6)(*(ctypes.addressof(a) for a in arguments))
    getattr(library, code.entry)(given, 6)
    assert result.value == 0

    class Config(ctypes.Structure):
        _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3),
                    ("shared", ctypes.c_size_t), ("stream", ctypes.c_void_p)]  # fmt: skip

    last = Config.in_dll(library, "last")
    assert list(last.grid) == [4, 1, 1] and list(last.block) == [256, 1, 1]
    assert last.stream == 0x99
    values = bytes((ctypes.c_ubyte * 64).in_dll(library, "values"))
    for i, address in enumerate((16, 32, 48)):
        assert struct.unpack_from("<qi", values, 16 * i) == (address, n)
    assert struct.unpack_from("<f", values, 48) == (1.5,)


def test_the_kernel_computes_the_example(op: user_ops.CuteOp) -> None:
    rng = np.random.default_rng(5)
    for v in op.variants:
        dtype, n = v.name, 8 * 259  # the second block ends early
        made = dsl.cute.compile(
            op.make(v.value), *compiler.placeholders(v.contract),
            options=compiler.OPTIONS + " --keep-ptx",
        )  # fmt: skip
        x, y = (rounded(rng.normal(size=n) * 2, dtype) for _ in range(2))
        memory, blob = Memory(), b""
        poison = np.full(n, 0xFFFF if dtype != "float32" else 0xFFFFFFFF)
        raw = [stored(x, dtype), stored(y, dtype),
               poison.astype(np.uint16 if dtype != "float32" else np.uint32)]  # fmt: skip
        raw[2] = raw[2].view(raw[0].dtype)
        places = [(memory.place(a), a) for a in raw]
        for address, _ in places:
            blob += struct.pack("<qi4x", address, n)
        blob += struct.pack("<f", 0.75)
        assert ptx_machine.launch(made.__ptx__, blob, memory, (2, 1, 1), (256, 1, 1))
        got = memory.read(*places[2])
        got = bfloat16_values(got) if dtype == "bfloat16" else got
        total = x.astype(np.float64) * 0.75 + y
        want = 0.5 * total * (1 + np.vectorize(math.erf)(total * math.sqrt(0.5)))
        limit = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2e-6}[dtype]
        assert np.all(np.abs(got - want) <= limit * np.maximum(np.abs(want), 0.1))


def test_records_that_are_not_whole_are_made_anew(
    op: user_ops.CuteOp, built: objects.Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(built.library.parent, folder)
    assert objects.find(op.stem, op.key, folder)
    assert objects.find(op.stem, "0" * 24, folder) is None
    monkeypatch.setattr(objects, "dsl_version", lambda: "")
    assert objects.find(op.stem, op.key, folder)  # a machine without the DSL
    monkeypatch.setattr(objects, "dsl_version", lambda: "9.9")
    assert objects.find(op.stem, op.key, folder) is None
    monkeypatch.undo()
    library = folder / built.library.name
    library.write_bytes(library.read_bytes()[:-1])
    assert objects.find(op.stem, op.key, folder) is None
    record = next(folder.glob("*.json"))
    record.write_text(json.dumps({"hash": ""}))
    assert objects.find(op.stem, op.key, folder) is None


def test_the_cache_folder_is_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert objects.cache_folder() is None
    folder = objects.cache_folder(create=True)
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    os.chmod(folder, 0o777)
    assert objects.cache_folder(create=True) is None


def test_missing_variants_just_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = tmp_path / "nothing.o"
    source = tmp_path / "nothing.c"
    source.write_text("int nothing;\n")
    subprocess.run(["cc", "-c", "-fPIC", str(source), "-o", str(stub)], check=True)
    monkeypatch.setattr(objects, "cuda_runtime", lambda: stub)  # linked, and not loaded
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VT_KERNEL_LOG", "1")
    first = just_in_time.symbols("dropout_forward", "bf16_256")
    assert first is not None and Path(first[0]).exists() and "dropout_forward_bf16_256" in first[1]
    assert "CuTe dropout_forward bf16_256 compiled in" in capsys.readouterr().err
    assert just_in_time.symbols("dropout_forward", "bf16_256") == first
    assert not capsys.readouterr().err  # from disk
    os.chmod(tmp_path / "vibetensor/cute_kernels/ops", 0o777)
    assert just_in_time.symbols("dropout_forward", "f16_256") is None
    assert "is not compiled: the cache folder is not" in capsys.readouterr().err


def test_a_header_of_another_kernel_is_refused() -> None:
    header = """
void _mlir_p__mlir_ciface_f(void **args, int32_t num_args);
typedef struct { void *data; int32_t dynamic_shapes[1]; } p_Tensor_x_t;
    void *args[3] = {
        x, &stream, &ret
    };"""
    one = Contract((Extent("n"),), (Tensor("x", "float32", ("n",)),))
    assert objects.check_header(header, "p", one) == "_mlir_p__mlir_ciface_f"
    other = Contract((Extent("n"),), (Tensor("y", "float32", ("n",)),))
    with pytest.raises(build.BuildError, match=r"takes \['x'\], and its contract says \['y'\]"):
        objects.check_header(header, "p", other)
    two = Contract((Extent("n"),), (Tensor("x", "float32", ("n", "n")),))
    with pytest.raises(build.BuildError, match="1 extents and 0 strides that are not fixed"):
        objects.check_header(header, "p", two)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_kernel.py").write_text(
        "from vibetensor import cute_kernels\n"
        "from vibetensor.cute_kernels import Contract, Extent, Tensor\n"
        "from vibetensor.cute_kernels.dsl import cute, CUstream\n"
        "@cute.jit\n"
        "def broken(x: cute.Tensor, y: cute.Tensor, stream: CUstream):\n"
        "    nothing_of_that_name(x)\n"
        "cute_kernels.register('test_cute::broken', '(Tensor x) -> Tensor y', kernel=broken,\n"
        "    contract=Contract((Extent('n'),), (Tensor('x', 'float32', ('n',)),\n"
        "        Tensor('y', 'float32', ('n',), 'write'))),\n"
        "    reference=lambda x: x + 1, capture='pointwise')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(objects, "cuda_runtime", lambda: tmp_path)  # it does not come to linking
    out = ["--out", str(tmp_path / "out")]
    assert main(["build", "--module", "broken_kernel", *out]) == 1
    assert "test_cute__broken_only does not compile" in capsys.readouterr().err
    assert main(["build", "--module", "string", *out]) == 1
    assert "no op was registered" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["build", "--module", "string", "--family", "gemm"])
