"""`vibetensor.safetensors`: the short name of `vibetensor.io.safetensors`."""

from vibetensor.io.safetensors import *  # noqa: F403
