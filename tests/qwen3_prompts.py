"""Tiny configurations and prompts of Qwen3-VL, for `conftest.py`.

The first and the last vision block add features, behind decoder layers 0 and 1. Heads are twice as
wide as their share of the model, as in the published 4B they are wider. A frame of a video has text
in front of it, as published prompts have its time.
"""

import math
from pathlib import Path

import torch
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from glimpseprune.tiny_world.vocabulary import build_processor

VIDEO_TOKEN, VISION_START, VISION_END = 191, 192, 193
PATCH, MERGE = 4, 2
FIRST_SPECIAL_TOKEN, IMAGE_TOKEN = 190, 190


def qwen3_config_fields(
    vocabulary: int,
    pad_token: int,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_depth: int = 3,
    patch_size: int = PATCH,
    **windows,
) -> dict:
    """Keyword arguments of a tiny stock configuration; the encoder has no windows to be set."""
    head = 2 * hidden_size // num_heads
    sections = [head // 2 - head // 8 * 2, head // 8, head // 8]
    text = dict(
        vocab_size=vocabulary, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads, rms_norm_eps=1e-6,
        num_key_value_heads=num_key_value_heads, head_dim=head, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=pad_token,
        rope_theta=10_000.0, rope_scaling={
            "rope_type": "default", "mrope_section": sections, "mrope_interleaved": True,
        },
    )  # fmt: skip
    vision = dict(
        depth=vision_depth, hidden_size=16, intermediate_size=32, num_heads=2, in_channels=3,
        out_hidden_size=hidden_size, patch_size=patch_size, spatial_merge_size=MERGE,
        temporal_patch_size=2, num_position_embeddings=16,
        deepstack_visual_indexes=sorted({0, vision_depth - 1}),
    )  # fmt: skip
    return dict(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip


def qwen3_frames(ids: list[int], frames: int, generator: torch.Generator) -> list[int]:
    """Ids of a video whose frames lie apart, from those of one whose frames lie together."""
    count = ids.count(VIDEO_TOKEN) // frames
    apart = []
    for frame in range(frames):
        words = torch.randint(1, FIRST_SPECIAL_TOKEN, (1 + frame % 2,), generator=generator)
        apart += [*words.tolist(), VISION_START, *[VIDEO_TOKEN] * count, VISION_END]
    return apart


def qwen3_processor() -> Qwen3VLProcessor:
    """A stock processor over the tiny vocabulary, with patches of 16 pixels as published."""
    parts = build_processor()
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, min_pixels=32**2),
        tokenizer=parts.tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 2 * 32**2, "longest_edge": 64 * 32**2}
        ),
        chat_template=parts.chat_template,
    )


def write_qwen3_base(folder: Path) -> Path:
    """A tiny stock model and its processor."""
    processor = qwen3_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    fields = qwen3_config_fields(len(processor.tokenizer), ids("<|endoftext|>"), patch_size=16)
    fields |= {
        "image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip
    fields["text_config"]["eos_token_id"] = ids("<|im_end|>")
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**fields))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
