"""Runs blocks of tokens through a decoder's layers, over one cache."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .decoder_layers import (
    Rotary,
    run_attention,
    run_attention_with_weights,
    run_layer,
    run_mlp,
)
from .layer_outputs import LayerOutputs
from .stock import STATES_SHOW_ADDITIONS, causal_mask
from .token_block import TokenBlock


class DecoderRun:
    """One call's way through a stock text model.

    Args:
        decoder: the text model, whose layers follow Llama's names.
        cache: where keys and values go; its layers may hold different numbers of tokens.
        outputs: what the caller asked to see of the layers.
    """

    def __init__(self, decoder: PreTrainedModel, cache: DynamicCache, outputs: LayerOutputs):
        self.decoder, self.cache, self.outputs = decoder, cache, outputs

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def whole_layers(
        self,
        block: TokenBlock,
        first: int,
        stop: int,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Run a block through the layers `first` to `stop - 1`.

        Args:
            before: called with the index of each layer before it runs.
        """
        if first >= stop:
            return
        mask, rotary = self.mask_and_rotary(block, first)
        for index in range(first, stop):
            if before is not None:
                before(index)
            self.enter(index, block)
            self.step(run_layer, index, block, mask, rotary)

    def enter(self, index: int, block: TokenBlock) -> None:
        """Add what is added before a layer, and note its input if the caller asked for it."""
        if STATES_SHOW_ADDITIONS:
            block.add(index)
        if self.outputs.wants_hidden_states:
            self.outputs.add_states(index, block.shown())
        block.add(index)

    def leave(self, block: TokenBlock) -> torch.Tensor:
        """A block's states behind the last layer and the final norm, `(batch, tokens, hidden)`."""
        block.add(len(self.layers))
        if self.outputs.wants_hidden_states:
            self.outputs.add_unnormed(block.shown())
        return self.decoder.norm(block.hidden_states)

    def step(
        self,
        run: Callable,
        index: int,
        block: TokenBlock,
        mask: torch.Tensor | None,
        rotary: Rotary,
    ) -> None:
        """Run one layer (or its attention only), and note attentions that the caller asked for.

        Args:
            run: `run_layer` or `run_attention`.
        """
        layer, outputs = self.layers[index], self.outputs
        if not outputs.wants_attentions:
            block.hidden_states = run(layer, block.hidden_states, mask, rotary, self.cache)
            return
        states, weights = run_attention_with_weights(
            layer, block.hidden_states, mask, rotary, self.cache
        )
        outputs.add_attention(index, block.weights_as_seen(weights))
        block.hidden_states = states if run is run_attention else run_mlp(layer, states)

    def mask_and_rotary(
        self, block: TokenBlock, first_layer: int
    ) -> tuple[torch.Tensor | None, Rotary]:
        """Attention mask and rotary embeddings for the layers from `first_layer` on.

        With a soft mask it is float, `(batch, 1, tokens, slots)`.

        The mask functions ask the cache's first layer how much it holds. Layers above P hold less
        than those below, so they are shown a cache that begins with `first_layer`.
        """
        rotary = self.decoder.rotary_emb(block.hidden_states, block.position_ids)
        if block.log_keep is not None:
            return block.soft_mask().to(block.hidden_states.dtype), rotary
        remaining = DynamicCache()
        remaining.layers = self.cache.layers[first_layer:]
        mask = block.mask
        if mask is not None:
            mask = torch.cat([mask.new_zeros(len(mask), block.past_dropped), mask], dim=1)
        start = block.past_slots + block.past_dropped
        config = self.decoder.config
        return causal_mask(config, block.hidden_states, mask, remaining, start), rotary
