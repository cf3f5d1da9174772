"""Pictures of a glimpse: which visual tokens were encoded and kept, and how important each was."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

DIMMED = 0.25
UNSEEN = (38, 70, 150)  # what a token that was never encoded is tinted with


def draw_glimpse(
    image: Image.Image,
    keep_mask: torch.Tensor,
    importance: torch.Tensor,
    grid: tuple[int, int],
    encoded: torch.Tensor | None = None,
) -> Image.Image:
    """The image with dropped tokens dimmed, and beside it the scores as a heat map.

    Tokens that were never encoded are blue on the left, and grey, without a score, on the right.

    Args:
        image: the picture that was asked about.
        keep_mask: `(height * width,)` bool, True where kept.
        importance: `(height * width,)` logits.
        grid: the image's `(height, width)` in visual tokens.
        encoded: `(height * width,)` bool, or None where all were encoded.

    Returns:
        A picture twice as wide as the image.
    """
    both = Image.new("RGB", (2 * image.width, image.height))
    both.paste(dim_dropped(image, keep_mask, grid, encoded))
    both.paste(heat_map(image, importance, grid, encoded), (image.width, 0))
    return both


def dim_dropped(
    image: Image.Image,
    keep_mask: torch.Tensor,
    grid: tuple[int, int],
    encoded: torch.Tensor | None = None,
) -> Image.Image:
    """The image with dropped tokens dimmed; arguments as for `draw_glimpse`."""
    kept = _spread(keep_mask.float(), grid, image.size)
    pixels = _pixels(image) * (DIMMED + (1 - DIMMED) * kept)
    if encoded is not None:
        seen = _spread(encoded.float(), grid, image.size)
        pixels += (1 - DIMMED) * (1 - seen) * np.asarray(UNSEEN, dtype=np.float32)
    return _picture(pixels)


def heat_map(
    image: Image.Image,
    importance: torch.Tensor,
    grid: tuple[int, int],
    encoded: torch.Tensor | None = None,
) -> Image.Image:
    """The image in grey under its scores, blue to red; arguments as for `draw_glimpse`."""
    probability = _spread(importance.float().sigmoid(), grid, image.size)
    grey = _pixels(image).mean(axis=2, keepdims=True)
    heat = np.concatenate([255 * probability, 0.5 * grey, 255 * (1 - probability)], axis=2)
    blended = 0.4 * grey + 0.6 * heat
    if encoded is not None:
        seen = _spread(encoded.float(), grid, image.size)
        blended = seen * blended + (1 - seen) * grey
    return _picture(blended)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, one below the other."""
    width, height = pictures[0].size
    stack = Image.new("RGB", (width, len(pictures) * height))
    for index, picture in enumerate(pictures):
        stack.paste(picture, (0, index * height))
    return stack


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _spread(values: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """One value a token to `(height, width, 1)` pixels."""
    tokens = Image.fromarray(values.cpu().view(grid).numpy())
    return np.asarray(tokens.resize(size, Image.Resampling.NEAREST))[..., None]
