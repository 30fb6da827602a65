"""Attention: the fused kernel, and multi-head attention around it."""

from __future__ import annotations

import math
import warnings
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ * scale + mask) V, without the (L, S) matrix in memory.

    query (…, Hq, L, E), key (…, H, S, E), value (…, H, S, Ev), result (…, Hq, L, Ev).
    ``attn_mask`` broadcasts to (…, L, S): boolean (True takes part) or added to the scores.
    ``scale`` None is 1 / sqrt(E). ``enable_gqa`` lets Hq be a multiple of H. ``dropout_p``
    applies whenever it is not 0.
    """
    return _ops.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def canonical_mask(mask: Tensor | None, dtype: Any, name: str) -> Tensor | None:
    """A mask to add: boolean ones (True is excluded) become -inf and 0. Raises AssertionError for
    other than boolean and floating masks."""
    if mask is None:
        return None
    if mask.dtype is _C.bool:
        zeros = _ops.zeros(tuple(mask.shape), dtype=dtype, device=mask.device)
        return zeros.masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise AssertionError(
            f"only bool and floating types of {name} are supported, got {mask.dtype}"
        )
    return mask


def canonical_masks(
    mask: Tensor | None, padding: Tensor | None, dtype: Any, names: tuple[str, str]
) -> tuple[Tensor | None, Tensor | None]:
    """canonical_mask of both; warns if they are given in different dtypes."""
    if mask is not None and padding is not None and mask.dtype is not padding.dtype:
        warnings.warn(
            f"{names[0]} is {mask.dtype} and {names[1]} {padding.dtype}: masks of different types "
            "are deprecated, give both in the same one.",
            stacklevel=4,
        )
    return canonical_mask(mask, dtype, names[0]), canonical_mask(padding, dtype, names[1])


def _project(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """q, k, v from one (3E, E) weight: in one GEMM where they are the same tensor."""
    if key is value and query is key:
        return list(_ops.linear(query, weight, bias).chunk(3, -1))
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [_ops.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention on (L, N, E) query and (S, N, ·) key and value, or without N.

    ``key_padding_mask`` (N, S) and ``attn_mask`` (L, S) or (N·heads, L, S): boolean (True is
    excluded) or added. Keys that ``bias_k`` and ``add_zero_attn`` append are open to every query.
    Returns the output in query's shape and, with ``need_weights``, the weights (N, L, S), averaged
    over heads or (N, heads, L, S).
    """
    batched = query.dim() == 3
    _check_shapes(query, key, value, key_padding_mask, attn_mask, num_heads)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the "
            "Transformer module method `generate_square_subsequent_mask` to create this mask."
        )
    # The kernel's own causal mask knows nothing of keys that are appended.
    appends = add_zero_attn or bias_k is not None
    use_causal_kernel = is_causal and key_padding_mask is None and not need_weights and not appends
    mask, padding = canonical_masks(
        None if use_causal_kernel else attn_mask,
        key_padding_mask,
        query.dtype,
        ("attn_mask", "key_padding_mask"),
    )
    if not batched:
        same_kv, same_qk = key is value, query is key
        query = query.unsqueeze(1)
        key = query if same_qk else key.unsqueeze(1)
        value = key if same_kv else value.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)

    length, batch, embed = query.shape
    if embed != embed_dim_to_check:
        raise AssertionError(
            f"was expecting embedding dimension of {embed_dim_to_check}, but got {embed}"
        )
    head = embed // num_heads
    if head * num_heads != embed:
        raise AssertionError(f"embed_dim {embed} not divisible by num_heads {num_heads}")

    if use_separate_proj_weight:
        if q_proj_weight is None or k_proj_weight is None or v_proj_weight is None:
            raise AssertionError("use_separate_proj_weight is True but a projection weight is None")
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (_ops.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    else:
        if in_proj_weight is None:
            raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
        q, k, v = _project(query, key, value, in_proj_weight, in_proj_bias)

    extra = 0
    if bias_k is not None and bias_v is not None:
        k = _ops.cat([k, bias_k.expand(1, batch, -1)])
        v = _ops.cat([v, bias_v.expand(1, batch, -1)])
        extra += 1

    # (L, N, E) to (N, heads, L, head).
    q = q.reshape(length, batch, num_heads, head).permute(1, 2, 0, 3)
    k, v = (
        _heads(x, static, batch, num_heads, head) for x, static in ((k, static_k), (v, static_v))
    )
    if padding is not None and tuple(padding.shape) != (batch, k.shape[2] - extra):
        raise AssertionError(
            f"Expected key_padding_mask of shape {(batch, k.shape[2] - extra)}, but got "
            f"{tuple(padding.shape)}"
        )
    if add_zero_attn:
        zeros = _ops.zeros((batch, num_heads, 1, head), dtype=k.dtype, device=k.device)
        k, v = _ops.cat([k, zeros], 2), _ops.cat([v, zeros], 2)
        extra += 1

    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.reshape(batch, num_heads, *mask.shape[1:])
        mask = _ops.pad(mask, (0, extra), "constant", 0.0) if extra else mask
    if padding is not None:
        padding = _ops.pad(padding, (0, extra), "constant", 0.0) if extra else padding
        padding = padding.reshape(batch, 1, 1, -1)
        mask = padding if mask is None else mask + padding

    p = dropout_p if training else 0.0
    if need_weights:
        scores = _ops.matmul(q * math.sqrt(1.0 / head), k.transpose(-2, -1))
        weights = _ops.softmax(scores if mask is None else scores + mask, -1, None)
        if p > 0.0:
            weights = _ops.dropout(weights, p, True)
        context = _ops.matmul(weights, v)
    else:
        weights = None
        context = _ops.scaled_dot_product_attention(q, k, v, mask, p, use_causal_kernel)
    context = context.permute(2, 0, 1, 3).reshape(length, batch, embed)
    output = _ops.linear(context, out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        output = output.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    return output, weights


def _heads(x: Tensor, static: Tensor | None, batch: int, num_heads: int, head: int) -> Tensor:
    """Keys or values as (N, heads, S, head); a given (N·heads, S, head) tensor replaces them."""
    if static is not None:
        if static.dim() != 3 or static.shape[0] != batch * num_heads or static.shape[2] != head:
            raise AssertionError(
                f"static_k and static_v must be {(batch * num_heads, 'S', head)}, got "
                f"{tuple(static.shape)}"
            )
        return static.reshape(batch, num_heads, -1, head)
    if x.shape[1] != batch:
        raise RuntimeError(f"key and value have batch size {x.shape[1]}, but query has {batch}")
    return x.reshape(-1, batch, num_heads, head).permute(1, 2, 0, 3)


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
) -> None:
    """Raises AssertionError (as torch does) for shapes that do not belong together."""
    ndim = query.dim()
    if ndim not in (2, 3):
        raise AssertionError(
            f"query should be unbatched 2D or batched 3D tensor but received {ndim}-D query tensor"
        )
    if key.dim() != ndim or value.dim() != ndim:
        raise AssertionError(
            f"For a {ndim}-D query, expected key and value to be {ndim}-D but found "
            f"{key.dim()}-D and {value.dim()}-D tensors"
        )
    if key.shape[: ndim - 1] != value.shape[: ndim - 1]:
        raise AssertionError(
            f"key's sequence and batch dims {tuple(key.shape[: ndim - 1])} do not match value's "
            f"{tuple(value.shape[: ndim - 1])}"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != ndim - 1:
        raise AssertionError(
            f"For a {ndim}-D query, expected key_padding_mask to be None or {ndim - 1}-D but found "
            f"{key_padding_mask.dim()}-D"
        )
    if attn_mask is None:
        return
    length, source = query.shape[0], key.shape[0]
    batch = query.shape[1] if ndim == 3 else 1
    wanted = (length, source) if attn_mask.dim() == 2 else (batch * num_heads, length, source)
    if attn_mask.dim() not in (2, 3):
        raise RuntimeError(f"attn_mask's dimension {attn_mask.dim()} is not supported")
    if tuple(attn_mask.shape) != wanted:
        raise RuntimeError(
            f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but "
            f"should be {wanted}."
        )
