"""Everything that is assumed of transformers, and where its releases differ.

This file is the only one that asks for a version or knows a name that a release changed; others
ask for what it names here. `tests/test_stock.py` holds each assumption against the installed
release, so that the next change fails there first.

| what | 4.57 | 5.8 to 5.23 | 5.24 |
|---|---|---|---|
| argument and output that carry the cache | `past_key_values` | `past_key_values` | `cache` |
| who counts rotary positions of a generation | the backbone | `generate` | `generate` |
| image features | a tensor an image | an output with `pooler_output` | the same |
| what Qwen3-VL adds between layers | in a tuple | in an output | split by images |
| its positions | made in the backbone's `forward` | by a method of the backbone | the same |
| what its layers return | collected in every class | by the text model | the same |
| CLIP's tower | inside `vision_model` | itself | itself |
"""

import inspect
import os
from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    cache_utils,
    modeling_outputs,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.utils import cached_file, logging

try:
    from transformers.utils.output_capturing import selected_hidden_states
except ImportError:  # releases that return all hidden states or none
    selected_hidden_states = None

logger = logging.get_logger(__name__)

NEWEST_TESTED = "5.24"
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

CACHE_NAMES = ("cache", "past_key_values")
_SHOWN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = next(name for name in CACHE_NAMES if name in _SHOWN)

# Whether `generate` encodes visuals once, takes them encoded (as `mm_encoder_outputs`), and repeats
# them so for beams.
ENCODES_FIRST = hasattr(GenerationMixin, "_expand_multimodal_outputs")

# Arguments of a backbone that it hands on to its encoders: where it returns what they returned.
OF_ENCODERS = ("output_hidden_states", "output_attentions")
if not hasattr(modeling_outputs, "MultimodalModelOutput"):
    OF_ENCODERS = ()

# What Qwen3-VL's encoder returns; in transformers 4 a tuple.
BaseModelOutputWithDeepstackFeatures = getattr(
    modeling_qwen3_vl,
    "BaseModelOutputWithDeepstackFeatures",
    modeling_outputs.BaseModelOutputWithPooling,
)

# Whether Qwen3-VL's backbone has a method for rotary positions, or makes them in `forward`.
BACKBONE_DERIVES_POSITIONS = hasattr(modeling_qwen3_vl.Qwen3VLModel, "compute_3d_position_ids")

# transformers 5 has quantized layers of more than one kind.
QUANTIZED_LAYER = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)

# Arguments of stock forwards that reach the text model and change nothing that a prefill computes.
IDLE_ARGUMENTS = frozenset(
    {
        "cache_position",  # counted again from the cache
        "mm_token_type_ids",  # the backbone reads placeholders from the ids
        "num_items_in_batch",  # of the loss
        "rope_deltas",
        "shift_labels",  # of the loss
        "token_type_ids",
    }
)


def warn_if_untested() -> None:
    """Say once that the installed transformers is newer than the newest that was tested."""
    installed, tested = (_release(version) for version in (transformers.__version__, NEWEST_TESTED))
    if installed > tested:
        logger.warning_once(
            f"GlimpsePrune was tested with transformers up to {NEWEST_TESTED}; installed is "
            f"{transformers.__version__}, where names it relies on may have changed"
        )


def _release(version: str) -> tuple[int, ...]:
    """`5.24.0.dev0` to `(5, 24)`."""
    return tuple(int(part) for part in version.split(".")[:2])


def take_cache(arguments: dict, cache: Cache | None = None) -> Cache | None:
    """Remove the cache from a call's keyword arguments, under whichever name it came.

    Args:
        arguments: keyword arguments; they lose the cache.
        cache: what came under the name `cache` where the call names that argument.

    Raises:
        ValueError: when two names carry one, or a cache came under a name nobody knows.
    """
    found = [] if cache is None else [cache]
    found += [arguments.pop(name) for name in CACHE_NAMES if name in arguments]
    found = [each for each in found if each is not None]
    if len(found) > 1:
        raise ValueError(
            f"give one of {' and '.join(CACHE_NAMES)}, not both: they are one argument"
        )
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise ValueError(
                f"a cache came as {name!r}, a name that this model does not know: it would be "
                f"ignored (transformers {transformers.__version__}; tested up to {NEWEST_TESTED})"
            )
    return found[0] if found else None


def given_cache(cache: Cache | None) -> dict:
    """The keyword argument that hands a cache to a stock method."""
    return {CACHE_NAME: cache}


def cache_of(outputs) -> Cache | None:
    """The cache that a model or `generate` returned."""
    return getattr(outputs, CACHE_NAME, None)


def outputs_with_cache(last_hidden_state: torch.Tensor, cache: Cache | None, **fields):
    """What a stock text model returns."""
    return BaseModelOutputWithPast(last_hidden_state, **given_cache(cache), **fields)


