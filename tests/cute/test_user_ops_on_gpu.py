"""Users' kernels on a Hopper GPU: eagerly, with gradients, captured, and where they do not apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor.cute_kernels import user_ops
from vibetensor.graphs import capture

pytest.importorskip("cutlass", reason="needs the CuTe DSL")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(scope="module")
def op(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The example, compiled just in time into an empty cache folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.syspath_prepend(str(EXAMPLES))
    import scale_add_gelu

    known = user_ops.registered()["example::scale_add_gelu"]
    native = known.native()
    assert native is not None, known._problem
    assert known.find() is not None  # on disk now
    patch.undo()
    return scale_add_gelu.scale_add_gelu


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VT_KERNEL_LOG", "1")
    user_ops._told.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_float64(op: Any, dtype: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ((8,), (3, 5, 8), (4097, 520)):
        x, y = (torch.randn(*shape, device="cuda").to(dtype) for _ in range(2))
        got = op(x, y, 0.75)
        want = F.gelu(x.double() * 0.75 + y.double())
        limit = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
        assert bool(((got.double() - want).abs() <= limit * want.abs().clamp(min=0.1)).all())
        assert got.dtype == dtype
    told = capsys.readouterr().err
    assert f"CuTe {str(dtype).rpartition('.')[2]}" in told and "the reference" not in told


def test_where_it_does_not_apply(op: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.randn(17, device="cuda")
    x, y = whole[1:], torch.randn(16, device="cuda")  # 4 bytes past a multiple of 16
    torch.testing.assert_close(op(x, y, 2.0), F.gelu(torch.add(y, x, alpha=2.0)))
    assert "x is not aligned to 16 bytes" in capsys.readouterr().err


def test_gradients(op: Any) -> None:
    x, y = (torch.randn(64, device="cuda", requires_grad=True) for _ in range(2))
    seed = torch.randn(64, device="cuda")
    got = torch.autograd.grad(op(x, y, 1.5), (x, y), seed)
    want = torch.autograd.grad(F.gelu(torch.add(y, x, alpha=1.5)), (x, y), seed)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def train(op: Any, captured: bool) -> tuple[list[float], Any]:
    torch.manual_seed(3)
    w = torch.randn(64, 128, device="cuda").requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=0.05)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = op(w, x, 1.25).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = capture(step) if captured else step
    losses = [run(torch.randn(64, 128, device="cuda")).item() for _ in range(8)]
    return losses, run


def test_in_a_captured_step(op: Any) -> None:
    eager, _ = train(op, captured=False)
    captured, step = train(op, captured=True)
    assert captured == pytest.approx(eager, rel=1e-5)
    assert "_foreign" in str(step.variants[0].recording.tape)
