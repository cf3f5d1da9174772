"""Models of real or scaled-down geometry with random weights, and prompts of a wanted size."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from conversion.hub_configs import HUB_CONFIGS
from glimpseprune.families import family_of
from glimpseprune.hub.shards import read_json
from modeling_glimpseprune.glimpse_fields import GLIMPSE_FIELDS
from modeling_glimpseprune.stock import TRANSFORMERS_5

SCALED = "scaled"
REAL = ("qwen2_5_vl_3b", "qwen2_5_vl_7b", "llava_1_5_7b")
# Qwen2.5-VL-7B with every width divided by about seven and half its layers (K = 9 of 14 for 18 of
# 28, two layers of the predictor for four), and a vision encoder of eight blocks, one with full
# attention: for machines without an accelerator.
SCALED_TEXT = {
    "num_hidden_layers": 14,
    "max_window_layers": 14,
    "glimpse_embedding_layers": list(range(14)),
    "glimpse_layer": 9,
    "attention_layers": [9],
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2688,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "image_token_id": 8190,
    "video_token_id": 8191,
    "vision_start_token_id": 8188,
    "vision_end_token_id": 8189,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vision_layers": [7, 3],
    "predictor_hidden_size": 32,
    "predictor_condition_size": 80,
}
SCALED_VISION = {
    "depth": 8,
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_heads": 2,
    "out_hidden_size": 512,
    "fullatt_block_indexes": [7],
}


class Pair(NamedTuple):
    """A stock and a GlimpsePrune model that share their weights, in `eval` mode."""

    stock: PreTrainedModel
    pruned: PreTrainedModel


@dataclass
class Prompt:
    """Inputs of a batch of equal prompts.

    Attributes:
        inputs: keyword arguments of `generate`.
        visual: visual tokens of each prompt.
        text: its other tokens.
    """

    inputs: dict
    visual: int
    text: int


def build_config(geometry: str, glimpse_layer: int | None) -> dict:
    """The content of a GlimpsePrune configuration.

    Args:
        geometry: one of `REAL`, or `SCALED`.
        glimpse_layer: K, or None for the official one.

    Raises:
        ValueError: for a geometry that there is none of.
    """
    if geometry not in (*REAL, SCALED):
        raise ValueError(f"geometry must be one of {', '.join((*REAL, SCALED))}, got {geometry}")
    config = read_json(HUB_CONFIGS / _folder(geometry) / "config.json")
    if geometry == SCALED:
        config |= SCALED_TEXT
        config["vision_config"] = config["vision_config"] | SCALED_VISION
    if glimpse_layer is not None:
        config |= {"glimpse_layer": glimpse_layer, "attention_layers": [glimpse_layer]}
    return config


def build_pair(
    config: dict, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Pair:
    """Models with random weights, which both hold but once."""
    family = family_of(config, "the geometry")
    options = {"dtype": dtype, "attn_implementation": attention}
    with torch.device(device):
        pruned = family.model_class._from_config(
            family.config_class(**copy.deepcopy(config)), **options
        ).eval()
    pruned.model.glimpse.trained.fill_(True)
    base = CONFIG_MAPPING[family.base_model_type]
    ours = {*GLIMPSE_FIELDS, "architectures", "auto_map", "model_type"}
    stock_config = base(**copy.deepcopy({k: v for k, v in config.items() if k not in ours}))
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(stock_config, **options).eval()
    weights = {k: v for k, v in pruned.state_dict().items() if not k.startswith("model.glimpse.")}
    stock.load_state_dict(weights, assign=True)
    for name, buffer in list(stock.named_buffers()):
        if buffer.device.type == "meta":  # not saved: rotary frequencies
            parent, _, own_name = name.rpartition(".")
            stock.get_submodule(parent)._buffers[own_name] = pruned.get_buffer(name)
    stock.tie_weights()
    for model in (stock, pruned):
        model.requires_grad_(False)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return Pair(stock, pruned)


def build_prompt(
    model: PreTrainedModel, batch: int, visual: int, text: int, dtype: torch.dtype
) -> Prompt:
    """Random pixels and ids; the number of visual tokens is the nearest that there is.

    Args:
        batch: equal prompts.
        visual: wanted visual tokens of each.
        text: further tokens of each, behind the image.
    """
    device, config = model.device, model.config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 100, (batch, text), generator=generator)
    if hasattr(config, "vision_start_token_id"):
        height = round(math.sqrt(visual))
        width = max(1, round(visual / height))
        count, merge = height * width, config.vision_config.spatial_merge_size
        vision = config.vision_config
        row = [config.vision_start_token_id, *[config.image_token_id] * count]
        row.append(config.vision_end_token_id)
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shape = (batch * count * merge**2, values)
        grid = torch.tensor([[1, height * merge, width * merge]] * batch)
        inputs = {"image_grid_thw": grid}
    else:
        images = max(1, round(visual / config.image_seq_length))
        count, size = images * config.image_seq_length, config.vision_config.image_size
        row = [config.image_token_id] * count
        shape, inputs = (batch * images, 3, size, size), {}
    ids = torch.cat([torch.tensor([row] * batch), words], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if TRANSFORMERS_5 and "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    pixels = torch.randn(shape, generator=generator).to(dtype)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return Prompt(inputs | {"pixel_values": pixels.to(device)}, count, ids.shape[1] - count)


def _folder(geometry: str) -> str:
    return "qwen2_5_vl_7b" if geometry == SCALED else geometry
