"""Counted operations of a prefill by any method, with the formulas of `benchmarks.prefill_flops`.

Decoder layers are counted over the tokens each of them works on, and scoring is added. The vision
encoder is not counted: methods share it, but for the resized image, which is spared most of it.
"""

from transformers import PretrainedConfig

from benchmarks.prefill_flops import Decoder, Predictor, pruned_prefill
from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.baselines.model_sizes import ModelSizes

from .records import Record


class PrefillCosts:
    """Counts for one model.

    Args:
        config: of a GlimpsePrune model.
    """

    def __init__(self, config: PretrainedConfig):
        text = config.get_text_config()
        self.sizes = ModelSizes.of(config)
        self.decoder = Decoder(
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            text.num_attention_heads,
            text.num_key_value_heads,
        )
        self.predictor = Predictor(
            len(config.vision_layers),
            config.predictor_hidden_size,
            config.predictor_condition_size,
            config.vision_config.hidden_size,
            text.num_attention_heads * len(config.attention_layers),
        )

    def flops(self, method: Method, record: Record) -> int:
        """Of the prefill that gave this answer."""
        layers = record.by_layer
        if isinstance(method, OwnPruning):
            glimpse_layer = self.sizes.glimpse_layer
            shape = (record.prompt, record.visual, layers[-1])
            return pruned_prefill(self.decoder, self.predictor, glimpse_layer, *shape)
        tokens = [record.prompt + visual for visual in layers]
        after_attention = list(tokens)
        if method.drops_inside_glimpse_layer:
            after_attention[self.sizes.glimpse_layer] = tokens[-1]
        decoder = sum(
            self.decoder.attention(count, count) + self.decoder.mlp(left)
            for count, left in zip(tokens, after_attention, strict=True)
        )
        prompt = record.prompt + record.visual
        return decoder + method.scoring_flops(self.sizes, record.visual, prompt)
