"""Keep probabilities as a mask that gradients pass: what distillation trains through."""

import torch
from torch.nn import functional as F


def log_keep_probability(
    importance: torch.Tensor,
    temperature: float = 1.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logarithm of the probability to be kept.

    With logistic noise (see `logistic_noise`) it is a draw from the relaxed Bernoulli distribution
    (binary concrete, arXiv 1611.00712) whose keep probability is `sigmoid(importance)`: the lower
    the temperature, the closer each draw is to a hard mask, however uncertain the importance.

    Args:
        importance: `(N,)` logits.
        temperature: positive; below 1 it sharpens.
        noise: `(N,)` added to the logits.

    Returns:
        `(N,)`, at most 0.
    """
    logits = importance if noise is None else importance + noise
    return F.logsigmoid(logits / temperature)


def logistic_noise(importance: torch.Tensor) -> torch.Tensor:
    """Draws from the standard logistic distribution, one a token, from PyTorch's random state."""
    uniform = torch.rand_like(importance, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return uniform.logit()


def annealed(start: float, end: float, progress: float) -> float:
    """A temperature that falls geometrically from `start` to `end` as progress goes from 0 to 1."""
    return start * (end / start) ** min(max(progress, 0.0), 1.0)
