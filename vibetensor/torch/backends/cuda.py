"""torch.backends.cuda: TF32 and attention switches, read by the CUDA backend."""

from types import SimpleNamespace

matmul = SimpleNamespace(
    allow_tf32=False,
    allow_fp16_reduced_precision_reduction=True,
    allow_bf16_reduced_precision_reduction=True,
)


def is_built() -> bool:
    """Whether this build has a CUDA backend."""
    return False
