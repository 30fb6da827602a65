"""Backend switches that training scripts set. On the CPU they have no effect."""

from types import SimpleNamespace

from vibetensor.torch.backends import cuda as cuda
from vibetensor.torch.backends import cudnn as cudnn

mps = SimpleNamespace(is_available=lambda: False, is_built=lambda: False)
