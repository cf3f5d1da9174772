"""Which visual tokens say nothing new: pixels that their neighbours predict.

A token is left out where its left or upper neighbour shows the same. So the first token of every
even region stays and stands for it. The rule looks at pixels alone; it knows no question.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

GREY_LEVELS = 255.0
CHANNELS = 3
Statistics = tuple[Sequence[float], Sequence[float]]
MOST_LEVELS = 32  # that several greys share; others stand alone


def telling_tokens(
    pixels: torch.Tensor, geometry: torch.Tensor, tolerance: float, statistics: Statistics
) -> torch.Tensor:
    """Which tokens of images (or videos) their neighbours do not predict.

    With a tolerance of 0 a token is predicted by a neighbour with exactly its pixels. Above 0 also
    by one of the same even colour: the pixels of each lie within the tolerance, and their means,
    channel by channel, on the same level. Levels are as wide as the tolerance and lie around the
    most frequent means of the image, so noise falls on no border, and slow gradients do not vanish.
    Frames of a video are looked at one by one.

    Args:
        pixels: `(N * patches, channels * values)` as the image processor makes them for Qwen's
            encoders, token after token in raster order.
        geometry: `(N, 6)`, see `token_geometry`.
        tolerance: in grey levels of 0 to 255.
        statistics: mean and standard deviation, by channel, that normalised the pixels.

    Returns:
        `(N,)` bool, True at tokens to encode; at least one an image and frame.
    """
    count = len(geometry)
    tokens = pixels.view(count, -1)
    row, column, width = geometry[:, 1], geometry[:, 2], geometry[:, 5]
    place = torch.arange(count, device=geometry.device)
    left = torch.where(column > 0, place - 1, place)
    upper = torch.where(row > 0, place - width, place)
    same_left = torch.zeros_like(place, dtype=torch.bool)
    same_left[1:] = (tokens[1:] == tokens[:-1]).all(1)
    predicted = same_left & (left != place)
    predicted |= (tokens == tokens[upper]).all(1) & (upper != place)
    if tolerance > 0:
        levels = _levels_of_even_tokens(pixels, geometry, tolerance, statistics)
        for neighbour in (left, upper):
            same = (levels == levels[neighbour]).all(1) & (levels[:, 0] >= 0)
            predicted |= same & (neighbour != place)
    return ~predicted


def _levels_of_even_tokens(
    pixels: torch.Tensor, geometry: torch.Tensor, tolerance: float, statistics: Statistics
) -> torch.Tensor:
    """`(N, channels)` level of each even token's mean in its frame; -1 at tokens that are not."""
    count = len(geometry)
    channels = pixels.view(count, -1, CHANNELS, pixels.shape[1] // CHANNELS).float()
    offset, scale = (GREY_LEVELS * torch.tensor(each, device=pixels.device) for each in statistics)
    low, high = channels.amin((1, 3)), channels.amax((1, 3))
    is_even = ((high - low) * scale <= tolerance).all(1, keepdim=True)
    means = (channels.mean((1, 3)) * scale + offset).round().clamp(0, GREY_LEVELS).long()
    starts = (geometry[:, 1:3] == 0).all(1).nonzero()[:, 0].tolist()  # of frames
    sizes = [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)]
    parts = zip(means.split(sizes), is_even.split(sizes), strict=True)
    levels = torch.cat([_levels(of_frame, even, tolerance) for of_frame, even in parts])
    return torch.where(is_even, levels, -1)


def _levels(means: torch.Tensor, is_even: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Level `(N, channels)` of each mean, the most frequent ones first.

    Args:
        means: `(N, channels)` whole grey levels.
        is_even: `(N, 1)` bool, tokens that count.
    """
    greys = int(GREY_LEVELS) + 1
    counts = torch.zeros(CHANNELS, greys, device=means.device)
    counts.scatter_add_(1, means.T, is_even.T.expand(CHANNELS, -1).to(counts))
    reach = int(tolerance / 2)
    grey = torch.arange(greys, device=means.device)
    level_of = (grey + greys).expand(CHANNELS, -1)  # a level of its own, until it joins one
    free = torch.ones_like(level_of, dtype=torch.bool)
    for level in range(min(MOST_LEVELS, greys)):
        around = F.pad((counts * free).cumsum(1), (reach + 1, reach), mode="replicate")
        around[:, : reach + 1] = 0
        frequent = around[:, 2 * reach + 1 :] - around[:, : -2 * reach - 1]
        centre = frequent.argmax(1, keepdim=True)
        joins = free & ((grey - centre).abs() <= reach)
        level_of = torch.where(joins, level, level_of)
        free = free & ~joins
    return level_of.gather(1, means.T).T
