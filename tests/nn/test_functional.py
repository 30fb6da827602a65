"""functional and its layers by themselves: sizes they take, inputs they refuse, warnings."""

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.torch import nn

F = nn.functional


@pytest.mark.parametrize(
    ("loss", "mean"),
    # The elements are 0.5 and 1.5 (huber), 1 and 4, 1 and 2; weights 1 and 3.
    [(F.huber_loss, 5 / 2), (F.mse_loss, 13 / 4), (F.l1_loss, 7 / 4)],
)
def test_weighted_losses(loss, mean):
    x, zeros, weight = vt.tensor([1.0, 2.0]), vt.zeros(2), vt.tensor([1.0, 3.0])
    assert loss(x, zeros, weight=weight).item() == mean
    total = loss(x, zeros, weight=weight, reduction="sum")
    assert total.item() == loss(x, zeros, weight=weight, reduction="none").sum().item()
    assert total.item() == mean * (2 if loss is F.huber_loss else 4)
    with pytest.raises(ValueError, match="same size"):
        loss(x, zeros, weight=vt.ones(1))


def dropped_slices(out, leading):
    """Which slices, one for each index of the leading dimensions, are zero; each is all one value."""
    flat = out.numpy().reshape(*out.shape[:leading], -1)
    assert (flat.min(-1) == flat.max(-1)).all()
    return flat[..., 0] == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_of_channels(inplace):
    vt.manual_seed(0)
    for function, shape, leading in [
        (F.dropout1d, (40, 5), 1),
        (F.dropout1d, (20, 10, 5), 2),
        (F.dropout2d, (20, 10, 3, 2), 2),
    ]:
        x = vt.ones(shape)
        out = function(x, 0.5, inplace=inplace)
        dropped = dropped_slices(out, leading)
        assert 0.2 < dropped.mean() < 0.8 and (out is x) is inplace
    for shape in [(20, 10), (20, 10, 5), (20, 10, 2, 3, 2)]:
        x = vt.ones(shape)
        with pytest.warns(UserWarning, match=r"N, C"):
            out = F.dropout2d(x, 0.5, inplace=inplace)
        # Samples and channels are drawn one by one.
        dropped = dropped_slices(out, 2)
        assert 0.2 < dropped.mean() < 0.8 and (out is x) is inplace
        assert all(0 < side.mean() < 1 for side in (*dropped, *dropped.T))
    with pytest.warns(UserWarning, match=r"read as \(N, C, L\)"):
        nn.Dropout2d()(vt.ones(2, 3, 4))


def test_dropout_of_channels_needs_channels():
    for shape in [(), (4,), (2, 3, 4, 5)]:
        with pytest.raises(RuntimeError, match="dropout1d"):
            F.dropout1d(vt.ones(shape))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="at least 2 dimensions"):
        F.dropout2d(vt.ones(4))
    with pytest.warns(UserWarning):
        assert F.dropout2d(vt.ones(4), training=False).tolist() == [1, 1, 1, 1]
    with pytest.warns(UserWarning):
        assert F.dropout2d(vt.ones(4), 1.0).tolist() == [0, 0, 0, 0]


def test_linear_of_a_vector_of_weights():
    x, w = vt.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), vt.tensor([1.0, 0.0, 2.0])
    w.requires_grad_()
    assert F.linear(x, w).tolist() == [7, 16]
    assert F.linear(x[0], w).item() == 7
    assert F.linear(vt.stack([x, x]), w, vt.tensor(1.0)).tolist() == [[8, 17]] * 2
    F.linear(x, w).sum().backward()
    assert w.grad.tolist() == [5, 7, 9]
    out = vt.empty(0)
    with vt.no_grad():
        assert F.linear(x, w, vt.tensor(-1.0), out=out) is out and out.tolist() == [6, 15]
    # One number as the bias of every output.
    assert F.linear(x, vt.eye(3), vt.tensor(1.0)).tolist() == [[2, 3, 4], [5, 6, 7]]
    for bias in (vt.ones(1), vt.ones(2), vt.ones(1, 1)):
        with pytest.raises(RuntimeError, match="bias"):
            F.linear(x, w, bias)
    with pytest.raises(RuntimeError, match="mismatch"):
        F.linear(x, vt.ones(2))


THREE, TWO, ONE = np.int64(3), np.int32(2), np.int64(1)

