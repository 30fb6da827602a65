"""Multi-head attention by itself: added keys, and masks and keys of wrong shapes."""

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.torch import nn

CAUSAL = vt.ones(5, 5, dtype=vt.bool).triu(1)


def close(a, b):
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "added",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
)
@pytest.mark.parametrize("batched", [False, True])
def test_causal_attention_with_added_keys(added, batched):
    vt.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **added)
    x = vt.randn(5, 3, 8) if batched else vt.randn(5, 8)
    hinted = {"attn_mask": CAUSAL, "is_causal": True}
    fused, _ = layer(x, x, x, need_weights=False, **hinted)
    plain, weights = layer(x, x, x, need_weights=True, **hinted)
    close(fused, plain)
    close(plain, layer(x, x, x, attn_mask=CAUSAL)[0])
    assert weights.shape[-2:] == (5, 5 + len(added))
    assert bool((weights[..., :5].triu(1) == 0).all())
    assert bool((weights[..., 5:] > 0).all())
    # What comes later does not change the first outputs.
    later = x.clone()
    later[3:] += 1
    for need_weights in (False, True):
        again, _ = layer(later, later, later, need_weights=need_weights, **hinted)
        close(again[:3], plain[:3])
        assert not vt.allclose(again[3:], plain[3:])


def test_shape_of_the_key_padding_mask():
    layer, x = nn.MultiheadAttention(4, 2), vt.ones(5, 2, 4)
    for shape in [(5, 2), (1, 10), (10, 1), (2, 1), (1, 5), (2, 6)]:
        for need_weights in (False, True):
            with pytest.raises(AssertionError, match=r"of shape \(2, 5\)"):
                mask = vt.zeros(shape, dtype=vt.bool)
                layer(x, x, x, key_padding_mask=mask, need_weights=need_weights)
    with pytest.raises(AssertionError, match="key_padding_mask"):
        layer(x[:, 0], x[:, 0], x[:, 0], key_padding_mask=vt.zeros(6, dtype=vt.bool))
    added = nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True)
    mask = vt.tensor([[False] * 5, [False, True, True, False, True]])
    _, weights = added(x, x, x, key_padding_mask=mask)
    assert weights.shape == (2, 5, 7)
    assert bool(((weights[1, :, :5] == 0) == mask[1]).all()) and bool((weights[0] > 0).all())


def test_keys_of_another_batch_size():
    layer, x = nn.MultiheadAttention(4, 2), vt.ones(5, 2, 4)
    narrow = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    # Each of these has as many elements as some keys for two samples.
    for shape in [(3, 4), (6, 1), (4, 3)]:
        with pytest.raises(RuntimeError, match="batch size"):
            layer(x, vt.ones(*shape, 4), vt.ones(*shape, 4))
        with pytest.raises(RuntimeError, match="batch size"):
            narrow(x, vt.ones(*shape, 3), vt.ones(*shape, 3), need_weights=False)


def test_types_of_masks():
    layer, x = nn.MultiheadAttention(4, 2), vt.ones(5, 2, 4)
    encoder = nn.TransformerEncoderLayer(4, 2, 8)
    for name, shape in (("attn_mask", (5, 5)), ("key_padding_mask", (2, 5))):
        with pytest.raises(AssertionError, match=f"types of {name} are supported"):
            layer(x, x, x, **{name: vt.zeros(shape, dtype=vt.int64)})
    floats, bools = vt.zeros(5, 5), vt.zeros(2, 5, dtype=vt.bool)
    with pytest.warns(UserWarning, match="attn_mask is torch.float32 and key_padding_mask"):
        layer(x, x, x, attn_mask=floats, key_padding_mask=bools)
    with pytest.warns(UserWarning, match="src_mask is torch.float32") as seen:
        encoder(x, floats, bools)
    assert len(seen) == 1
    layer(x, x, x, attn_mask=floats, key_padding_mask=bools.float())


def test_shape_of_static_keys():
    layer, x = nn.MultiheadAttention(4, 2), vt.ones(5, 2, 4)

    def attend(static):
        return nn.functional.multi_head_attention_forward(
            x, x, x, 4, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias, static_k=static, static_v=static,
        )  # fmt: skip

    assert attend(vt.ones(4, 3, 2))[1].shape == (2, 5, 3)
    for shape in [(2, 6, 2), (4, 3, 4), (4, 6)]:
        with pytest.raises(AssertionError, match="static_k"):
            attend(vt.ones(shape))
