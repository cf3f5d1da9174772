"""Tiny random models and prompts that the tests share.

`build_models` makes a stock Qwen2.5-VL and a GlimpsePrune model with the same base weights, in
float32; `build_batch` turns short descriptions of prompts into model inputs. Both are plain
functions, offered to the tests as fixtures of the same names.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from modeling_glimpseprune.configuration_glimpseprune import GlimpsePruneQwen2_5_VLConfig
from modeling_glimpseprune.modeling_qwen2_5_vl import (
    GlimpsePruneQwen2_5_VLForConditionalGeneration,
)

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
PAD_TOKEN, VOCABULARY = 0, 200
FIRST_SPECIAL_TOKEN = 190  # text tokens are 1..189
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 190, 191, 192, 193
PATCH, MERGE, TEMPORAL_PATCH = 4, 2, 2


class Models(NamedTuple):
    """A stock model and a GlimpsePrune model with the same base weights, both in `eval` mode."""

    stock: Qwen2_5_VLForConditionalGeneration
    pruned: GlimpsePruneQwen2_5_VLForConditionalGeneration


class Batch(NamedTuple):
    """Inputs of several prompts, left-padded together and one by one.

    Args:
        inputs: keyword arguments of `forward` and `generate` for the whole batch.
        rows: the same for each prompt alone, without padding.
        visual_counts: visual tokens of each prompt.
    """

    inputs: dict
    rows: list[dict]
    visual_counts: list[int]

    @property
    def num_visual(self) -> int:
        return sum(self.visual_counts)

    def split(self, visual: torch.Tensor) -> list[torch.Tensor]:
        """Cut a `(num_visual, ...)` tensor in prompt order into one piece a row."""
        return list(visual.split(self.visual_counts))


def build_config_fields(
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_depth: int = 3,
    window: int = 2,
    full_attention_blocks: tuple[int, ...] = (1,),
) -> dict:
    """Keyword arguments of a tiny stock configuration; `window` is in visual tokens a side."""
    rotary = hidden_size // num_heads // 2
    section = [rotary // 4, (rotary - rotary // 4) // 2]
    section.append(rotary - sum(section))
    text = dict(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=num_heads, rms_norm_eps=1e-6,
        num_key_value_heads=num_key_value_heads, max_position_embeddings=2048,
        use_sliding_window=False, max_window_layers=num_layers, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=PAD_TOKEN, rope_theta=10_000.0,
        rope_scaling={"type": "mrope", "mrope_section": section},
    )  # fmt: skip
    vision = dict(
        depth=vision_depth, hidden_size=16, intermediate_size=32, num_heads=2, in_channels=3,
        out_hidden_size=hidden_size, patch_size=PATCH, spatial_patch_size=PATCH,
        spatial_merge_size=MERGE, temporal_patch_size=TEMPORAL_PATCH, tokens_per_second=2,
        window_size=window * MERGE * PATCH, fullatt_block_indexes=list(full_attention_blocks),
    )  # fmt: skip
    return dict(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=False,
    )  # fmt: skip


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill weights so that attention, scores and greedy tokens are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or "ln_q" in name:
            noise = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            noise = 0.3 * noise
        elif "embed" not in name:
            noise = noise * 1.5 / math.sqrt(weight[0].numel())
        weight.data.copy_(noise)


def build_models(
    seed: int = 0, attn_implementation: str = "sdpa", glimpse: dict | None = None, **sizes
) -> Models:
    """Models of their own; `sizes` as in `build_config_fields`, `glimpse` as in the config."""
    fields = build_config_fields(**sizes)
    fields["attn_implementation"] = attn_implementation
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**fields)).eval()
    randomise(stock, seed)
    stock.lm_head.weight.data[FIRST_SPECIAL_TOKEN:] = 0  # answers are text
    small = {"predictor_hidden_size": 16, "predictor_condition_size": 16, "predictor_num_heads": 2}
    config = GlimpsePruneQwen2_5_VLConfig(**fields, **(small | (glimpse or {})))
    pruned = GlimpsePruneQwen2_5_VLForConditionalGeneration(config).eval()
    missing, unexpected = pruned.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("model.glimpse.") for name in missing)
    randomise(pruned.model.glimpse, seed + 1)
    pruned.model.glimpse.trained.fill_(True)
    for model in (stock, pruned):
        model.generation_config.pad_token_id = PAD_TOKEN
        model.generation_config.suppress_tokens = list(range(FIRST_SPECIAL_TOKEN, VOCABULARY))
    return Models(stock, pruned)


def build_batch(prompts: list[list], seed: int = 0) -> Batch:
    """Random inputs for described prompts.

    Args:
        prompts: for each prompt its parts in order: an integer is that many text tokens,
            `(height, width)` an image and `(frames, height, width)` a video, in visual tokens.
        seed: of token ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [_build_row(parts, generator) for parts in prompts]
    visual_counts = [
        sum(math.prod(part) for part in parts if isinstance(part, tuple)) for parts in prompts
    ]
    return Batch(pad_together(rows), rows, visual_counts)


