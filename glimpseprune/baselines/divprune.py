"""DivPrune (arXiv 2503.02175): keep the tokens that are most unlike one another.

The token whose nearest other token is farthest comes first; then, again and again, the token
farthest from all those chosen (the greedy answer to the max-min diversity problem). Distance is one
minus the cosine similarity of the embeddings that the decoder takes. Simplified: kept tokens keep
their positions.
"""

import torch
from torch.nn.functional import normalize

from .model_sizes import ModelSizes
from .prompt_tokens import PromptTokens
from .scorer import Scorer


class DivPrune(Scorer):
    """Scores fall in the order in which tokens are chosen; the others have 0."""

    reads_embeddings = True

    def scores(self, prompt: PromptTokens) -> torch.Tensor:
        scores = torch.zeros(len(prompt.embeddings), device=prompt.embeddings.device)
        chosen = most_diverse(prompt.embeddings, prompt.budget)
        scores[chosen] = torch.arange(len(chosen), 0, -1, device=scores.device).float()
        return scores

    def flops(self, sizes: ModelSizes, visual: int) -> int:
        return 2 * visual**2 * sizes.hidden


def most_diverse(embeddings: torch.Tensor, number: int) -> torch.Tensor:
    """Indices `(number,)` of the rows of `(n, hidden)` in the order in which they are chosen."""
    directions = normalize(embeddings.float(), dim=-1)
    distance = 1 - directions @ directions.T
    alone = distance.clone().fill_diagonal_(float("inf"))
    nearest = alone.amin(1) if len(alone) > 1 else torch.zeros_like(alone[0])
    chosen = [nearest.argmax()]
    nearest = distance[chosen[0]].clone()
    nearest[chosen[0]] = -1.0
    for _ in range(number - 1):
        chosen.append(nearest.argmax())
        nearest = nearest.minimum(distance[chosen[-1]])
        nearest[chosen[-1]] = -1.0
    return torch.stack(chosen)
