"""Layers, parameters, initialisers and functions: torch.nn's names and behaviour."""

from vibetensor.torch.nn import attention as attention
from vibetensor.torch.nn import functional as functional
from vibetensor.torch.nn import init as init
from vibetensor.torch.nn import modules as modules
from vibetensor.torch.nn import parameter as parameter
from vibetensor.torch.nn import utils as utils
from vibetensor.torch.nn.modules import *  # noqa: F403
from vibetensor.torch.nn.modules import __all__ as _layers
from vibetensor.torch.nn.parameter import Buffer as Buffer
from vibetensor.torch.nn.parameter import Parameter as Parameter

__all__ = [*_layers, "Buffer", "Parameter", "functional", "init", "modules", "parameter", "utils"]
