"""torch.backends.cudnn switches, read by the CUDA backend."""

allow_tf32 = True
benchmark = False
deterministic = False
enabled = True


def is_available() -> bool:
    """Whether cuDNN can be used."""
    return False


def version() -> None:
    """cuDNN's version, None where there is none."""
    return None
