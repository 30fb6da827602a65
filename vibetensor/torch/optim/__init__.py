"""Optimizers and learning-rate schedules, with torch's names, state layout and numbers."""

from vibetensor.torch.optim import lr_scheduler
from vibetensor.torch.optim.adam import Adam
from vibetensor.torch.optim.adamw import AdamW
from vibetensor.torch.optim.muon import Muon
from vibetensor.torch.optim.optimizer import Optimizer
from vibetensor.torch.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Muon", "Optimizer", "lr_scheduler"]
