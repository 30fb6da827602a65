"""Stopping a kernel whose data is wrong, with a record for the host (csrc/cuda/failure.h)."""

from .dsl import Int64, cute

#: FailedCheck::CrossEntropy, as the record numbers it.
CROSS_ENTROPY = 10


@cute.jit
def stop_kernel(record: cute.Tensor, check: Int64, index: Int64, size: Int64):
    """Writes the record (check last) and traps. Several threads may come here: each word they
    write is whole and true, whoever is last."""
    record[1] = index
    record[2] = size
    cute.arch.fence_acq_rel_sys()
    record[0] = check
    cute.arch.fence_acq_rel_sys()
    cute.arch.inline_ptx("trap;")