def _build_row(parts: list, generator: torch.Generator) -> dict:
    ids, pixels, grids = [], {"image": [], "video": []}, {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, FIRST_SPECIAL_TOKEN, (part,), generator=generator).tolist()
            continue
        kind, token = ("image", IMAGE_TOKEN) if len(part) == 2 else ("video", VIDEO_TOKEN)
        frames, height, width = (1, *part)[-3:]
        ids += [VISION_START, *[token] * (frames * height * width), VISION_END]
        grids[kind].append([frames, height * MERGE, width * MERGE])
        patches = frames * height * width * MERGE**2
        size = 3 * TEMPORAL_PATCH * PATCH**2
        pixels[kind].append(torch.randn(patches, size, generator=generator))
    row = {"input_ids": torch.tensor([ids])}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    if TRANSFORMERS_5:
        row["mm_token_type_ids"] = _token_types(row["input_ids"])
    if pixels["image"]:
        row["pixel_values"] = torch.cat(pixels["image"])
        row["image_grid_thw"] = torch.tensor(grids["image"])
    if pixels["video"]:
        row["pixel_values_videos"] = torch.cat(pixels["video"])
        row["video_grid_thw"] = torch.tensor(grids["video"])
    return row


def _token_types(input_ids: torch.Tensor) -> torch.Tensor:
    return (input_ids == IMAGE_TOKEN).int() + 2 * (input_ids == VIDEO_TOKEN).int()


def pad_together(rows: list[dict]) -> dict:
    """Inputs of a batch from those of its prompts."""
    length = max(row["input_ids"].shape[1] for row in rows)
    inputs = {}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in rows[0]:
            inputs[name] = torch.cat([_pad_left(row[name], length) for row in rows])
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        parts = [row[name] for row in rows if name in row]
        if parts:
            inputs[name] = torch.cat(parts)
    return inputs


def _pad_left(row: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=PAD_TOKEN)


@pytest.fixture(scope="session", name="build_models")
def build_models_fixture():
    return build_models


@pytest.fixture(scope="session")
def shared_models():
    """`build_models` with a memory, for tests that leave the models as they found them."""
    remembered = lru_cache(maxsize=None)(
        lambda seed, attention, glimpse, sizes: build_models(
            seed, attention, _thaw(glimpse), **_thaw(sizes)
        )
    )

    def shared(seed=0, attn_implementation="sdpa", glimpse=None, **sizes) -> Models:
        return remembered(seed, attn_implementation, _freeze(glimpse or {}), _freeze(sizes))

    return shared


def _freeze(fields: dict) -> tuple:
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value) for name, value in fields.items()
    )


def _thaw(fields: tuple) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


@pytest.fixture(scope="session", name="build_batch")
def build_batch_fixture():
    return build_batch
