"""Tiny configurations and prompts of the LLaVA families, for `conftest.py`.

The tower sees squares of 12 x 12 pixels as 3 x 3 patches. A LLaVA image is one such square whatever
its described size. A LLaVA-NeXT image of `(height, width)` patches of pixels comes as the square,
and as the grid of the tiles it is cut into, without their padding.
"""

import torch
from transformers.image_processing_utils import select_best_resolution

IMAGE_TOKEN = 190
SIDE, PATCH = 3, 4
TILE = SIDE * PATCH
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]


def config_fields(
    vocabulary: int,
    pad_token: int,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_depth: int = 3,
    text_model_type: str = "llama",
    patch_size: int = PATCH,
    **windows,
) -> dict:
    """Keyword arguments of a tiny stock configuration; CLIP has no windows to be set."""
    text = dict(
        model_type=text_model_type, vocab_size=vocabulary, hidden_size=hidden_size,
        intermediate_size=2 * hidden_size, num_hidden_layers=num_layers, rms_norm_eps=1e-6,
        num_attention_heads=num_heads, num_key_value_heads=num_key_value_heads,
        max_position_embeddings=2048, rope_theta=10_000.0, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=pad_token,
    )  # fmt: skip
    if text_model_type == "mistral":
        text["sliding_window"] = None
    vision = dict(
        model_type="clip_vision_model", hidden_size=16, intermediate_size=32, image_size=TILE,
        num_hidden_layers=vision_depth, num_attention_heads=2, patch_size=patch_size,
        projection_dim=8,
    )  # fmt: skip
    return dict(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False, image_seq_length=(TILE // patch_size) ** 2,
    )  # fmt: skip


def next_config_fields(*arguments, **sizes) -> dict:
    """As `config_fields`, for LLaVA-NeXT."""
    return config_fields(*arguments, **sizes) | {"image_grid_pinpoints": PINPOINTS}


def grid_of(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches that are left of an image of that many patches, unpadded.

    The image grows until its tiles are full in one direction; what is missing in the other, halved
    and rounded down, is cut off on both sides.
    """
    tiles = best_tiles(height, width)
    rows, columns = tiles[0] * SIDE, tiles[1] * SIDE
    if width * rows > height * columns:  # full from side to side
        return rows - (rows - int(round(height * columns / width, 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * rows / height, 7))) // 2 * 2


def best_tiles(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles that such an image is cut into."""
    best = select_best_resolution((height * PATCH, width * PATCH), PINPOINTS)
    return best[0] // TILE, best[1] // TILE


def llava_image(part: tuple, generator: torch.Generator) -> tuple[list[int], dict, list]:
    """Placeholders, pixel inputs and `(kind, grid)` of each view of an image."""
    pixels = torch.randn(1, 3, TILE, TILE, generator=generator)
    return [IMAGE_TOKEN] * SIDE**2, {"pixel_values": pixels}, [("image", (SIDE, SIDE))]


def llava_next_image(part: tuple, generator: torch.Generator) -> tuple[list[int], dict, list]:
    """As `llava_image`; tiles are padded to as many as any image can have."""
    rows, columns = grid_of(*part)
    tiles = best_tiles(*part)
    pixels = torch.zeros(1, 5, 3, TILE, TILE)
    count = 1 + tiles[0] * tiles[1]
    pixels[0, :count] = torch.randn(count, 3, TILE, TILE, generator=generator)
    size = torch.tensor([[part[0] * PATCH, part[1] * PATCH]])
    placeholders = [IMAGE_TOKEN] * (SIDE**2 + rows * (columns + 1))
    views = [("base_view", (SIDE, SIDE)), ("image", (rows, columns))]
    return placeholders, {"pixel_values": pixels, "image_sizes": size}, views
