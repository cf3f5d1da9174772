"""Some tokens of images through Qwen2.5-VL's stock vision encoder, at the places of the whole."""

from dataclasses import dataclass

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from .stock import subset_arguments

SUBSET = "glimpse_subset"  # attribute of a grid, where the encoder derives the rest from the grid


@dataclass
class EncoderSubset:
    """What the encoder has to know of some of the tokens of its images.

    Args (of `of_tokens`):
        keep: `(N,)` bool, at least one token a frame.
        geometry: `(N, 6)`, see `token_geometry`.
        windows: `(N,)` number of each token's attention window, ascending in the encoder's order.
        merge: patches of a token on a side.

    Attributes:
        patches: `(M * merge ** 2,)` rows of the pixel tensor.
        position_ids: `(M * merge ** 2, 2)` row and column of each patch in its image.
        window_index: `(M,)` token, counted among those kept, at each place of the sequence.
        cu_window_seqlens: `(windows + 1,)` int32 boundaries of attention windows, in patches.
        grid: `(frames, 3)` a grid that stands for as many patches as are kept of each frame.
    """

    patches: torch.Tensor
    position_ids: torch.Tensor
    window_index: torch.Tensor
    cu_window_seqlens: torch.Tensor
    grid: torch.Tensor

    @classmethod
    def of_tokens(
        cls,
        keep: torch.Tensor,
        geometry: torch.Tensor,
        images: torch.Tensor,
        windows: torch.Tensor,
        merge: int,
    ) -> "EncoderSubset":
        """`images`: `(N,)` number of each token's image; see the class for the others."""
        kept, unit = keep.nonzero()[:, 0], merge**2
        within = torch.arange(unit, device=keep.device)
        patches = (kept[:, None] * unit + within).flatten()
        rows = geometry[kept, 1, None] * merge + within // merge
        columns = geometry[kept, 2, None] * merge + within % merge
        order = windows.argsort(stable=True)
        in_order = order[keep[order]]
        rank = keep.cumsum(0) - 1
        _, of_window = windows[in_order].unique_consecutive(return_counts=True)
        cu_windows = torch.nn.functional.pad((of_window * unit).cumsum(0), (1, 0))
        frames = torch.stack([images[kept], geometry[kept, 0]], dim=1)
        _, of_frame = frames.unique_consecutive(dim=0, return_counts=True)
        ones = torch.ones_like(of_frame)
        return cls(
            patches,
            torch.stack([rows.flatten(), columns.flatten()], dim=1),
            rank[in_order],
            cu_windows.to(torch.int32),
            torch.stack([ones, of_frame * unit, ones], dim=1),
        )

    def arguments(self, kind: str) -> dict:
        """Those of `get_image_features` (or of videos) beside the pixels."""
        names = {
            "position_ids": self.position_ids,
            "window_index": self.window_index,
            "cu_window_seqlens": self.cu_window_seqlens,
        }
        arguments = subset_arguments(kind, names)
        grid = self.grid.clone()
        if not arguments:
            setattr(grid, SUBSET, self)
        return arguments | {f"{kind}_grid_thw": grid}


class SubsetVisionEncoder(Qwen2_5_VisionTransformerPretrainedModel):
    """The stock encoder; on releases that derive places from the grid alone it reads them there."""

    def rot_pos_emb(self, grid_thw: torch.Tensor) -> torch.Tensor:
        """`(patches, half the head's width)` angles, as in the stock encoder."""
        subset = _subset_of(grid_thw)
        if subset is None:
            return super().rot_pos_emb(grid_thw)
        angles = self.rotary_pos_emb(int(subset.position_ids.max()) + 1)
        return angles[subset.position_ids.to(angles.device)].flatten(1)

    def get_window_index(self, grid_thw: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The encoder's order of tokens, and the boundaries of its windows in patches."""
        subset = _subset_of(grid_thw)
        if subset is None:
            return super().get_window_index(grid_thw)
        return subset.window_index, subset.cu_window_seqlens.tolist()


def _subset_of(grid: torch.Tensor) -> EncoderSubset | None:
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
