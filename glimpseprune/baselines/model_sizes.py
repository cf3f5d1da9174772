"""Sizes of a model that counted costs of scoring depend on."""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a GlimpsePrune model.

    Attributes:
        layers: of the decoder.
        hidden: width of the decoder.
        glimpse_layer: K, 0-based.
        vision_hidden: width of the vision encoder.
        patches: patches that are merged into a visual token.
    """

    layers: int
    hidden: int
    glimpse_layer: int
    vision_hidden: int
    patches: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelSizes":
        text, vision = config.get_text_config(), config.vision_config
        merge = getattr(vision, "spatial_merge_size", 1)  # CLIP's patches are tokens
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            config.glimpse_layer,
            vision.hidden_size,
            merge**2,
        )

    def query_row(self, prompt: int) -> int:
        """Operations of reading one token's attention outside the attention kernel."""
        return 2 * self.hidden * (self.hidden + prompt)
