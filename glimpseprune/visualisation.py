"""Pictures of a glimpse: which visual tokens were encoded and kept, and how important each was."""

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
    image = image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float32)
    kept = _spread(keep_mask.float(), grid, image.size)
    dimmed = pixels * (DIMMED + (1 - DIMMED) * kept)
    probability = _spread(importance.float().sigmoid(), grid, image.size)
    grey = pixels.mean(axis=2, keepdims=True)
    heat = np.concatenate([255 * probability, 0.5 * grey, 255 * (1 - probability)], axis=2)
    blended = 0.4 * grey + 0.6 * heat
    if encoded is not None:
        seen = _spread(encoded.float(), grid, image.size)
        dimmed += (1 - DIMMED) * (1 - seen) * np.asarray(UNSEEN, dtype=np.float32)
        blended = seen * blended + (1 - seen) * grey
    both = np.concatenate([dimmed, blended], axis=1)
    return Image.fromarray(both.clip(0, 255).astype(np.uint8))


def _spread(values: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """One value a token to `(height, width, 1)` pixels."""
    tokens = Image.fromarray(values.cpu().view(grid).numpy())
    return np.asarray(tokens.resize(size, Image.Resampling.NEAREST))[..., None]
