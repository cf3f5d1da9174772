"""Some tokens of images through Qwen's stock vision encoders, at the places of the whole."""

from dataclasses import dataclass

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

SUBSET = "glimpse_subset"  # attribute of a grid, where the encoder derives the rest from the grid


@dataclass
class EncoderSubset:
    """What the encoder has to know of some of the tokens of its images.

    Attributes:
        patches: `(M * merge ** 2,)` rows of the pixel tensor.
        position_ids: `(M * merge ** 2, 2)` row and column of each patch in its image.
        grid: `(frames, 3)` a grid that stands for as many patches as are kept of each frame.
        whole: `(images, 3)` the images' own grid in patches.
        window_index: `(M,)` token, counted among those kept, at each place of the sequence, or None
            where the encoder has no windows and leaves tokens where they are.
        cu_window_seqlens: `(windows + 1,)` int32 boundaries of attention windows, in patches.
    """

    patches: torch.Tensor
    position_ids: torch.Tensor
    grid: torch.Tensor
    whole: torch.Tensor
    window_index: torch.Tensor | None = None
    cu_window_seqlens: torch.Tensor | None = None

    @classmethod
    def of_tokens(
        cls,
        keep: torch.Tensor,
        geometry: torch.Tensor,
        images: torch.Tensor,
        whole: torch.Tensor,
        merge: int,
    ) -> "EncoderSubset":
        """Of an encoder without windows.

        Args:
            keep: `(N,)` bool, at least one token a frame.
            geometry: `(N, 6)`, see `token_geometry`.
            images: `(N,)` number of each token's image.
            whole: `(images, 3)` grid in patches.
            merge: patches of a token on a side.
        """
        kept, unit = keep.nonzero()[:, 0], merge**2
        within = torch.arange(unit, device=keep.device)
        patches = (kept[:, None] * unit + within).flatten()
        rows = geometry[kept, 1, None] * merge + within // merge
        columns = geometry[kept, 2, None] * merge + within % merge
        frames = torch.stack([images[kept], geometry[kept, 0]], dim=1)
        _, of_frame = frames.unique_consecutive(dim=0, return_counts=True)
        ones = torch.ones_like(of_frame)
        return cls(
            patches,
            torch.stack([rows.flatten(), columns.flatten()], dim=1),
            torch.stack([ones, of_frame * unit, ones], dim=1),
            whole,
        )

    def into_windows(self, keep: torch.Tensor, windows: torch.Tensor) -> None:
        """Say how an encoder that attends within windows orders the tokens.

        Args:
            keep: `(N,)` bool.
            windows: `(N,)` number of each token's window, ascending in the encoder's order.
        """
        order = windows.argsort(stable=True)
        in_order = order[keep[order]]
        rank = keep.cumsum(0) - 1
        _, of_window = windows[in_order].unique_consecutive(return_counts=True)
        unit = len(self.patches) // len(in_order)
        cu_windows = torch.nn.functional.pad((of_window * unit).cumsum(0), (1, 0))
        self.window_index, self.cu_window_seqlens = rank[in_order], cu_windows.to(torch.int32)

    def grid_for(self, told: dict) -> torch.Tensor:
        """The grid that the encoder is given.

        Args:
            told: its arguments that say where the tokens are; where there are none, the grid says.
        """
        grid = self.grid.clone()
        if not told:
            setattr(grid, SUBSET, self)
        return grid


class SubsetVisionEncoder(Qwen2_5_VisionTransformerPretrainedModel):
    """The stock encoder; on releases that derive places from the grid alone it reads them there."""

    def rot_pos_emb(self, grid_thw: torch.Tensor) -> torch.Tensor:
        """`(patches, half the head's width)` angles, as in the stock encoder."""
        subset = subset_of(grid_thw)
        if subset is None:
            return super().rot_pos_emb(grid_thw)
        return super().rot_pos_emb(subset.whole)[subset.patches]

    def get_window_index(self, grid_thw: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The encoder's order of tokens, and the boundaries of its windows in patches."""
        subset = subset_of(grid_thw)
        if subset is None:
            return super().get_window_index(grid_thw)
        return subset.window_index, subset.cu_window_seqlens.tolist()


def subset_of(grid: torch.Tensor) -> EncoderSubset | None:
    """What a grid stands for; None for a real one, which is two patches wide at least.

    Raises:
        RuntimeError: when a grid that stands for a subset lost what it stands for on the way.
    """
    subset = getattr(grid, SUBSET, None)
    if subset is None and bool((grid[:, 2] == 1).any()):
        raise RuntimeError(
            "the vision encoder was given a copy of the grid that stands for a part of an image, "
            "as device hooks make them on this release of transformers: leave redundant_patches out"
        )
    return subset


def at_places(part: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """`(count, width)`: rows of a part at their places, zeros elsewhere."""
    return part.new_zeros(count, part.shape[1]).index_copy(0, places, part)
