"""What a vision encoder adds to hidden states between decoder layers, beside the embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .row_boundaries import AlignedRows


@dataclass
class LayerAdditions:
    """What a call's visuals add at their placeholders behind the decoder's first layers.

    Qwen3-VL takes features of several vision blocks so (DeepStack, arXiv 2406.04334). Placeholders
    gain them where a layer runs over them: those that were dropped gain nothing, nor do visual
    tokens that stand still in a look-ahead.

    Attributes:
        masks: for each kind of visual `(batch, length)` bool, True at its placeholders.
        features: for each kind `(placeholders, hidden)` for every layer from the first on, all
            placeholders of the batch row after row.
    """

    masks: list[torch.Tensor]
    features: list[Sequence[torch.Tensor]]

    def laid_out(self, states: torch.Tensor) -> dict[int, torch.Tensor]:
        """`(batch, length, hidden)`, zeros elsewhere, by the layer that takes it with its input.

        Args:
            states: `(batch, length, hidden)` whose dtype and device are wanted.
        """
        layers = {}
        for index in range(len(self.features[0])):
            layers[index + 1] = torch.zeros_like(states)
            for mask, features in zip(self.masks, self.features, strict=True):
                mask = mask.to(states.device)[..., None]
                layers[index + 1] = layers[index + 1].masked_scatter(
                    mask, features[index].to(states)
                )
        return layers

    def moved(self, rows: AlignedRows) -> "LayerAdditions":
        """The same additions in rows that were moved to the right."""
        masks = [rows.move(mask) & rows.real.to(mask.device) for mask in self.masks]
        return replace(self, masks=masks)

    def as_stock(self, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As stock text models take them: where, `(batch, length)` bool, and what, for each layer.

        Args:
            states: as for `laid_out`.
        """
        if len(self.masks) == 1:
            return self.masks[0].to(states.device), list(self.features[0])
        where = torch.stack(self.masks).any(0).to(states.device)
        return where, [layer[where] for layer in self.laid_out(states).values()]
