"""Learning-rate schedules that give torch's numbers step for step.

``scheduler.step()`` comes after ``optimizer.step()``. State dicts have torch's keys.
"""

from vibetensor.torch.optim.lr_scheduler.base import LRScheduler
from vibetensor.torch.optim.lr_scheduler.compose import ChainedScheduler, SequentialLR
from vibetensor.torch.optim.lr_scheduler.cosine import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
)
from vibetensor.torch.optim.lr_scheduler.cyclic import CyclicLR, OneCycleLR
from vibetensor.torch.optim.lr_scheduler.decay import (
    ConstantLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)
from vibetensor.torch.optim.lr_scheduler.function import LambdaLR, MultiplicativeLR
from vibetensor.torch.optim.lr_scheduler.plateau import ReduceLROnPlateau

_LRScheduler = LRScheduler  # the old name, still imported by scripts

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]
