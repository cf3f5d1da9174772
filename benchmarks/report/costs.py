"""Counted operations of a prefill by any method, with the formulas of `glimpseprune.prefill_cost`.

Decoder layers are counted over the tokens each of them works on, and scoring is added. The vision
encoder is counted apart, over the tokens it works on: most methods share it.
"""

from transformers import PretrainedConfig

from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.baselines.model_sizes import ModelSizes
from glimpseprune.prefill_cost import PrefillLaw

from .records import Record


class PrefillCosts:
    """Counts for one model.

    Args:
        config: of a GlimpsePrune model.
    """

    def __init__(self, config: PretrainedConfig):
        self.sizes, self.law = ModelSizes.of(config), PrefillLaw.of(config)
        self.prune_layer = config.prune_layer

    def flops(self, method: Method, record: Record) -> int:
        """Of the prefill that gave this answer."""
        layers = record.by_layer
        if isinstance(method, OwnPruning):
            layer = self.prune_layer if method.prune_layer is None else method.prune_layer
            tokens = (record.prompt, record.visual, layers[-1], record.encoded)
            return self.law.pruned(layer, *tokens)
        tokens = [record.prompt + visual for visual in layers]
        after_attention = list(tokens)
        if method.drops_inside_glimpse_layer:
            after_attention[self.sizes.glimpse_layer] = tokens[-1]
        decoder = sum(
            self.law.decoder.attention(count, count) + self.law.decoder.mlp(left)
            for count, left in zip(tokens, after_attention, strict=True)
        )
        prompt = record.prompt + record.visual
        return decoder + method.scoring_flops(self.sizes, record.visual, prompt)

    def encoder_flops(self, record: Record) -> int | None:
        """Of the vision encoder for this answer; None where it is not known."""
        return self.law.encoder and self.law.encoder.cost(record.encoded)
