"""Tokens drawn blindly: what a method has to beat, and many published ones do not.

UniPruneBench (arXiv 2511.02650) reports random pruning ahead of several methods.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .prompt_tokens import PromptTokens
from .scorer import Scorer


@dataclass(frozen=True)
class RandomTokens(Scorer):
    """Every set of tokens is equally likely; a question's draw depends on nothing but the seed.

    Attributes:
        seed: of the draws.
    """

    seed: int = 0

    def scores(self, prompt: PromptTokens) -> torch.Tensor:
        generator = np.random.default_rng([self.seed, prompt.number])
        ranks = torch.from_numpy(generator.permutation(len(prompt)))
        return ranks.float().to(prompt.geometry.device)
