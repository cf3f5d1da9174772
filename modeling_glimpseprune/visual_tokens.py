"""Where a prompt's visual tokens are, and what the vision encoder knows of each."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from .importance_predictor import TokenGroup, WindowedTokenGroup
from .visual_features import ImageView, VisualFeatures


@dataclass
class VisualTokens:
    """The visual tokens of a batch in prompt order, row after row.

    Attributes:
        rows, columns: `(N,)` where each token stands in the `(batch, length)` prompt.
        features: one `(N, width)` tensor a tapped vision layer.
        geometry: `(N, 6)`, see `token_geometry`.
        kinds: `"image"`, `"video"` or the name of a view, one an item.
        sizes: tokens of each item; a view may have none.
        item_rows: `(items,)` row of the batch of each.
        grids: `(items, 3)` frames, height and width of each, in tokens.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    features: list[torch.Tensor]
    geometry: torch.Tensor
    kinds: list[str]
    sizes: list[int]
    item_rows: torch.Tensor
    grids: torch.Tensor

    @property
    def total(self) -> int:
        return len(self.rows)

    def moved_by(self, shift: torch.Tensor) -> "VisualTokens":
        """The same tokens in rows that were moved to the right, each by `(batch,)` columns."""
        return replace(self, columns=self.columns + shift.to(self.columns.device)[self.rows])

    def groups(self, window: int | None) -> list[TokenGroup]:
        """Which tokens attend to one another in the predictor: each frame by itself.

        Args:
            window: side of the attention windows in tokens, or None for whole frames.
        """
        frames = self._frames(need_grids=window is not None)
        groups: list[TokenGroup] = []
        for start, size, height, width in frames:
            last = groups[-1] if groups else None
            if size == 0:
                continue
            if window is not None:
                groups.append(WindowedTokenGroup(start, height, width, window))
            elif last is not None and last.size == size:
                last.count += 1
            else:
                groups.append(TokenGroup(start, size, 1))
        return groups

    def _frames(self, need_grids: bool) -> list[tuple[int, int, int, int]]:
        """`(start, size, height, width)` of each frame; images need no grid, nor a wait for it."""
        frames, start = [], 0
        grids = [(1, 1, size) for size in self.sizes]
        if need_grids or "video" in self.kinds:
            grids = self.grids.tolist()
        for size, (count, height, width) in zip(self.sizes, grids, strict=True):
            per_frame = height * width
            frames += [(start + i * per_frame, per_frame, height, width) for i in range(count)]
            start += size
        return frames


def collect_visual_tokens(
    encoded: dict[str, VisualFeatures], masks: dict[str, torch.Tensor]
) -> VisualTokens:
    """Put the encoded images and videos of a batch into prompt order.

    Args:
        encoded: encoder outputs by kind.
        masks: `(batch, length)` bool by kind, True at the placeholders of that kind.
    """
    images = [
        image
        for kind, features in encoded.items()
        for image in _images(kind, features, masks[kind])
    ]
    if len(encoded) > 1:
        order = torch.stack([image.placeholders[0] for image in images]).argsort().tolist()
        images = [images[i] for i in order]
    views = [(image, view) for image in images for view in image.views]
    positions = torch.cat(
        [image.placeholders[view.places.to(image.placeholders.device)] for image, view in views]
    )
    layers = zip(*(view.taps for _, view in views), strict=True)
    length, device = next(iter(masks.values())).shape[1], positions.device
    return VisualTokens(
        rows=positions // length,
        columns=positions % length,
        features=[torch.cat(layer).to(device) for layer in layers],
        geometry=torch.cat([view.geometry for _, view in views]).to(device),
        kinds=[view.name or image.kind for image, view in views],
        sizes=[len(view.places) for _, view in views],
        item_rows=torch.stack([image.placeholders[0] // length for image, _ in views]),
        grids=torch.stack([view.grid for _, view in views]).to(device),
    )


@dataclass
class _Image:
    kind: str
    placeholders: torch.Tensor  # where they stand in the flattened prompt
    views: list[ImageView]


def _images(kind: str, encoded: VisualFeatures, mask: torch.Tensor) -> list[_Image]:
    lengths = [len(embeddings) for embeddings in encoded.pooler_output]
    first = (~mask.flatten()).to(torch.uint8).argsort(stable=True)  # placeholders first, in order
    ends = list(accumulate(lengths))
    return [
        _Image(kind, first[end - length : end], views)
        for length, end, views in zip(lengths, ends, encoded.glimpse_views, strict=True)
    ]
