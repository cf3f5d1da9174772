"""Rotary positions of what a call brings."""

import torch
from transformers.cache_utils import Cache

from .later_turns import later_positions, positions_after_turn, prompt_positions
from .pruned_cache import pruned_layer
from .visual_features import VisualFeatures


class TokenPositionsMixin:
    """For a backbone: which positions its tokens have, where the stock model would not know.

    Attributes:
        positions_from_ids: whether rotary positions are derived from ids.
        takes_ids_beside_embeddings: whether the stock backbone does that itself.
    """

    positions_from_ids = False
    takes_ids_beside_embeddings = False

    def _positions(
        self,
        input_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache | None,
        inputs: dict,
        prunes: bool,
    ) -> torch.LongTensor | None:
        """Rotary positions of a prompt, or of a later turn without visuals; None is stock's way."""
        attention_mask = inputs.get("attention_mask")
        if (pruned := pruned_layer(cache)) is not None:
            return later_positions(pruned, inputs_embeds, attention_mask)
        after = positions_after_turn(cache, inputs_embeds, attention_mask)
        if after is not None:
            return after
        if position_ids is None:
            return self.own_positions(input_ids, inputs_embeds, cache, inputs, prunes)
        return position_ids

    def own_positions(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache | None,
        inputs: dict,
        prunes: bool,
    ) -> torch.LongTensor | None:
        """Rotary positions where the caller gives none; None is stock's way.

        Args:
            inputs: the call's other arguments.
            prunes: whether the call is a prompt that is pruned.
        """
        if self.takes_ids_beside_embeddings or not prunes:
            return None
        return prompt_positions(inputs.get("attention_mask"))

    def note_positions(self, outputs) -> None:
        """Put on the cache of visuals that were not pruned what later turns need to count on."""

    def turn_positions(
        self,
        input_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache,
        encoded: dict[str, VisualFeatures],
        inputs: dict,
    ) -> torch.LongTensor | None:
        """Rotary positions of a later turn that brings visuals, behind what the cache holds.

        Args:
            position_ids: those given with the call.
            inputs: its other arguments.
        """
        pruned = pruned_layer(cache)
        if pruned is None:
            return position_ids
        return later_positions(pruned, inputs_embeds, inputs.get("attention_mask"))
