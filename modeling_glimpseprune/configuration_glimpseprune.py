"""Configuration of GlimpsePrune models.

A GlimpsePrune configuration is the stock configuration of its base plus the fields below: where the
glimpse is taken, how the glimpse token and the visual importance predictor are built, and how many
visual tokens are kept. The same fields serve every family, so they live in a mixin; a family's
configuration states only which vision layers there are to tap.

Fields are validated together, by `validate_glimpse_fields`: when a configuration is made, loaded
with fields given in place of stored ones, or saved, when a model is built on it, and at every call
that sees an image. Between these they may be set one after the other. Those of `BUILT_IN_FIELDS`
shape the glimpse's weights: a built model keeps the ones it was built with.
"""

import copy
import inspect

from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from .glimpse_fields import FIELDS, GLIMPSE_FIELDS

LLAVA_TEXT_MODELS = ("llama", "mistral")
# transformers 5 keeps the rotary settings of a text model under this name, transformers 4 does not.
READS_ROPE_PARAMETERS = "rope_parameters" in inspect.signature(LlamaConfig).parameters


class GlimpsePruneConfigMixin:
    """The fields that GlimpsePrune adds to a vision-language configuration.

    Args:
        glimpse_layer: K, the 0-based decoder layer where the glimpse's attention is read. Default:
            `int(0.66 * num_hidden_layers)`, which gives the official 23 of 36, 18 of 28, 21 of 32
            and 26 of 40.
        prune_layer: P, the layer after whose attention visual tokens are dropped, at most K. Below
            K the prompt's text and the glimpse run ahead to K over visual tokens that stay as they
            are at P. None: K, as in the paper.
        attention_layers: decoder layers whose attention is read, in the order of the predictor's
            input columns, none above `glimpse_layer`. Default: `[glimpse_layer]`.
        attention_scores: `"logits"` (scaled products) or `"log_probabilities"` (log-softmax over
            all keys of the prompt).
        num_glimpse_tokens: learned embeddings appended to the prompt; 0 reads the attention of the
            last prompt token instead.
        glimpse_embedding_layers: decoder layers that have an embedding of their own for the glimpse
            token(s); must start with 0. Default: all layers.
        glimpse_lora_rank: rank of low-rank additions to the maps of layers 0..K, for the glimpse
            tokens alone; 0 for none.
        stale_rank: rank of low-rank additions to the keys and values that a look-ahead makes of
            visual tokens, in layers 1..K; 0 for none.
        glimpse_norm: `"rms_norm"` or `"layer_norm"`, applied to the projected embeddings.
        glimpse_dropout: dropout on the glimpse vectors while training.
        vision_layers: vision layers tapped for the predictor, one predictor layer each, in order;
            numbered as the family says.
        predictor_hidden_size: width of the visual importance predictor, a multiple of its heads.
        predictor_condition_size: width that tapped vision features are projected to.
        predictor_use_vision: whether vision features condition the predictor's queries and keys.
        predictor_num_heads: attention heads of the predictor; four times their number divides the
            width of its queries and keys.
        predictor_hidden_act: activation of the predictor's gated MLP.
        predictor_windowed: whether the predictor attends within the vision encoder's windows
            instead of the whole image.
        redundant_patches: leave out, in front of the vision encoder, visual tokens whose neighbours
            predict them within so many grey levels (0: exactly); None for none.
        anchor_corners: corners of each image whose token is always kept, of `"top_left"`,
            `"top_right"`, `"bottom_left"`, `"bottom_right"`.
        prune_threshold: tokens whose importance, as a probability, exceeds it are kept.
        max_keep_ratio: upper bound on the kept share of a prompt's visual tokens, or None.
        min_keep_tokens: lower bound on the kept visual tokens of a prompt.

    A family adds:

    Attributes:
        last_vision_layer: the highest that `vision_layers` may name; the lowest is 0.
        vision_layer_range: all of them, in words.
        default_vision_layers: those that are tapped by default.
        has_vision_windows: whether the vision encoder attends within windows.
        window_choice: what `predictor_windowed` may be, in words.
        encodes_parts: whether the vision encoder takes parts of an image.
        redundancy_choice: what `redundant_patches` may be, in words.

    Raises:
        ValueError: naming the field and the value that cannot be.
    """

    glimpse_base: dict | None = None  # where a published repository's base is: base_weights.py
    has_vision_windows = False
    window_choice = ""
    encodes_parts = False
    redundancy_choice = "None: this family's vision encoder takes whole images only"

    @property
    def last_vision_layer(self) -> int:
        raise NotImplementedError

    @property
    def vision_layer_range(self) -> str:
        raise NotImplementedError

    @property
    def default_vision_layers(self) -> list[int]:
        raise NotImplementedError

    @property
    def last_layer(self) -> int:
        """The decoder's last layer, counted from 0."""
        return self.get_text_config().num_hidden_layers - 1

    @property
    def predictor_query_size(self) -> int:
        """Width of the predictor's queries and keys, over all its heads."""
        condition_size = self.predictor_condition_size if self.predictor_use_vision else 0
        return self.predictor_hidden_size + condition_size

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As the stock method; fields given in place of the stored ones are validated too."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate_glimpse_fields()
        return loaded

    def save_pretrained(self, *args, **kwargs) -> None:
        """As the stock method; what could not be loaded again is not written."""
        self.validate_glimpse_fields()
        super().save_pretrained(*args, **kwargs)

    def set_glimpse_fields(self, given: dict) -> None:
        """Store all fields, defaults where none is given, and validate them together."""
        for name, field in FIELDS.items():
            default = None if callable(field.default) else field.default
            value = given.get(name, default)
            if value is None and callable(field.default):
                value = field.default(self)
            setattr(self, name, list(value) if isinstance(value, (list, tuple)) else value)
        self.validate_glimpse_fields()

    def validate_glimpse_fields(self) -> None:
        """Check all fields as they stand now.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        for name in FIELDS:
            self.validate_field(name, getattr(self, name))

    def validate_field(self, name: str, value: object) -> None:
        """Check a value that a call gives in place of a field's.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        field = FIELDS[name]
        if not field.holds(value, self):
            raise ValueError(f"{name} must {field.must.format(config=self)}, got {value!r}")


