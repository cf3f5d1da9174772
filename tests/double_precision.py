"""Double precision throughout, for finite differences: the stock norms compute in float32."""

from functools import partial

import torch
from torch import nn


def in_double_precision(model: nn.Module) -> nn.Module:
    """The same model in double precision, its RMS norms included. Eager attention stays out."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            module.forward = partial(_rms_norm, module.weight, eps)
    return model.double()


def as_double(value: object) -> object:
    """A float tensor in double precision; anything else as it is."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _rms_norm(weight: nn.Parameter, eps: float, states: torch.Tensor) -> torch.Tensor:
    return weight * states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()
