"""csrc/cuda/check_kernels.py finds local memory and missing instructions in what cuobjdump prints."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "csrc/cuda/check_kernels.py"
KERNEL = "_ZN2vt4cuda9attention12_GLOBAL__N__14forward_kernelI6__halfLi64EEEvNS1_7ProblemIT_EE"
OTHER = "_ZN2vt4cuda12_GLOBAL__N__19add_partsILi4EEEvPf"
USAGE = f"""
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function {KERNEL}:
  REG:238 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:940 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {OTHER}:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
	code for sm_90a
		Function : {KERNEL}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
                                                                  /* 0x000fe40000000800 */
        /*0010*/              @!P0 HMMA.16816.F32 R4, R8, R2, R4 ;  /* 0x0000000208047236 */
        /*0020*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;      /* 0x00000008040075b4 */
		..........


		Function : {OTHER}
        /*0000*/                   FADD R1, R2, R3 ;              /* 0x00000a00ff017b82 */
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("needs a checkout")
    spec = importlib.util.spec_from_file_location("check_kernels", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_what_is_read(script: ModuleType) -> None:
    assert script.function_memory(USAGE) == {KERNEL: 32, OTHER: 0}
    assert script.function_instructions(SASS) == {
        KERNEL: {"LDC", "HMMA", "UTMALDG"},
        OTHER: {"FADD"},
    }
    with pytest.raises(ValueError, match="no registers, stack"):
        script.function_memory(USAGE.replace("STACK:24", ""))


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void vt::cuda::attention::(anonymous namespace)::forward_kernel<__half, 64>"
            "(vt::cuda::attention::Problem<__half>)",
            "forward_kernel<__half, 64>",
        ),
        ("vt::cuda::(anonymous namespace)::plain(float*, int)", "plain"),
        ("void vt::cuda::f<vt::cuda::Sum<float> >(void (*)(int))", "f<vt::cuda::Sum<float> >"),
    ],
)
def test_names(script: ModuleType, demangled: str, name: str) -> None:
    assert script.shown(demangled) == name


def test_objects_and_their_code_are_found(script: ModuleType, tmp_path: Path) -> None:
    """In whichever target, and the newest; code for Hopper with its own instructions or without."""
    assert script.object_of(tmp_path, "x") is None
    for at, target in enumerate(("old", "new", "older")):
        path = tmp_path / f"csrc/cuda/CMakeFiles/{target}.dir/kernels/x.cu.o"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (at % 2, at % 2))
    found = script.object_of(tmp_path, "x")
    assert found is not None and found.parts[-3] == "new.dir"
    listing = "ELF file    1: x.cu.1.sm_80.cubin\nELF file    2: x.cu.2.sm_90.cubin\n"
    assert script.code_for(listing, ["sm_90a", "sm_90"]) == "sm_90"
    assert script.code_for(listing.replace("sm_90", "sm_90a"), ["sm_90a", "sm_90"]) == "sm_90a"
    assert script.code_for(listing, ["sm_90a"]) is None


def test_problems(script: ModuleType) -> None:
    memory = {"forward_kernel<__half, 64>": 32, "add_parts<4>": 0}
    code = {"forward_kernel<__half, 64>": {"HMMA"}, "add_parts<4>": {"FADD"}}
    expected = script.Expected(
        "HMMA", without=("add_parts<*",), local={"forward_kernel<*, 64>": (32, "a reason")}
    )
    assert script.problems("x", expected, memory, code) == []
    memory["forward_kernel<__half, 64>"] = 40
    assert script.problems("x", expected, memory, code) == [
        "x: forward_kernel<__half, 64>: 40 bytes of local memory; 32 are allowed: a reason"
    ]
    memory["add_parts<4>"] = 8
    found = script.problems("x", script.Expected("HGMMA", local={"gone<*": (8, "")}), memory, code)
    assert found == [
        "x: forward_kernel<__half, 64>: 40 bytes of local memory",
        "x: forward_kernel<__half, 64>: no HGMMA in its code",
        "x: add_parts<4>: 8 bytes of local memory",
        "x: add_parts<4>: no HGMMA in its code",
        "x: gone<*: no kernel of this name is left",
    ]
    assert script.problems("x", expected, {}, {}) == ["x: no kernels in its code"]


def test_what_is_missing_is_a_failure(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path)], find=lambda name: None) == 1
    assert "pip install" in capsys.readouterr().err
    assert script.main([str(tmp_path)], find=lambda name: f"/nowhere/{name}") == 1
    said = capsys.readouterr().err
    assert all(f"{source}: " in said for source in script.EXPECTED)


def test_the_sources_exist(script: ModuleType) -> None:
    kernels = ROOT / "csrc/cuda/kernels"
    hot = {"attention_long_*", "matmul_float*", "attention_float*", "norm_stream*"}
    named = {path.stem for pattern in hot for path in kernels.glob(f"{pattern}.cu")}
    assert named | {"attention_mma", "residual_norm"} <= script.EXPECTED.keys()
    for source in script.EXPECTED:
        assert (kernels / f"{source}.cu").exists(), source


def test_the_sources_are_told(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """As the build asks for them that compiles all others quickly."""
    assert script.main(["--sources"], find=lambda name: None) == 0
    assert capsys.readouterr().out.split() == list(script.EXPECTED)
    with pytest.raises(SystemExit):
        script.main([])
    assert "build's folder" in capsys.readouterr().err
