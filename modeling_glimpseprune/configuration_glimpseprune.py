"""Configuration of GlimpsePrune models.

A GlimpsePrune configuration is the stock configuration of its base plus the fields below: where the
glimpse is taken, how the glimpse token and the visual importance predictor are built, and how many
visual tokens are kept. The same fields serve every family, so they live in a mixin; a family's
configuration states only which vision layers it taps by default.
"""

import copy
import inspect

from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

ATTENTION_SCORES = ("logits", "log_probabilities")
GLIMPSE_NORMS = ("rms_norm", "layer_norm")
LLAVA_TEXT_MODELS = ("llama", "mistral")
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")


def validate_selection(
    prune_threshold: float, max_keep_ratio: float | None, min_keep_tokens: int
) -> None:
    """Check the three settings that decide how many visual tokens are kept.

    Raises:
        ValueError: naming the field and its value, when the threshold is outside [0, 1], the ratio
            outside (0, 1], or the minimum negative.
    """
    if not 0.0 <= prune_threshold <= 1.0:
        raise ValueError(f"prune_threshold must lie in [0, 1], got {prune_threshold}")
    if max_keep_ratio is not None and not 0.0 < max_keep_ratio <= 1.0:
        raise ValueError(f"max_keep_ratio must be None or lie in (0, 1], got {max_keep_ratio}")
    if isinstance(min_keep_tokens, bool) or int(min_keep_tokens) != min_keep_tokens:
        raise ValueError(f"min_keep_tokens must be a whole number, got {min_keep_tokens}")
    if min_keep_tokens < 0:
        raise ValueError(f"min_keep_tokens must not be negative, got {min_keep_tokens}")