def causal_mask(
    config: PretrainedConfig,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: DynamicCache,
    start: int,
) -> torch.Tensor | None:
    """The mask of the installed attention implementation.

    Args:
        config: of the text model.
        states: `(batch, tokens, hidden)`.
        attention_mask: `(batch, slots)` bool, or None.
        cache: whose first layer tells how much is held.
        start: logical position of the first token.
    """
    arguments = {"config": config, "attention_mask": attention_mask, **given_cache(cache)}
    if TRANSFORMERS_5:
        return create_causal_mask(inputs_embeds=states, **arguments)
    positions = torch.arange(start, start + states.shape[1], device=states.device)
    return create_causal_mask(input_embeds=states, cache_position=positions, **arguments)


def plain_rotary(
    config: PretrainedConfig, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `(batch, length, head_dim)` as the attention applies them.

    Where positions have three axes, older releases hand the layers one table an axis, from which
    the attention takes a section each.

    Args:
        config: of the text model.
        rotary: what its `rotary_emb` returns.
    """
    if rotary[0].ndim == 3:
        return rotary
    settings = config.rope_parameters if TRANSFORMERS_5 else config.rope_scaling
    sections = list(settings["mrope_section"]) * 2
    return tuple(
        torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1)
        for table in rotary
    )


# Whether hidden states of a layer show what visuals add to its input: in transformers 4 they do, as
# it is added in place.
STATES_SHOW_ADDITIONS = not TRANSFORMERS_5
TEXT_MODEL_TELLS_OF_LAYERS = TRANSFORMERS_5  # in Qwen3-VL; else each class collects it
LAYER_OUTPUTS = ("hidden_states", "attentions")


def number_of_tokens(query: int | torch.Tensor) -> int:
    """New tokens, as `get_mask_sizes` is told them: a number, or on transformers 4 positions."""
    return query if isinstance(query, int) else query.shape[0]


# Encoders of transformers 5 return tuples where a configuration says so, unless told not to.
AS_OUTPUT = {"return_dict": True} if TRANSFORMERS_5 else {}


def encoder_fields(outputs, adds_between_layers: bool) -> dict:
    """What the stock encoder returned, by the names and in the order of transformers 5.

    Images are told apart in all that the decoder takes.

    Args:
        adds_between_layers: whether it returns something to add between decoder layers.
    """
    fields = outputs
    if not TRANSFORMERS_5:
        embeddings, added = outputs if adds_between_layers else (outputs, None)
        fields = {"pooler_output": embeddings, "deepstack_features": added}
    fields = {name: value for name, value in fields.items() if value is not None}
    if adds_between_layers and not ENCODES_FIRST:
        sizes = [len(of_image) for of_image in fields["pooler_output"]]
        added = [layer.split(sizes) for layer in fields["deepstack_features"]]
        fields["deepstack_features"] = added
    return fields


def in_stock_form(features, return_dict: bool):
    """Encoded visuals in the form in which the stock methods return them."""
    added = features.deepstack_features
    if added is not None and not ENCODES_FIRST:
        added = features["deepstack_features"] = [torch.cat(list(layer)) for layer in added]
    if not TRANSFORMERS_5:
        return features.pooler_output if added is None else (features.pooler_output, added)
    if return_dict:
        return features
    return features.to_tuple()


def add_encoded(outputs, encoded: dict) -> None:
    """Put encoded visuals where the stock backbone returns them.

    Args:
        outputs: of a backbone that was given embeddings.
        encoded: encoder outputs by kind.
    """
    names = type(outputs).__dataclass_fields__
    for kind, features in encoded.items():
        if f"{kind}_outputs" in names:
            outputs[f"{kind}_outputs"] = features
        elif f"{kind}_hidden_states" in names:
            hidden = outputs.last_hidden_state
            embeddings = torch.cat(list(features.pooler_output))
            outputs[f"{kind}_hidden_states"] = embeddings.to(hidden)


def select_hidden_states(hidden_states: tuple, asked: bool | int | Sequence[int]) -> tuple:
    """The hidden states that a caller asked for by index, None for the others.

    Releases that know no indices return all.
    """
    indices = selected_hidden_states and selected_hidden_states(asked)
    if indices is None:
        return hidden_states
    places = range(len(hidden_states))
    wanted = {index % len(places) for index in indices if -len(places) <= index < len(places)}
    return tuple(each if i in wanted else None for i, each in enumerate(hidden_states))


def clip_transformer(tower: nn.Module) -> nn.Module:
    """The part of a CLIP tower that holds its embeddings' norm and its blocks."""
    return tower if TRANSFORMERS_5 else tower.vision_model


def token_types(image: torch.Tensor, video: torch.Tensor) -> dict:
    """What `get_rope_index` of Qwen takes beside the ids to tell placeholders.

    Args:
        image, video: `(batch, length)` bool.
    """
    return {"mm_token_type_ids": image.int() + 2 * video.int()} if TRANSFORMERS_5 else {}


def subset_arguments(kind: str, places: dict[str, torch.Tensor]) -> dict:
    """Arguments that tell Qwen2.5-VL's vision encoder where its tokens are, in the grid's place.

    None on releases whose encoder asks its own methods `rot_pos_emb` and `get_window_index`, which
    some releases have but do not call.

    Args:
        kind: of the visuals; `get_image_features` takes its encoder's arguments by a prefix.
        places: by the names that the encoder has for them.
    """
    if not hasattr(modeling_qwen2_5_vl, "get_vision_window_index"):
        return {}
    return {f"{kind}_{name}": value for name, value in places.items()}


def learned_positions(
    encoder: PreTrainedModel, grid: torch.Tensor
) -> dict[str, tuple[torch.Tensor, int]] | None:
    """Which learned positions Qwen3-VL's vision encoder mixes for each patch, and how.

    Args:
        grid: `(images, 3)` in patches.

    Returns:
        By the encoder's names for it, what it takes, and along which dimension patches lie in it;
        None on releases whose encoder asks its own methods.
    """
    sides = {
        "num_grid_per_side": encoder.num_grid_per_side,
        "spatial_merge_size": encoder.spatial_merge_size,
    }
    if hasattr(modeling_qwen3_vl, "get_vision_interpolation_indices_and_weights"):
        name, by_patch = "interp", 0
        found = modeling_qwen3_vl.get_vision_interpolation_indices_and_weights(
            grid,
            mode=encoder.interpolation_mode,
            align_corners=encoder.interpolation_align_corners,
            **sides,
        )
    elif hasattr(modeling_qwen3_vl, "get_vision_bilinear_indices_and_weights"):
        name, by_patch = "bilinear", 1
        found = modeling_qwen3_vl.get_vision_bilinear_indices_and_weights(grid, **sides)
    else:
        return None
    return {f"{name}_indices": (found[0], by_patch), f"{name}_weights": (found[1], by_patch)}


def tokens_behind(past: int, real: torch.Tensor | int) -> torch.Tensor | int:
    """What a stock `rope_deltas` is added to: a row's tokens, on transformers 4 its padded length.

    Args:
        past: tokens that the cache holds.
        real: those of each row that are no padding, `(batch, 1)`.
    """
    return real if TRANSFORMERS_5 else past


def counts_positions(model_class: type) -> bool:
    """Whether `generate` counts rotary positions itself, and brings later turns' visuals along."""
    return hasattr(model_class, "_prepare_position_ids_for_generation")


def file_of(repository: str | os.PathLike, name: str, **hub_arguments) -> str | None:
    """Where a file of a folder or Hub repository lies, or None where there is none."""
    return cached_file(
        repository, name, _raise_exceptions_for_missing_entries=False, **hub_arguments
    )


def lacks_weights(module: nn.Module) -> bool:
    """Whether a module that is being initialised has weights that were not loaded.

    Some releases initialise every module after loading and leave loaded weights as they are.
    """
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not all(getattr(weight, "_is_hf_initialized", False) for weight in own)


def keep_out_of_quantisation(model: PreTrainedModel, path: str) -> None:
    """Let no quantizer that asks for exceptions touch a part of a model.

    The list they ask is the one of what stays in float32 when a model is loaded in float16, so the
    part does that, too. transformers 5 matches paths from their start, transformers 4 any part of
    them.

    Args:
        path: of the part, from the model.
    """
    name = path if TRANSFORMERS_5 else path.rpartition(".")[2]
    model._keep_in_fp32_modules = [*(model._keep_in_fp32_modules or ()), name]


def backbone_names(model_class: type[PreTrainedModel], key_mapping: dict | None) -> dict:
    """The argument with which a backbone finds its weights in a whole model's repository.

    transformers takes away the prefix `model.` itself, but before 5.24 not where names of the file
    lack it before they are mapped.

    Args:
        key_mapping: regular expression -> replacement, which gives names of the whole model.
    """
    if TRANSFORMERS_5 and not key_mapping:
        return {}
    key_mapping = key_mapping or model_class._checkpoint_conversion_mapping
    own = {pattern: name.removeprefix("model.") for pattern, name in key_mapping.items()}
    return {"key_mapping": own | {r"^model\.": ""}}


def mismatched_names(report: dict) -> list[str]:
    """Weights that a checkpoint holds in another shape, of what `from_pretrained` reports.

    transformers 5 gives the shapes as well.
    """
    faults = report["mismatched_keys"]
    return [fault if isinstance(fault, str) else fault[0] for fault in faults]


def stored_buffer(module: nn.Module, name: str) -> torch.Tensor:
    """A buffer as the checkpoint holds it.

    Of a module that lies on disk, whose weights accelerate fetches when they are needed, the
    library leaves buffers as they were made.
    """
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return getattr(module, name) if weights is None else weights[name]


def save_under_own_names(model: PreTrainedModel) -> None:
    """Forget the base's names, under which transformers 5 would save what was loaded from them."""
    model._weight_conversions = None
