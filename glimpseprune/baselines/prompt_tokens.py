"""The visual tokens of one prompt, as a scoring rule sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import ProcessorMixin

from modeling_glimpseprune.prune_request import PruneRequest

from ..data.visual_cot import visible_evidence
from ..sample import Sample


@dataclass(frozen=True)
class PromptTokens:
    """What is known of a prompt's n visual tokens before the decoder runs.

    Attributes:
        embeddings: `(n, hidden)`, as the decoder takes them; None over a look.
        geometry: `(n, 6)` frame, row and column of each token, then its image's frames, height and
            width in tokens.
        evidence: `(n,)` bool, True where the data set's boxes lie.
        number: the question's number in its data set.
        budget: tokens that may be kept.
    """

    embeddings: torch.Tensor | None
    geometry: torch.Tensor
    evidence: torch.Tensor
    number: int
    budget: int

    def __len__(self) -> int:
        return len(self.geometry)


def budget_of(visual: int, ratio: float | None) -> int:
    """Tokens that a share of a prompt's visual tokens comes to: one at least, as for a glimpse."""
    return visual if ratio is None else max(1, int(ratio * visual))


def prompts_of(
    request: PruneRequest,
    inputs_embeds: torch.Tensor,
    processor: ProcessorMixin,
    samples: list[Sample],
    ratio: float | None,
) -> list[PromptTokens]:
    """The visual tokens of each prompt of a batch.

    Args:
        request: what the backbone asks of the decoder.
        inputs_embeds: `(batch, length, hidden)`, of the tokens that a look does not hold.
        samples: the questions, one a row.
    """
    tokens = request.tokens
    counts = torch.bincount(tokens.rows, minlength=len(samples)).tolist()
    embeddings: Sequence[torch.Tensor | None] = [None] * len(samples)
    if request.held is None:
        embeddings = inputs_embeds[tokens.rows, tokens.columns].split(counts)
    grids: list[list[tuple[int, int]]] = [[] for _ in samples]
    for row, (_, height, width) in zip(
        tokens.item_rows.tolist(), tokens.grids.tolist(), strict=True
    ):
        grids[row].append((height, width))
    return [
        PromptTokens(
            embeddings[row],
            geometry,
            visible_evidence(processor, sample.boxes, *sample.size, grids[row]).to(geometry.device),
            sample.number,
            budget_of(counts[row], ratio),
        )
        for row, (sample, geometry) in enumerate(
            zip(samples, tokens.geometry.split(counts), strict=True)
        )
    ]
