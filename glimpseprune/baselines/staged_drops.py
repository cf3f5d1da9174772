"""Methods that drop tokens inside the decoder, by how the prompt's last token attends."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from .layer_masks import LayerMasks, last_token_read, masked_layers, prefill_begun
from .method import Application, Method
from .model_sizes import ModelSizes
from .prompt_tokens import budget_of
from .scorer import keep_highest


@dataclass(frozen=True)
class StagedDrops(Method):
    """Reads attention in some layers; from the next layer on only the highest tokens take part.

    Keys of a dropped token stay visible to the answer in the layers that worked on it.
    """

    @abstractmethod
    def stages(self, layers: int) -> list[tuple[int, float]]:
        """`(layer, share)` in ascending order: what is kept of all visual tokens after a layer.

        Args:
            layers: of the decoder.
        """

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        layers = model.config.get_text_config().num_hidden_layers
        shares = dict(self.stages(layers))
        masks, places = LayerMasks(), []

        def begin(request, inputs_embeds) -> None:
            masks.begin(request.tokens, len(inputs_embeds), layers)
            places[:] = [request.tokens.rows, request.tokens.columns]

        def drop(layer: int, attention: torch.Tensor) -> None:
            rows = attention[places[0], places[1]].split(batch.visual_counts)
            keep = [keep_highest(row, budget_of(len(row), shares[layer])) for row in rows]
            masks.drop_from(layer + 1, torch.cat(keep))

        with (
            masked_layers(model, masks),
            last_token_read(model, list(shares), drop),
            prefill_begun(model, begin),
        ):
            yield Application({"visual_keep_mask": batch.everything}, masks)

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return None

    def scoring_flops(self, sizes: ModelSizes, visual: int, prompt: int) -> int:
        return len(self.stages(sizes.layers)) * sizes.query_row(prompt)
