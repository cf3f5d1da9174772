"""The fields that GlimpsePrune adds to a configuration: their defaults, and what may stand in them.

What each means is said at `GlimpsePruneConfigMixin`. Here `config` is a configuration of any family
whose fields above the one in question are valid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from transformers.activations import ACT2FN

ATTENTION_SCORES = ("logits", "log_probabilities")
GLIMPSE_NORMS = ("rms_norm", "layer_norm")
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")


@dataclass(frozen=True)
class GlimpseField:
    """One field that GlimpsePrune adds to a configuration, and what may stand in it.

    Attributes:
        default: its value where none is given, or a function of the configuration that makes it.
        must: how an error goes on after "FIELD must"; `{config.NAME}` stands for an attribute.
        holds: whether a value fits a configuration.
        built_in: whether the glimpse's weights depend on it.
    """

    default: object
    must: str
    holds: Callable[[object, object], bool]
    built_in: bool = True


def is_whole(value: object, least: int = 0) -> bool:
    """Whether a value is a whole number and not below `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether a value is a number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def are_all(values: object, fits: Callable[[object], bool]) -> bool:
    """Whether a value is a list or tuple of values that fit."""
    return isinstance(values, (list, tuple)) and all(map(fits, values))


def are_layers(values: object, last: int) -> bool:
    """Whether a value lists layers 0..last."""
    return are_all(values, lambda layer: is_whole(layer) and layer <= last)


def one_of(*choices: str) -> tuple[str, Callable]:
    """`must` and `holds` of a field that takes one of some words."""
    return f"be one of {choices}", lambda value, config: isinstance(value, str) and value in choices


def whole_number(least: int) -> tuple[str, Callable]:
    """`must` and `holds` of a field that takes a whole number."""
    return f"be a whole number, {least} or more", lambda value, config: is_whole(value, least)


def share() -> tuple[str, Callable]:
    """`must` and `holds` of a field that takes a share or a probability."""
    return "lie in [0, 1]", lambda value, config: is_number(value) and 0 <= value <= 1


def _embeds_layers(layers: object, config: object) -> bool:
    if not are_layers(layers, config.last_layer) or list(layers) != sorted(set(layers)):
        return False
    return config.num_glimpse_tokens == 0 or list(layers[:1]) == [0]


def _heads_fit(heads: object, config: object) -> bool:
    """Rotary positions take queries and keys apart in four, values only split among the heads."""
    fits = is_whole(heads, 1) and config.predictor_hidden_size % heads == 0
    return fits and config.predictor_query_size % (4 * heads) == 0


FIELDS = {
    "glimpse_layer": GlimpseField(
        lambda config: int(0.66 * (config.last_layer + 1)),
        "be one of the decoder's layers 0..{config.last_layer}",
        lambda layer, config: is_whole(layer) and layer <= config.last_layer,
        built_in=False,
    ),
    "prune_layer": GlimpseField(
        None,
        "be None or one of the layers 0..glimpse_layer ({config.glimpse_layer})",
        lambda layer, config: layer is None or (is_whole(layer) and layer <= config.glimpse_layer),
        built_in=False,
    ),
    "attention_layers": GlimpseField(
        lambda config: [config.glimpse_layer],
        "lie in 0..glimpse_layer ({config.glimpse_layer}), one or more of them",
        lambda layers, config: are_layers(layers, config.glimpse_layer) and len(layers) > 0,
    ),
    "attention_scores": GlimpseField("logits", *one_of(*ATTENTION_SCORES)),
    "num_glimpse_tokens": GlimpseField(1, *whole_number(0)),
    "glimpse_embedding_layers": GlimpseField(
        lambda config: list(range(config.last_layer + 1)) if config.num_glimpse_tokens else [],
        "be ascending layers of the decoder (0..{config.last_layer}) from layer 0 on",
        _embeds_layers,
    ),
    "glimpse_lora_rank": GlimpseField(0, *whole_number(0)),
    "stale_rank": GlimpseField(0, *whole_number(0)),
    "glimpse_norm": GlimpseField("rms_norm", *one_of(*GLIMPSE_NORMS)),
    "glimpse_dropout": GlimpseField(0.0, *share()),
    "vision_layers": GlimpseField(
        lambda config: config.default_vision_layers,
        "be {config.vision_layer_range}, one or more of them",
        lambda layers, config: are_layers(layers, config.last_vision_layer) and len(layers) > 0,
    ),
    "predictor_hidden_size": GlimpseField(256, *whole_number(1)),
    "predictor_condition_size": GlimpseField(512, *whole_number(1)),
    "predictor_use_vision": GlimpseField(
        True, "be True or False", lambda value, config: isinstance(value, bool)
    ),
    "predictor_num_heads": GlimpseField(
        4,
        "divide predictor_hidden_size ({config.predictor_hidden_size}), and four times it the "
        "width of queries and keys ({config.predictor_query_size}), which is that and, with "
        "vision features, predictor_condition_size ({config.predictor_condition_size})",
        _heads_fit,
    ),
    "predictor_hidden_act": GlimpseField(
        "silu",
        "be the name of one of transformers' activations",
        lambda name, config: isinstance(name, str) and name in ACT2FN,
    ),
    "predictor_windowed": GlimpseField(
        False,
        "be {config.window_choice}",
        lambda value, config: isinstance(value, bool) and value <= config.has_vision_windows,
        built_in=False,
    ),
    "redundant_patches": GlimpseField(
        None,
        "be {config.redundancy_choice}",
        lambda value, config: (
            value is None
            or value is False
            or (config.encodes_parts and is_number(value) and 0 <= value <= 255)
        ),
        built_in=False,
    ),
    "anchor_corners": GlimpseField(
        (),
        f"be a list of some of {CORNERS}",
        lambda corners, config: are_all(corners, lambda corner: corner in CORNERS),
        built_in=False,
    ),
    "prune_threshold": GlimpseField(0.5, *share(), built_in=False),
    "max_keep_ratio": GlimpseField(
        None,
        "be None or lie in (0, 1]",
        lambda value, config: value is None or (is_number(value) and 0 < value <= 1),
        built_in=False,
    ),
    "min_keep_tokens": GlimpseField(1, *whole_number(0), built_in=False),
}
GLIMPSE_FIELDS = tuple(FIELDS)
BUILT_IN_FIELDS = tuple(name for name, field in FIELDS.items() if field.built_in)
