"""torch.nn.attention.varlen: attention of sequences of several lengths, packed one after another."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops

__all__ = ["AuxRequest", "varlen_attn", "varlen_attn_out"]


class AuxRequest(NamedTuple):
    """What varlen_attn gives besides its result: ``lse``, the log-sum-exps."""

    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Attention of each of N sequences to itself: query (T_q, H_q, D), key (T_k, H_kv, D), value
    (T_k, H_kv, D_v), result (T_q, H_q, D_v); with ``return_aux.lse`` also the log-sum-exps (T_q, H_q).

    Sequence i has the tokens from ``cu_seq_q[i]`` to ``cu_seq_q[i + 1]`` (int32 or int64, (N + 1,)),
    and its keys likewise; either may be empty. Tokens of no sequence give zeros and get no gradient.
    ``window_size`` (left, right) is the window of keys around a query, level with it where the ends
    of queries and keys are level; -1 is without end, so (-1, 0) is causal. A query that sees no key
    gives zeros and a log-sum-exp of -inf. ``scale`` is 1/sqrt(D) by default. With ``enable_gqa``
    H_q may be a multiple of H_kv.

    All dtypes of floats, on every device; no matrix of scores is kept, and the host does not read
    ``cu_seq_q``: max_q, max_k and num_splits are accepted and not needed, results of a sequence do
    not depend on others. Gradients cannot be differentiated again.

    Raises ValueError for head counts that do not fit, RuntimeError for shapes and dtypes, and on the
    CPU for sequences outside of the tokens; NotImplementedError for ``seqused_k`` and
    ``block_table``, which inference uses.
    """
    del max_q, max_k, num_splits
    if seqused_k is not None or block_table is not None:
        raise NotImplementedError(
            "varlen_attn: seqused_k and block_table (key-value caches) do not exist here; pass keys "
            "and values of the sequences themselves"
        )
    if cu_seq_k is None:
        raise ValueError("varlen_attn: cu_seq_k may be None only with block_table")
    if query.dim() == 3 and key.dim() == 3:
        heads, key_heads = query.size(1), key.size(1)
        if not enable_gqa and heads != key_heads:
            raise ValueError(
                f"Expect query and key/value to have the same number of heads but got Hq={heads} "
                f"and Hkv={key_heads}. Try setting enable_gqa=True for GQA."
            )
        if enable_gqa and (key_heads == 0 or heads % key_heads != 0):
            raise ValueError(
                "Expect number of query heads to be a multiple of kv heads for GQA but got "
                f"Hq={heads} and Hkv={key_heads}."
            )
    left, right = window_size
    factor = 1 / math.sqrt(max(query.size(-1), 1)) if scale is None else scale
    out, lse = _ops._attention_varlen(query, key, value, cu_seq_q, cu_seq_k, left, right, factor)
    if return_aux is not None and return_aux.lse:
        return out, lse.detach().t()
    return out


def varlen_attn_out(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """varlen_attn, copied into ``out``, without gradients."""
    with _no_grad():
        result = varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux,
            scale=scale, window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k,
            block_table=block_table, num_splits=num_splits,
        )  # fmt: skip
        if isinstance(result, tuple):
            return out.copy_(result[0]), result[1]
        return out.copy_(result)


def _no_grad() -> Any:
    from vibetensor.torch.autograd.grad_mode import no_grad

    return no_grad()
