"""Windows that no convolution can have: errors, as in torch, and no crash."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F

X2, W2 = vt.ones(2, 3, 5, 6), vt.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.conv3d(vt.ones(2, 3, 5, 6, 7), vt.ones(4, 3, 0, 3, 3)), "kernel size"),
        (lambda: F.conv2d(X2, vt.ones(4, 3, 3, 0)), "kernel size"),
        (lambda: F.conv2d(vt.ones(2, 3, 0, 7), W2, padding=2), "Only zero batch or zero channel"),
        (lambda: F.conv1d(vt.ones(2, 3, 0), vt.ones(4, 3, 1), padding=1), "Only zero batch"),
        (lambda: F.conv2d(X2, W2, stride=0), "non-positive stride"),
        (lambda: F.conv2d(X2, W2, padding=-1), "negative padding"),
        (lambda: F.conv2d(X2, W2, dilation=0), "dilation"),
        (lambda: F.conv_transpose2d(X2, vt.ones(3, 4, 3, 3), stride=0), "non-positive stride"),
        (lambda: F.conv_transpose2d(X2, vt.ones(3, 4, 3, 3), padding=-1), "negative padding"),
        (lambda: F.conv_transpose2d(X2, vt.ones(3, 4, 3, 3), dilation=0), "dilation"),
        (lambda: F.conv_transpose1d(vt.ones(2, 3, 5), vt.ones(3, 4, 3), stride=0), "stride"),
        (lambda: F.conv_transpose2d(vt.ones(2, 3, 0, 3), vt.ones(3, 4, 3, 3)), "Only zero batch"),
        (lambda: F.conv1d(vt.ones(2, 3, 5), vt.ones(4, 3, 2), stride=(1, 2)), "list of 1 values"),
        (lambda: F.conv2d(X2, W2, stride=(1, 2, 1)), r"list of 2 values .* stride=\[1, 2, 1\]"),
        (lambda: F.conv2d(X2, W2, stride=()), "list of 2 values"),
        (lambda: F.conv2d(X2, W2, padding=(1, 1, 1)), "expected padding"),
        (lambda: F.conv2d(X2, W2, dilation=(1, 1, 1)), "expected dilation"),
        (
            lambda: F.conv_transpose2d(X2, vt.ones(3, 4, 3, 3), stride=2, output_padding=(1, 1, 1)),
            "expected output_padding",
        ),
        (lambda: F.conv2d(X2, vt.ones(0, 3, 3, 3)), "at least 1 at dimension 0"),
        (lambda: F.max_pool2d(X2, (2, 2, 2)), "kernel_size must either be"),
        (lambda: F.avg_pool2d(X2, 2, stride=(1, 2, 3)), "stride must either be"),
        (lambda: F.adaptive_avg_pool2d(X2, ()), "output_size must be 2"),
    ],
)
def test_error(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty_batches_and_windows_of_padding() -> None:
    assert F.conv2d(vt.ones(0, 3, 5, 6), W2).shape == (0, 4, 3, 4)
    columns = F.unfold(vt.ones(2, 3, 0, 7), 3, padding=2)
    assert columns.shape == (2, 27, 18)
    assert columns.abs().sum().item() == 0
