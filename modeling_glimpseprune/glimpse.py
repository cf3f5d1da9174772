"""The glimpse: the learned token that looks, and the predictor that reads what it looked at.

These are the only weights GlimpsePrune adds to its base (paper, sections 3.1 and 3.2).
"""

import copy

import torch
from torch import nn
from transformers.utils import logging

from .decoder_layers import device_of
from .glimpse_fields import BUILT_IN_FIELDS
from .importance_predictor import RMSNorm, TokenGroup, VisualImportancePredictor
from .low_rank import ATTENTION_MAPS, MLP_MAPS, STALE_MAPS, low_rank_additions

logger = logging.get_logger(__name__)


class GlimpseToken(nn.Module):
    """Learned embeddings appended to the prompt; vector of layer i = norm(projection(embedding i)).

    Each listed decoder layer has embeddings of its own. In layer 0 they are the token's input; in
    later listed layers they are added to its hidden state before the layer runs.

    Args:
        config: a GlimpsePrune configuration with `num_glimpse_tokens` > 0.
        hidden_size: width of the decoder.
        norm_eps: epsilon of an RMS norm, the base's `rms_norm_eps` in official checkpoints; a layer
            norm has torch's default there.
    """

    def __init__(self, config, hidden_size: int, norm_eps: float):
        super().__init__()
        self.layers = list(config.glimpse_embedding_layers)
        shape = (len(self.layers), config.num_glimpse_tokens, hidden_size)
        self.embeddings = nn.Parameter(torch.empty(shape))
        self.projection = nn.Linear(hidden_size, hidden_size)
        if config.glimpse_norm == "rms_norm":
            self.norm = RMSNorm(hidden_size, eps=norm_eps)
        else:
            self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(config.glimpse_dropout)

    def forward(self, layer: int) -> torch.Tensor | None:
        """Glimpse vectors of a decoder layer.

        Returns:
            `(num_glimpse_tokens, hidden_size)`, or None when the layer has no embedding.
        """
        if layer not in self.layers:
            return None
        embedding = self.embeddings[self.layers.index(layer)]
        return self.dropout(self.norm(self.projection(embedding)))


class Glimpse(nn.Module):
    """Glimpse token, visual importance predictor, and whether they were trained.

    `token_additions` and `stale_additions` are low-rank additions to the decoder's maps, for the
    glimpse tokens and for the stale states of a look-ahead; None where the configuration has none.
    `trained` is saved with the weights, so a checkpoint that lacks any of them is known for it.

    Args:
        config: a GlimpsePrune configuration.
        vision_size: width of the tapped vision features.

    Raises:
        ValueError: naming a field of the configuration and its value that cannot be.
    """

    def __init__(self, config, vision_size: int):
        super().__init__()
        config.validate_glimpse_fields()
        self.built_for = {name: copy.copy(getattr(config, name)) for name in BUILT_IN_FIELDS}
        text_config = config.get_text_config()
        self.attention_layers = list(config.attention_layers)
        self.log_probabilities = config.attention_scores == "log_probabilities"
        self.token = None
        if config.num_glimpse_tokens:
            self.token = GlimpseToken(config, text_config.hidden_size, text_config.rms_norm_eps)
        self.token_additions = self.stale_additions = None
        self.add_low_rank(config)
        self.predictor = VisualImportancePredictor(
            config, text_config.num_attention_heads, vision_size
        )
        self.register_buffer("trained", torch.zeros((), dtype=torch.bool))

    def add_low_rank(self, config) -> None:
        """Build the low-rank additions that a configuration has and these weights have not.

        They start at zero, so what was trained stays as good as it was.
        """
        layers, text_config = range(config.glimpse_layer + 1), config.get_text_config()
        if self.token_additions is None and config.glimpse_lora_rank and self.token is not None:
            self.token_additions = low_rank_additions(
                text_config, layers, (*ATTENTION_MAPS, *MLP_MAPS), config.glimpse_lora_rank
            )
        if self.stale_additions is None and config.stale_rank:
            self.stale_additions = low_rank_additions(
                text_config, layers[1:], STALE_MAPS, config.stale_rank
            )
        for name in ("glimpse_lora_rank", "stale_rank"):
            self.built_for[name] = getattr(config, name)
        if self.token_additions is not None or self.stale_additions is not None:
            self.built_for["glimpse_layer"] = config.glimpse_layer

    def check_built_for(self, config) -> None:
        """Refuse a configuration that was changed where these weights depend on it.

        Raises:
            ValueError: naming the field and both values.
        """
        for name, built in self.built_for.items():
            now = getattr(config, name)
            if now != built:
                raise ValueError(
                    f"{name} is {now!r}, but the model was built with {built!r}, which shapes its "
                    "weights: build or load another model for that"
                )

    def declare_untrained(self) -> None:
        """Note and say that some of these weights did not come from training."""
        self.trained = torch.zeros((), dtype=torch.bool, device=self.trained.device)
        logger.warning(
            "The glimpse weights are new or incomplete: this model refuses to prune until they are "
            "trained (glimpseprune train-stage1). prune=False and visual_keep_mask work."
        )

    def read_attention(self, logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Turn one layer's scaled products into the predictor's input.

        Args:
            logits: `(batch, heads, keys)`.
            valid: `(batch, keys)` bool, False at padding.

        Returns:
            `(batch, heads, keys)`, the logits themselves or their log-softmax over valid keys.
        """
        if not self.log_probabilities:
            return logits
        masked = logits.float().masked_fill(~valid[:, None, :], float("-inf"))
        return masked.log_softmax(-1).to(logits.dtype)

    def conditions(self, vision_features: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `VisualImportancePredictor.conditions`, of features of any dtype and device."""
        weight = self.predictor.output_projection.weight
        features = [
            layer.to(device_of(self.predictor, layer), weight.dtype) for layer in vision_features
        ]
        return self.predictor.conditions(features)

    def forward(
        self,
        attention: torch.Tensor,
        conditions: list[torch.Tensor],
        coordinates: torch.Tensor,
        groups: list[TokenGroup],
    ) -> torch.Tensor:
        """Importance logits `(N,)`; arguments as for `VisualImportancePredictor`.

        The predictor may be of another dtype than the decoder: in float32 while it is trained, over
        a quantised base, or over one in float16.
        """
        dtype = self.predictor.output_projection.weight.dtype
        conditions = [layer.to(attention.device, dtype) for layer in conditions]
        return self.predictor(attention.to(dtype), conditions, coordinates, groups)