class GlimpsePruneConfigMixin:
    """The fields that GlimpsePrune adds to a vision-language configuration.

    Args:
        glimpse_layer: K, the 0-based decoder layer after whose attention visual tokens are dropped.
            Default: `int(0.66 * num_hidden_layers)`, which gives the official 23 of 36, 18 of 28,
            21 of 32 and 26 of 40.
        attention_layers: decoder layers whose attention is read, in the order of the predictor's
            input columns, none above `glimpse_layer`. Default: `[glimpse_layer]`.
        attention_scores: `"logits"` (scaled products) or `"log_probabilities"` (log-softmax over
            all keys of the prompt).
        num_glimpse_tokens: learned embeddings appended to the prompt; 0 reads the attention of the
            last prompt token instead.
        glimpse_embedding_layers: decoder layers that have an embedding of their own for the glimpse
            token(s); must start with 0. Default: all layers.
        glimpse_norm: `"rms_norm"` or `"layer_norm"`, applied to the projected embeddings.
        glimpse_dropout: dropout on the glimpse vectors while training.
        vision_layers: vision layers tapped for the predictor, one predictor layer each, in order;
            numbered as the family says.
        predictor_hidden_size: width of the visual importance predictor.
        predictor_condition_size: width that tapped vision features are projected to.
        predictor_num_heads: attention heads of the predictor.
        predictor_hidden_act: activation of the predictor's gated MLP.
        predictor_use_vision: whether vision features condition the predictor's queries and keys.
        predictor_windowed: whether the predictor attends within the vision encoder's windows
            instead of the whole image.
        anchor_corners: corners of each image whose token is always kept, of `"top_left"`,
            `"top_right"`, `"bottom_left"`, `"bottom_right"`.
        prune_threshold: tokens whose importance, as a probability, exceeds it are kept.
        max_keep_ratio: upper bound on the kept share of a prompt's visual tokens, or None.
        min_keep_tokens: lower bound on the kept visual tokens of a prompt.

    Raises:
        ValueError: naming the field and the value that cannot be.
    """

    glimpse_base: dict | None = None  # where a published repository's base is: base_weights.py

    def set_glimpse_fields(
        self,
        default_vision_layers: list[int],
        glimpse_layer: int | None = None,
        attention_layers: list[int] | None = None,
        attention_scores: str = "logits",
        num_glimpse_tokens: int = 1,
        glimpse_embedding_layers: list[int] | None = None,
        glimpse_norm: str = "rms_norm",
        glimpse_dropout: float = 0.0,
        vision_layers: list[int] | None = None,
        predictor_hidden_size: int = 256,
        predictor_condition_size: int = 512,
        predictor_num_heads: int = 4,
        predictor_hidden_act: str = "silu",
        predictor_use_vision: bool = True,
        predictor_windowed: bool = False,
        anchor_corners: list[str] | None = None,
        prune_threshold: float = 0.5,
        max_keep_ratio: float | None = None,
        min_keep_tokens: int = 1,
    ) -> None:
        """Fill in defaults that depend on the base, store all fields and validate them together."""
        num_layers = self.get_text_config().num_hidden_layers
        self.glimpse_layer = int(0.66 * num_layers) if glimpse_layer is None else glimpse_layer
        self.attention_layers = attention_layers or [self.glimpse_layer]
        self.attention_scores = attention_scores
        self.num_glimpse_tokens = num_glimpse_tokens
        if glimpse_embedding_layers is None:
            glimpse_embedding_layers = list(range(num_layers)) if num_glimpse_tokens else []
        self.glimpse_embedding_layers = glimpse_embedding_layers
        self.glimpse_norm = glimpse_norm
        self.glimpse_dropout = glimpse_dropout
        self.vision_layers = default_vision_layers if vision_layers is None else vision_layers
        self.predictor_hidden_size = predictor_hidden_size
        self.predictor_condition_size = predictor_condition_size
        self.predictor_num_heads = predictor_num_heads
        self.predictor_hidden_act = predictor_hidden_act
        self.predictor_use_vision = predictor_use_vision
        self.predictor_windowed = predictor_windowed
        self.anchor_corners = anchor_corners or []
        self.prune_threshold = prune_threshold
        self.max_keep_ratio = max_keep_ratio
        self.min_keep_tokens = min_keep_tokens
        self._validate_layers(num_layers)
        self._validate_modules()
        validate_selection(prune_threshold, max_keep_ratio, min_keep_tokens)

    def _validate_layers(self, num_layers: int) -> None:
        if not 0 <= self.glimpse_layer < num_layers:
            raise ValueError(
                f"glimpse_layer must be one of the decoder's layers 0..{num_layers - 1}, "
                f"got {self.glimpse_layer}"
            )
        if not all(0 <= layer <= self.glimpse_layer for layer in self.attention_layers):
            raise ValueError(
                f"attention_layers must lie in 0..glimpse_layer ({self.glimpse_layer}), "
                f"got {self.attention_layers}"
            )
        layers = self.glimpse_embedding_layers
        if self.num_glimpse_tokens and (not layers or layers[0] != 0):
            raise ValueError(f"glimpse_embedding_layers must start with layer 0, got {layers}")
        if list(layers) != sorted(set(layers)) or not all(0 <= i < num_layers for i in layers):
            raise ValueError(
                "glimpse_embedding_layers must be ascending layers of the decoder "
                f"(0..{num_layers - 1}), got {layers}"
            )
        if not self.vision_layers:
            raise ValueError("vision_layers must name at least one vision layer, got none")

    def _validate_modules(self) -> None:
        if self.num_glimpse_tokens < 0:
            raise ValueError(f"num_glimpse_tokens must not be negative: {self.num_glimpse_tokens}")
        if self.attention_scores not in ATTENTION_SCORES:
            raise ValueError(
                f"attention_scores must be one of {ATTENTION_SCORES}, got {self.attention_scores!r}"
            )
        if self.glimpse_norm not in GLIMPSE_NORMS:
            raise ValueError(
                f"glimpse_norm must be one of {GLIMPSE_NORMS}, got {self.glimpse_norm!r}"
            )
        if not set(self.anchor_corners) <= set(CORNERS):
            raise ValueError(f"anchor_corners must be among {CORNERS}, got {self.anchor_corners}")
        widths = self.predictor_hidden_size, self.predictor_condition_size
        if any(width % (4 * self.predictor_num_heads) for width in widths):
            raise ValueError(
                "predictor_hidden_size and predictor_condition_size must be multiples of "
                f"4 * predictor_num_heads ({4 * self.predictor_num_heads}), got {widths}"
            )


_PARAMETERS = inspect.signature(GlimpsePruneConfigMixin.set_glimpse_fields).parameters
GLIMPSE_FIELDS = tuple(_PARAMETERS)[2:]  # all but self and the family's default


