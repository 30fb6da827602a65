"""torch.cuda's graphs: vibetensor's for tensors of any device, where a CUDA device can be used."""

from __future__ import annotations

from typing import Any

from vibetensor import graphs
from vibetensor.torch.cuda import _backend


class CUDAGraph(graphs.Graph):
    """See :class:`vibetensor.graphs.Graph`. Raises RuntimeError that says why no CUDA device can be
    used; ``Graph`` itself works on CPU tensors."""

    def __init__(self, keep_graph: bool = False, *, optimize: bool = True) -> None:
        _backend.required()
        super().__init__(keep_graph, optimize=optimize)


class graph(graphs.graph):
    """See :class:`vibetensor.graphs.graph`. Raises as CUDAGraph does."""

    def __init__(
        self,
        cuda_graph: graphs.Graph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "thread_local",
    ) -> None:
        _backend.required()
        super().__init__(cuda_graph, pool, stream, capture_error_mode)


def make_graphed_callables(
    callables: Any,
    sample_args: tuple[Any, ...],
    num_warmup_iters: int = 3,
    allow_unused_input: bool = False,
    pool: Any = None,
) -> Any:
    """See :func:`vibetensor.graphs.make_graphed_callables`. Raises as CUDAGraph does."""
    _backend.required()
    return graphs.make_graphed_callables(
        callables, sample_args, num_warmup_iters, allow_unused_input, pool
    )