class GlimpsePruneQwenConfigMixin(GlimpsePruneConfigMixin):
    """The fields of `GlimpsePruneConfigMixin`; `vision_layers` are the encoder's blocks."""

    encodes_parts = True
    redundancy_choice = "None, False, or grey levels in 0..255"

    @property
    def last_vision_layer(self) -> int:
        return self.vision_config.depth - 1

    @property
    def vision_layer_range(self) -> str:
        return f"vision blocks 0..{self.last_vision_layer}"


class GlimpsePruneQwen2_5_VLConfig(GlimpsePruneQwenConfigMixin, Qwen2_5_VLConfig):
    """Stock `Qwen2_5_VLConfig` and the fields of `GlimpsePruneConfigMixin`.

    The default `vision_layers` are the vision encoder's full-attention blocks, deepest first.
    """

    model_type = "glimpseprune_qwen2_5_vl"
    has_vision_windows = True
    window_choice = "True or False"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        self.set_glimpse_fields(glimpse_fields)

    @property
    def default_vision_layers(self) -> list[int]:
        return list(self.vision_config.fullatt_block_indexes)[::-1]


class GlimpsePruneQwen3VLConfig(GlimpsePruneQwenConfigMixin, Qwen3VLConfig):
    """Stock `Qwen3VLConfig` and the fields of `GlimpsePruneConfigMixin`.

    The default `vision_layers` are the last block and those whose features are added between
    decoder layers (`deepstack_visual_indexes`), deepest first.
    """

    model_type = "glimpseprune_qwen3_vl"
    window_choice = "False: Qwen3-VL's vision encoder has no attention windows"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        self.set_glimpse_fields(glimpse_fields)

    @property
    def default_vision_layers(self) -> list[int]:
        added = set(self.vision_config.deepstack_visual_indexes)
        return sorted(added | {self.last_vision_layer}, reverse=True)


class GlimpsePruneLlavaConfigMixin(GlimpsePruneConfigMixin):
    """The fields of `GlimpsePruneConfigMixin` as both LLaVA families fill them in.

    `vision_layers` are numbered as the vision tower's `hidden_states`, as `vision_feature_layer`
    is: layer i is the output of block i - 1, and layer 0 the embeddings. The default is four of
    them, evenly spread from the last but one block's output on: 23, 17, 11 and 5 of 24.
    """

    window_choice = "False: CLIP has no attention windows"

    @property
    def last_vision_layer(self) -> int:
        return self.vision_config.num_hidden_layers

    @property
    def vision_layer_range(self) -> str:
        return f"hidden states 0..{self.last_vision_layer} of the vision tower"

    @property
    def default_vision_layers(self) -> list[int]:
        depth = self.vision_config.num_hidden_layers
        return sorted({depth - 1 - part * depth // 4 for part in range(4)}, reverse=True)

    def validate_glimpse_fields(self) -> None:
        """Check all fields, and that vision tower and text model are supported.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
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
        super().validate_glimpse_fields()


class GlimpsePruneLlavaConfig(GlimpsePruneLlavaConfigMixin, LlavaConfig):
    """Stock `LlavaConfig` and the fields of `GlimpsePruneLlavaConfigMixin`."""

    model_type = "glimpseprune_llava"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        self.set_glimpse_fields(glimpse_fields)


class GlimpsePruneLlavaNextConfig(GlimpsePruneLlavaConfigMixin, LlavaNextConfig):
    """Stock `LlavaNextConfig` and the fields of `GlimpsePruneLlavaConfigMixin`.

    The class token is never among the image's tokens here, so `vision_feature_select_strategy`
    must be `"default"`.
    """

    model_type = "glimpseprune_llava_next"

    def __init__(self, **kwargs):
        glimpse_fields = take_glimpse_fields(kwargs)
        super().__init__(**kwargs)
        self.set_glimpse_fields(glimpse_fields)

    def validate_glimpse_fields(self) -> None:
        """As for LLaVA, and the strategy.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        super().validate_glimpse_fields()
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default', "
                f"got {self.vision_feature_select_strategy!r}"
            )


def take_glimpse_fields(fields: dict) -> dict:
    """Take the fields that GlimpsePrune adds out of a configuration's.

    The text configuration, where it is a dictionary, is replaced by one that the installed
    transformers reads.
    """
    if isinstance(fields.get("text_config"), dict) and not READS_ROPE_PARAMETERS:
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
        if "rope_theta" in rotary:
            text_config["rope_theta"] = rotary.pop("rope_theta")
        if rotary and "type" not in rotary:
            rotary.setdefault("rope_type", "default")
        text_config["rope_scaling"] = rotary or None
    if tie_word_embeddings is not None:
        text_config["tie_word_embeddings"] = tie_word_embeddings
    return text_config