class GlimpsePruneQwen2_5_VLConfig(GlimpsePruneConfigMixin, Qwen2_5_VLConfig):
    """Stock `Qwen2_5_VLConfig` and the fields of `GlimpsePruneConfigMixin`.

    The default `vision_layers` are the vision encoder's full-attention blocks, deepest first.
    """

    model_type = "glimpseprune_qwen2_5_vl"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        full_attention_blocks = list(self.vision_config.fullatt_block_indexes)
        self.set_glimpse_fields(full_attention_blocks[::-1], **glimpse_fields)
        depth = self.vision_config.depth
        if not all(0 <= layer < depth for layer in self.vision_layers):
            raise ValueError(
                f"vision_layers must be vision blocks 0..{depth - 1}, got {self.vision_layers}"
            )


class GlimpsePruneLlavaConfigMixin(GlimpsePruneConfigMixin):
    """The fields of `GlimpsePruneConfigMixin` as both LLaVA families fill them in.

    `vision_layers` are numbered as the vision tower's `hidden_states`, as `vision_feature_layer`
    is: layer i is the output of block i - 1, and layer 0 the embeddings. The default is four of
    them, evenly spread from the last but one block's output on: 23, 17, 11 and 5 of 24.
    """

    def set_llava_fields(self, **glimpse_fields) -> None:
        """Fill in the defaults and check that vision tower and text model are supported.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        depth = self._check_parts()
        spread = sorted({depth - 1 - part * depth // 4 for part in range(4)}, reverse=True)
        self.set_glimpse_fields(spread, **glimpse_fields)
        if not all(0 <= layer <= depth for layer in self.vision_layers):
            raise ValueError(
                f"vision_layers must be hidden states 0..{depth} of the vision tower, "
                f"got {self.vision_layers}"
            )
        if self.predictor_windowed:
            raise ValueError("predictor_windowed must be False: CLIP has no attention windows")

    def _check_parts(self) -> int:
        """Blocks of the vision tower."""
        vision, text = self.vision_config, self.text_config
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"vision_config must be a clip_vision_model, got a {vision.model_type}: only CLIP "
                "towers are supported"
            )
        if text.model_type not in LLAVA_TEXT_MODELS:
            raise ValueError(
                f"text_config must be one of {LLAVA_TEXT_MODELS}, got a {text.model_type}"
            )
        if getattr(text, "sliding_window", None) is not None:
            raise ValueError(
                f"text_config.sliding_window must be None, got {text.sliding_window}: layers with "
                "sliding windows cannot be pruned"
            )
        return vision.num_hidden_layers


class GlimpsePruneLlavaConfig(GlimpsePruneLlavaConfigMixin, LlavaConfig):
    """Stock `LlavaConfig` and the fields of `GlimpsePruneLlavaConfigMixin`."""

    model_type = "glimpseprune_llava"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        self.set_llava_fields(**glimpse_fields)


class GlimpsePruneLlavaNextConfig(GlimpsePruneLlavaConfigMixin, LlavaNextConfig):
    """Stock `LlavaNextConfig` and the fields of `GlimpsePruneLlavaConfigMixin`.

    The class token is never among the image's tokens here, so `vision_feature_select_strategy`
    must be `"default"`.
    """

    model_type = "glimpseprune_llava_next"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        self.set_llava_fields(**glimpse_fields)
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default', "
                f"got {self.vision_feature_select_strategy!r}"
            )


def take_glimpse_fields(fields: dict) -> dict:
    """Take the fields that GlimpsePrune adds out of a configuration's; make the rest portable.

    The text configuration, where it is a dictionary, is replaced as `portable_text_config` says.
    """
    if isinstance(fields.get("text_config"), dict):
        fields["text_config"] = portable_text_config(**fields)
    return {name: fields.pop(name) for name in GLIMPSE_FIELDS if name in fields}


def portable_text_config(
    text_config: dict, tie_word_embeddings: bool | None = None, **other_fields
) -> dict:
    """A text configuration that both generations of transformers read, whichever wrote it.

    transformers 5 writes the rotary settings under a name that transformers 4 does not know, and
    tied weights in the outer configuration alone.
    """
    text_config = copy.deepcopy(text_config)
    if rotary := text_config.pop("rope_parameters", None):
        text_config["rope_theta"] = rotary.pop("rope_theta")
        text_config["rope_scaling"] = rotary
    if tie_word_embeddings is not None:
        text_config["tie_word_embeddings"] = tie_word_embeddings
    return text_config
