"""Qwen's vision encoders, slowly: whole images in raster order under explicit masks."""

import torch
from torch.nn import functional as F


def encode_slowly(
    encoder, pixels: torch.Tensor, grids: list[list[int]], keep: torch.Tensor, window: int
) -> list[torch.Tensor]:
    """Embeddings `(N, hidden)` of all tokens, while nothing sees what is left out.

    Behind them, of Qwen3-VL, what is added between decoder layers.

    Args:
        encoder: the stock encoder.
        pixels: `(N * patches, values)`.
        grids: frames, height and width of each image in tokens.
        keep: `(N,)` bool.
        window: side of an attention window in tokens, where the encoder has any.
    """
    merge = encoder.spatial_merge_size
    places, frames, windows = [], [], []
    for image, (count, height, width) in enumerate(grids):
        for frame in range(count):
            for row in range(height):
                for column in range(width):
                    for patch in range(merge**2):
                        down, across = divmod(patch, merge)
                        places.append((row * merge + down, column * merge + across))
                        frames.append((image, frame))
                        windows.append((image, frame, row // window, column // window))
    seen = keep.repeat_interleave(merge**2)
    in_frame, in_window = (
        torch.tensor([[mine == other for other in groups] for mine in groups]) & seen
        for groups in (frames, windows)
    )
    states = encoder.patch_embed(pixels)
    learned = getattr(encoder, "pos_embed", None)
    if learned is not None:
        sizes = [(height * merge, width * merge) for _, height, width in grids]
        tables = [_stretched(learned.weight, size) for size in sizes]
        states = states + torch.stack(
            [tables[image][place] for (image, _), place in zip(frames, places, strict=True)]
        )
    size = encoder.blocks[0].attn.qkv.out_features // 3 // encoder.blocks[0].attn.num_heads
    frequencies = 10_000.0 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    angles = (torch.tensor(places)[:, :, None] * frequencies).flatten(1)
    angles = torch.cat([angles, angles], dim=1)[:, None]
    full = getattr(encoder, "fullatt_block_indexes", range(len(encoder.blocks)))
    added = []
    for index, block in enumerate(encoder.blocks):
        mask = in_frame if index in full else in_window
        normed = block.norm1(states)
        query, key, value = (
            part.unflatten(1, (-1, size)) for part in block.attn.qkv(normed).chunk(3, dim=1)
        )
        query, key = (
            part * angles.cos() + _half_turned(part) * angles.sin() for part in (query, key)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num()
        attended = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        states = states + block.attn.proj(attended)
        states = states + block.mlp(block.norm2(states))
        if index in getattr(encoder, "deepstack_visual_indexes", ()):
            added.append(encoder.deepstack_merger_list[len(added)](states))
    return [encoder.merger(states), *added]


def _stretched(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A square table `(side ** 2, width)` of learned positions as `(height, width, width)`."""
    side = round(len(table) ** 0.5)
    square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    stretched = F.interpolate(square, size, mode="bilinear", align_corners=True)
    return stretched[0].permute(1, 2, 0)


def _half_turned(states: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
