"""What Qwen3-VL's forwards show of layers, and where its tokens stand."""

from collections.abc import Callable
from functools import wraps

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .encoder_subset import EncoderSubset
from .stock import (
    BACKBONE_DERIVES_POSITIONS,
    LAYER_OUTPUTS,
    TEXT_MODEL_TELLS_OF_LAYERS,
    given_cache,
    learned_positions,
)


def with_layers_shown(forward: Callable) -> Callable:
    """Decorate a forward above a text model, so that it shows of layers what the text model tells.

    Where each class shows what it saw of the layers itself, they run by halves here; and of a whole
    model the last hidden state lacks the final norm.
    """
    if TEXT_MODEL_TELLS_OF_LAYERS:
        return forward

    @wraps(forward)
    def shown(self, *args, return_dict: bool | None = None, layers: dict | None = None, **kwargs):
        layers = {} if layers is None else layers
        outputs = forward(self, *args, return_dict=True, layers=layers, **kwargs)
        told = {name: layers[name] for name in LAYER_OUTPUTS if layers.get(name) is not None}
        if "hidden_states" in told and "logits" in outputs:
            told["hidden_states"] = (*told["hidden_states"][:-1], layers["unnormed"])
        if told:
            others = {name: outputs[name] for name in outputs if name not in told}
            outputs = type(outputs)(**others)
        for name, value in told.items():
            outputs[name] = value  # behind the others, as the stock class does
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return shown


def multimodal_positions(
    backbone: PreTrainedModel,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.Tensor,
    cache: Cache | None,
    inputs: dict,
) -> torch.LongTensor | None:
    """Rotary positions as Qwen3-VL's backbone derives them from ids, of which it takes note.

    Args:
        inputs: the call's other arguments.

    Returns:
        None where the stock backbone does so without ids.
    """
    mask, past = inputs.get("attention_mask"), 0 if cache is None else cache.get_seq_length()
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    if not BACKBONE_DERIVES_POSITIONS:
        if past and backbone.rope_deltas is not None or input_ids is None and mask is None:
            return None
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        if mask is not None and mask.ndim == 4:  # a token that pads does not see itself
            mask = mask[:, 0].diagonal(dim1=1, dim2=2)
            mask = (mask if mask.dtype == torch.bool else mask == 0).int()
        positions, deltas = backbone.get_rope_index(input_ids, attention_mask=mask, **grids)
        backbone.rope_deltas = deltas
        return positions
    if input_ids is None:
        return None
    positions = backbone.compute_3d_position_ids(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        mm_token_type_ids=inputs.get("mm_token_type_ids"),
        **given_cache(cache),
        **grids,
    )
    if positions is None:
        places = torch.arange(past, past + input_ids.shape[1], device=inputs_embeds.device)
        return places.expand(len(input_ids), -1)
    return positions


def part_arguments(encoder: PreTrainedModel, subset: EncoderSubset) -> dict:
    """Arguments that tell Qwen3-VL's vision encoder where its patches are, in the grid's place.

    None on releases whose encoder asks its own methods `rot_pos_emb` and
    `fast_pos_embed_interpolate`. Learned positions are interpolated to the whole images' grid.
    `get_image_features`, which encodes videos too, takes them by a prefix.
    """
    places = learned_positions(encoder, subset.whole)
    if places is None:
        return {}
    parts = {
        f"image_{name}": part.index_select(by_patch, subset.patches)
        for name, (part, by_patch) in places.items()
    }
    return {"image_position_ids": subset.position_ids, **parts}
