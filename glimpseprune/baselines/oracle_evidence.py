"""The evidence itself, from the data set's boxes: what a perfect choice of tokens would give."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .layer_masks import prefill_begun
from .method import Application, Method
from .prompt_tokens import prompts_of


@dataclass(frozen=True)
class OracleEvidence(Method):
    """Keeps, at the glimpse layer, the tokens that evidence boxes overlap and no others.

    A prompt without boxes keeps everything.
    """

    name: str = "oracle evidence"

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        def begin(request, inputs_embeds) -> None:
            prompts = prompts_of(request, inputs_embeds, processor, batch.samples, None)
            masks = [each.evidence | ~each.evidence.any() for each in prompts]
            request.visual_keep_mask = torch.cat(masks)

        with prefill_begun(model, begin):
            yield Application({"visual_keep_mask": batch.everything})

    @property
    def drops_inside_glimpse_layer(self) -> bool:
        return True