# (layer, arguments, the same as plain numbers, input shape)
SIZES = [
    (nn.Conv1d, (3, 8, THREE, [2], [1], [1]), (3, 8, 3, 2, 1, 1), (1, 3, 5)),
    (nn.Conv2d, (3, 8, THREE, TWO, ONE, ONE), (3, 8, 3, 2, 1, 1), (1, 3, 5, 5)),
    (nn.Conv2d, (3, 8, np.array([3, 2])), (3, 8, (3, 2)), (1, 3, 5, 5)),
    (nn.Conv2d, (3, 8, [THREE, 2], 1, "same"), (3, 8, (3, 2), 1, "same"), (1, 3, 5, 5)),
    (nn.Conv3d, (3, 8, TWO), (3, 8, 2), (1, 3, 2, 2, 2)),
    (nn.LayerNorm, (THREE,), (3,), (2, 3)),
    (nn.LayerNorm, ([TWO, THREE],), ((2, 3),), (2, 3)),
    (nn.RMSNorm, (THREE,), (3,), (2, 3)),
    (nn.RMSNorm, (np.array([2, 3]),), ((2, 3),), (2, 3)),
    (nn.AvgPool1d, ([2], [1], [1]), (2, 1, 1), (1, 3, 6)),
    (nn.AvgPool1d, (TWO, ONE, ONE), (2, 1, 1), (1, 3, 6)),
    (nn.MaxPool1d, (TWO, ONE, ONE, ONE, True), (2, 1, 1, 1, True), (1, 3, 6)),
    (nn.MaxPool1d, ([2], [1], [1], [1], True), (2, 1, 1, 1, True), (1, 3, 6)),
    (nn.AdaptiveAvgPool2d, (TWO,), (2,), (1, 3, 6, 6)),
    (nn.AdaptiveAvgPool2d, ([TWO, None],), ((2, None),), (1, 3, 6, 6)),
    (nn.TransformerEncoderLayer, (np.int64(4), TWO, THREE), (4, 2, 3), (5, 1, 4)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("layer", "args", "plain", "shape"), SIZES)
def test_sizes_as_numpy_integers_and_lists(layer, args, plain, shape):
    vt.manual_seed(0)
    made = layer(*args).eval()
    vt.manual_seed(0)
    wanted = layer(*plain).eval()
    if layer not in (nn.MaxPool1d, nn.AdaptiveAvgPool2d):  # these keep what they were given
        assert repr(made) == repr(wanted)
    x = vt.randn(shape)
    ours, theirs = made(x), wanted(x)
    for a, b in zip(ours, theirs) if isinstance(ours, tuple) else [(ours, theirs)]:
        assert a.shape == b.shape and bool((a == b).all())


def test_same_padding_with_numpy_integers():
    x, w = vt.ones(1, 1, 5, 5), vt.ones(1, 1, 3, 3)
    assert F.conv2d(x, w, None, ONE, "same", TWO).shape == (1, 1, 5, 5)


@pytest.mark.parametrize("bad", [2.0, None, "2"])
def test_sizes_that_are_no_integers(bad):
    for make in (
        lambda: nn.Conv2d(1, 1, bad),
        lambda: nn.LayerNorm(bad),
        lambda: nn.AvgPool1d(bad),
    ):
        with pytest.raises(TypeError):
            make()


def test_same_padding_of_even_kernels_warns():
    with pytest.warns(UserWarning, match="Using padding='same'"):
        y = F.conv1d(vt.ones(1, 1, 3), vt.ones(1, 1, 2), padding="same")
    assert y.tolist() == [[[2, 2, 1]]]
    F.conv1d(vt.ones(1, 1, 3), vt.ones(1, 1, 3), padding="same")
    F.conv1d(vt.ones(1, 1, 3), vt.ones(1, 1, 2), padding="same", dilation=2)


def test_instance_norm_of_one_element():
    for shape in [(2, 3), (2, 3, 1), (1, 3, 1, 1)]:
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            F.instance_norm(vt.ones(shape))
    one = F.instance_norm(vt.ones(2, 3, 1), vt.zeros(3), vt.ones(3), use_input_stats=False, eps=0)
    assert one.tolist() == [[[1]] * 3] * 2


def test_output_size_of_adaptive_pools():
    x = vt.ones(2, 3, 8, 6)
    assert F.adaptive_avg_pool2d(x, (None, 2)).shape == (2, 3, 8, 2)
    for size in [(), (2,), (None,), (2, 2, 2), (2, 2, 2, 2)]:
        with pytest.raises(RuntimeError, match="output_size must be 2"):
            F.adaptive_avg_pool2d(x, size)
    with pytest.raises(RuntimeError, match="output_size"):
        F.adaptive_avg_pool1d(x[0], (2, 2))
    with pytest.raises(RuntimeError, match="one dimension"):
        F.max_pool1d(x[0], (2, 2), return_indices=True)


def test_old_names_of_hardtanh():
    with pytest.warns(FutureWarning, match="min_val"):
        layer = nn.Hardtanh(min_value=-2.0)
    assert repr(layer) == "Hardtanh(min_val=-2.0, max_val=1.0)"
    with pytest.warns(FutureWarning, match="max_val"):
        layer = nn.Hardtanh(max_value=0.5)
    assert layer(vt.tensor([-3.0, 0.25, 3.0])).tolist() == [-1, 0.25, 0.5]


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (4, 2, 0, 3)])
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_a_batch_of_nothing_leaves_running_statistics(
    shape: tuple[int, ...], momentum: float | None
) -> None:
    norm = vt.nn.BatchNorm2d(2, momentum=momentum)
    assert norm(vt.zeros(shape)).shape == shape
    assert norm.running_mean.tolist() == [0.0, 0.0] and norm.running_var.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets_have_no_gradient(reduction: str) -> None:
    x = vt.zeros(2, 3, requires_grad=True)
    loss = F.nll_loss(x, vt.tensor([-100, -100]), reduction=reduction)
    loss.sum().backward()
    assert x.grad.tolist() == [[0.0] * 3] * 2
    assert loss.isnan().all() == (reduction == "mean")


@pytest.mark.parametrize("shape", [(2, 4, 3), (0, 4, 3)])
def test_group_norm_keeps_the_inputs_dtype(shape: tuple[int, ...]) -> None:
    x = vt.ones(shape, dtype=vt.bfloat16)
    assert F.group_norm(x, 2, vt.ones(4), vt.zeros(4)).dtype == vt.bfloat16
    assert vt.nn.GroupNorm(2, 4)(x).dtype == vt.bfloat16
