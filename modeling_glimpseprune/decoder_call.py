"""The tokens of one call of a text model, and the blocks that they are run in."""

from dataclasses import dataclass, replace

import torch

from .layer_additions import LayerAdditions
from .pruned_cache import PrunedLayer, slot_columns, slot_mask
from .token_block import TokenBlock
from .visual_tokens import VisualTokens


@dataclass
class DecoderCall:
    """The tokens of one call: the prompt and what stands behind it.

    Attributes:
        inputs_embeds: `(batch, length, hidden)`.
        attention_mask: `(batch, past and length)`, or None.
        position_ids: `(..., batch, length)`, the family's rotary positions.
        prompt_length: tokens of the prompt.
        held_length: tokens in front of them that a prefix holds, which are part of the prompt.
        additions: what visuals add to them between layers.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    prompt_length: int
    held_length: int = 0
    additions: LayerAdditions | None = None

    @property
    def length(self) -> int:
        return self.inputs_embeds.shape[1]

    @property
    def next_position(self) -> torch.Tensor:
        """`(batch,)`, the position at which the answer (and the glimpse) starts."""
        positions = self.position_ids[..., : self.prompt_length]
        last = positions.reshape(-1, len(self.inputs_embeds), self.prompt_length)[..., -1]
        return last.amax(dim=0) + 1

    def hiding(self, tokens: VisualTokens, past: int) -> "DecoderCall":
        """The same call, in which nothing sees the visual tokens that were not encoded.

        Args:
            past: tokens that the cache holds.
        """
        batch, unseen = len(self.inputs_embeds), ~tokens.encoded
        mask = self.attention_mask
        if mask is None:
            mask = tokens.rows.new_ones(batch, past + self.length)
        mask = mask.clone()
        mask[tokens.rows[unseen], past + tokens.columns[unseen]] = 0
        return replace(self, attention_mask=mask)

    def block(self, part: slice, past: PrunedLayer) -> TokenBlock:
        """Some of the tokens, with the mask lined up with the cache.

        Args:
            part: the tokens to run; those before it are in the cache already.
            past: the cache's first layer.
        """
        states, position_ids = self.inputs_embeds[:, part], self.position_ids[..., part]
        length, mask = states.shape[1], self.attention_mask
        if mask is not None:
            mask = mask[:, : past.get_seq_length() + length]
        mask = slot_mask(past, mask, length)
        if mask is not None:
            mask = mask[:, past.dropped :].to(states.device, torch.bool)
        past_slots = past.physical_length
        end = self.prompt_length - part.start
        end = end if 0 < end <= length else length
        added = {} if self.additions is None else self.additions.laid_out(self.inputs_embeds)
        return TokenBlock(
            states,
            position_ids,
            mask,
            length,
            past_slots,
            past.dropped,
            slot_columns(past, past_slots, states.device),
            prompt_start=past_slots - part.start - self.held_length,
            prompt_length=self.held_length + self.prompt_length,
            glimpse_slice=slice(end, end),
            next_position=self.next_position,
            additions={layer: each[:, part] for layer, each in added.items()},
        )
