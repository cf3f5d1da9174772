"""Attention at the glimpse layer as it is, without a predictor: what the predictor has to beat."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from .layer_masks import last_token_read, prefill_begun
from .method import Application, Method
from .model_sizes import ModelSizes
from .prompt_tokens import budget_of
from .scorer import keep_highest


@dataclass(frozen=True)
class RawLastToken(Method):
    """Keeps what the prompt's last token attends to at the glimpse layer, averaged over heads."""

    name: str = "raw attention, last token"

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        requests = []

        def drop(layer: int, attention: torch.Tensor) -> None:
            request = requests[-1]
            rows = attention[request.tokens.rows, request.tokens.columns].split(batch.visual_counts)
            keep = [keep_highest(row, budget_of(len(row), self.ratio)) for row in rows]
            request.visual_keep_mask = torch.cat(keep)

        with (
            last_token_read(model, [model.config.glimpse_layer], drop),
            prefill_begun(model, lambda request, inputs_embeds: requests.append(request)),
        ):
            yield Application({"visual_keep_mask": batch.everything})

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return None

    def scoring_flops(self, sizes: ModelSizes, visual: int, prompt: int) -> int:
        return sizes.query_row(prompt)

    @property
    def drops_inside_glimpse_layer(self) -> bool:
        return True


@dataclass(frozen=True)
class RawGlimpseToken(Method):
    """Keeps what the trained glimpse token attends to at the glimpse layer, averaged over heads.

    The predictor still runs, but its scores are replaced.
    """

    name: str = "raw attention, glimpse token"

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        requests, scores = [], []

        def score(layer: int, attention: torch.Tensor) -> None:
            tokens = requests[-1].tokens
            scores[:] = [attention[tokens.rows, tokens.columns]]

        predictor = model.model.glimpse.predictor
        handle = predictor.register_forward_hook(lambda *call: scores[0])
        try:
            with (
                last_token_read(model, [model.config.glimpse_layer], score),
                prefill_begun(model, lambda request, inputs_embeds: requests.append(request)),
            ):
                options = {"prune_threshold": 0.0, "max_keep_ratio": self.ratio}
                yield Application(options | {"min_keep_tokens": 1})
        finally:
            handle.remove()

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return None

    def scoring_flops(self, sizes: ModelSizes, visual: int, prompt: int) -> int:
        return sizes.query_row(prompt)

    @property
    def drops_inside_glimpse_layer(self) -> bool:
        return True
