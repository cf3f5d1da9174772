"""The tiny base: a stock Qwen2.5-VL of some 3.9 million parameters, with fresh weights.

Two choices matter for so small a model. The rotary frequencies are dealt to time, height and
width in turn (fifteen sections instead of three), so that width too has fast frequencies and a
token can tell its right neighbour from its left one. And the weights start at the scale of
their fan-in, with the layers' last projections near zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..portable import edit_json, make_processor_portable, portable_config

if TYPE_CHECKING:
    from transformers import ProcessorMixin, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

MROPE_SECTIONS = [1] * 14 + [2]  # frequencies for time, height, width, time, height, ...
ROTARY_BASE = 1000.0
CODE_SCALE = 0.3  # standard deviation of the embeddings' entries


def tiny_config(
    processor: ProcessorMixin, decoder: Mapping[str, int] | None = None
) -> Qwen2_5_VLConfig:
    """The configuration of the tiny base for a processor's vocabulary.

    `decoder` replaces fields of the text configuration, the number of layers say.
    """
    from transformers import Qwen2_5_VLConfig

    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROTARY_BASE,
        "rope_scaling": {"type": "mrope", "mrope_section": list(MROPE_SECTIONS)},
        "tie_word_embeddings": False,
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
        **(decoder or {}),
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def fresh_base(
    processor: ProcessorMixin, seed: int, decoder: Mapping[str, int] | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny base with weights drawn from `seed`, in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(tiny_config(processor, decoder)).float()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _draw(name, parameter, generator)
    _relate(model)
    return model


@torch.no_grad()
def _relate(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Start from likeness: heads look for what resembles the token, outputs resemble inputs."""
    model.lm_head.weight.copy_(0.1 * model.get_input_embeddings().weight)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        groups = attention.k_proj.weight.view(-1, attention.head_dim, attention.hidden_size)
        queries = attention.q_proj.weight.view(
            len(groups), attention.num_key_value_groups, *groups.shape[1:]
        )
        queries[:, 0] = groups


@torch.no_grad()
def _draw(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    elif "embed_tokens" in name:
        parameter.normal_(0.0, CODE_SCALE, generator=generator)
    else:
        fan_in = parameter[0].numel()
        last = any(part in name for part in ("o_proj", "down_proj", "attn.proj", "lm_head"))
        parameter.normal_(0.0, (0.1 if last else 1.0) * fan_in**-0.5, generator=generator)


def save_base(
    model: Qwen2_5_VLForConditionalGeneration, processor: ProcessorMixin, folder: Path
) -> None:
    """Write a folder that transformers 4.57 and 5 load: bfloat16 weights, configs, processor."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)
    edit_json(folder / "config.json", _bfloat16_config)
    pad, end = model.config.text_config.pad_token_id, model.config.text_config.eos_token_id
    generation = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_processor(processor, folder)


def save_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Write a processor with the separate files that transformers 4.57 looks for as well."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.video_processor.save_pretrained(folder)
    make_processor_portable(folder)


def _bfloat16_config(config: dict) -> dict:
    """The configuration as of the written weights, by names that both generations read."""
    config = portable_config(config)
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    return config
