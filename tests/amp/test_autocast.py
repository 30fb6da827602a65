"""Autocast regions: dtypes inside, nesting, decorators, autograd functions; torch as reference."""

import threading

import pytest

import vibetensor.torch as vt
from tests.device import DEVICE

DTYPE = {"cpu": vt.bfloat16, "cuda": vt.float16}[DEVICE]  # what a region computes in by default


def outputs(api, **options):
    """Dtypes of ops of each autocast kind inside a region."""
    x, w = api.ones(4, 4, device=DEVICE), api.ones(4, 4, device=DEVICE)
    h = x.to(api.bfloat16)
    F = api.nn.functional
    with api.autocast(DEVICE, **options):
        results = {
            "matmul": x @ w,
            "linear": F.linear(x, w),
            "bmm": api.bmm(x[None], w[None]),
            "softmax": F.softmax(x, dim=-1),
            "layer_norm": F.layer_norm(x, (4,)),
            "cross_entropy": F.cross_entropy(h, api.tensor([0, 1, 2, 3], device=DEVICE)),
            "mse": F.mse_loss(h, h),
            "add": x + h,
            "relu": F.relu(h),
            "cat": api.cat([x, h]),
            "double": x.double() @ w.double(),
        }
    return {name: str(value.dtype) for name, value in results.items()}


@pytest.mark.parametrize("options", [{}, {"enabled": False}, {"cache_enabled": False}])
def test_dtypes_inside_are_torchs(options, torch):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device to compare with")
    ours = outputs(vt, **options)
    assert ours == outputs(torch, **options)
    assert ours["matmul"] == ("torch.float32" if options.get("enabled") is False else str(DTYPE))


def test_disabled_region_inside_another(torch):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device to compare with")
    seen = []
    for api in (vt, torch):
        with api.autocast(DEVICE):
            seen.append([outputs(api, enabled=False), outputs(api)])
    assert seen[0] == seen[1]
    assert seen[0][0]["matmul"] == "torch.float32" and seen[0][1]["matmul"] == str(DTYPE)


def test_region_of_the_other_dtype():
    other = {vt.bfloat16: vt.float16, vt.float16: vt.bfloat16}[DTYPE]
    with vt.autocast(DEVICE, dtype=other):
        assert vt.get_autocast_dtype(DEVICE) == other
        assert (vt.ones(2, 2) @ vt.ones(2, 2)).dtype == other
    assert vt.get_autocast_dtype(DEVICE) == DTYPE


def test_regions_nest_and_restore(torch):
    def states(api):
        seen = []

        def note():
            seen.append((api.is_autocast_enabled(DEVICE), str(api.get_autocast_dtype(DEVICE))))

        note()
        with api.autocast(DEVICE):
            note()
            with api.autocast(DEVICE, enabled=False):
                note()
                with api.autocast(DEVICE, dtype=api.float16):
                    note()
                note()
            note()
        note()
        return seen

    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device to compare with")
    assert states(vt) == states(torch)


def test_an_exception_restores():
    with pytest.raises(KeyError), vt.autocast(DEVICE):
        raise KeyError
    assert not vt.is_autocast_enabled(DEVICE)


def test_one_region_object_may_be_entered_again():
    region = vt.autocast(DEVICE)
    with region, region:
        assert vt.is_autocast_enabled(DEVICE)
    assert not vt.is_autocast_enabled(DEVICE)


def test_decorator():
    @vt.autocast(DEVICE)
    def depth(n):
        assert vt.is_autocast_enabled(DEVICE)
        return n if n == 0 else depth(n - 1)

    assert depth(3) == 0
    assert depth.__name__ == "depth"
    assert not vt.is_autocast_enabled(DEVICE)


def test_other_threads_are_not_in_the_region():
    seen = []
    with vt.autocast(DEVICE):
        thread = threading.Thread(target=lambda: seen.append(vt.is_autocast_enabled(DEVICE)))
        thread.start()
        thread.join()
    assert seen == [False]


def test_gradients_have_the_weights_dtype():
    w = vt.ones(3, 3, requires_grad=True)
    with vt.autocast(DEVICE):
        loss = (vt.ones(2, 3) @ w).float().sum()
    loss.backward()
    assert w.grad.dtype == vt.float32
    assert w.grad.tolist() == [[2.0] * 3] * 3


def test_a_weight_used_twice_is_cast_once_per_region():
    """The cached cast of a weight must not survive the region in which the weight changed."""
    w = vt.nn.Parameter(vt.ones(2, 2))
    x = vt.ones(1, 2)
    with vt.autocast(DEVICE):
        first = x @ w
    with vt.no_grad():
        w.mul_(3)
    with vt.autocast(DEVICE):
        second = x @ w
    assert first.tolist() == [[2.0, 2.0]]
    assert second.tolist() == [[6.0, 6.0]]


def test_unsupported_requests():
    with pytest.warns(UserWarning, match="not supported"):
        region = vt.autocast(DEVICE, dtype=vt.float32)
    with region:
        assert not vt.is_autocast_enabled(DEVICE)
    with pytest.raises(RuntimeError, match="xyz"):
        vt.autocast("xyz")
    with pytest.raises(ValueError, match="of type `str`"):
        vt.autocast(vt.device("cpu"))
    with pytest.raises(TypeError, match="requires a callable"):
        vt.autocast(DEVICE)(3)
    assert vt.amp.is_autocast_available(DEVICE)
    assert not vt.amp.is_autocast_available("xyz")


def test_custom_function_runs_backward_as_forward_did():
    seen = []

    class Square(vt.autograd.Function):
        @staticmethod
        @vt.amp.custom_fwd(device_type=DEVICE)
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @vt.amp.custom_bwd(device_type=DEVICE)
        def backward(ctx, grad):
            seen.append(vt.is_autocast_enabled(DEVICE))
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    x = vt.ones(2, requires_grad=True)
    with vt.autocast(DEVICE):
        y = Square.apply(x)
    y.sum().backward()
    Square.apply(x).sum().backward()
    assert seen == [True, False]
    assert x.grad.tolist() == [4.0, 4.0]


def test_cast_inputs():
    seen = []

    class Identity(vt.autograd.Function):
        @staticmethod
        @vt.amp.custom_fwd(device_type=DEVICE, cast_inputs=vt.float32)
        def forward(ctx, x, pair):
            seen.append((str(x.dtype), str(pair[0].dtype), vt.is_autocast_enabled(DEVICE)))
            return x.clone()

        @staticmethod
        @vt.amp.custom_bwd(device_type=DEVICE)
        def backward(ctx, grad):
            return grad, None

    h = vt.ones(2, dtype=vt.bfloat16)
    with vt.autocast(DEVICE):
        Identity.apply(h, (h,))
    Identity.apply(h, (h,))
    assert seen == [
        ("torch.float32", "torch.float32", False),
        ("torch.bfloat16", "torch.bfloat16", False),
    ]


def test_enabled_and_dtype_setters():
    vt.set_autocast_dtype(DEVICE, vt.float16)
    try:
        with vt.autocast(DEVICE):
            assert vt.get_autocast_dtype(DEVICE) == vt.float16
    finally:
        vt.set_autocast_dtype(DEVICE, DTYPE)
    vt.set_autocast_enabled(DEVICE, True)
    try:
        assert vt.is_autocast_enabled(DEVICE)
    finally:
        vt.set_autocast_enabled(DEVICE, False)
    assert not vt.is_autocast_enabled(DEVICE)
