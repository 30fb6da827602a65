"""Capture mode: a training step, recorded once, optimised, planned and replayed.

``step = vibetensor.graphs.capture(train_step)`` is the door; README.md here is the way in for
developers.
"""

from vibetensor.graphs.callables import make_graphed_callables
from vibetensor.graphs.capture import CapturedStep, CaptureError, capture
from vibetensor.graphs.foreign import foreign, foreign_op
from vibetensor.graphs.graph import Graph, graph, graph_pool_handle
from vibetensor.graphs.record import Recording, record
from vibetensor.graphs.tape import Buffer, Op, Tape, View
from vibetensor.graphs.verify import CaptureMismatch

__all__ = [
    "Buffer",
    "CaptureError",
    "CaptureMismatch",
    "CapturedStep",
    "Graph",
    "Op",
    "Recording",
    "Tape",
    "View",
    "capture",
    "foreign",
    "foreign_op",
    "graph",
    "graph_pool_handle",
    "make_graphed_callables",
    "record",
]
