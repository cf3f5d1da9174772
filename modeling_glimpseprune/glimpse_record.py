"""What a glimpse saw: importance and keep mask of every visual token of a batch."""

from dataclasses import dataclass

import torch


class KeptCounts:
    """What a keep mask amounts to."""

    keep_mask: torch.Tensor

    @property
    def kept(self) -> int:
        return int(self.keep_mask.sum())

    @property
    def total(self) -> int:
        return self.keep_mask.numel()

    @property
    def retention(self) -> float:
        """`kept / total`; 1 where there is nothing to drop."""
        return self.kept / self.total if self.total else 1.0


@dataclass
class VisualRecord(KeptCounts):
    """One image or video of the prompt.

    Attributes:
        kind: `"image"` or `"video"`.
        row: row of the batch it belongs to.
        importance: `(n,)` logits in prompt order, or None when the caller gave the keep mask.
        keep_mask: `(n,)` bool, True where kept.
        grid: its visual tokens as `(frames, height, width)`. A side of 0, and no tokens, has the
            high-resolution view of a LLaVA-NeXT image that is very much longer than wide.
        encoded: `(n,)` bool, False at tokens left out in front of the encoder; None where none was.
    """

    kind: str
    row: int
    importance: torch.Tensor | None
    keep_mask: torch.Tensor
    grid: tuple[int, int, int]
    encoded: torch.Tensor | None = None


@dataclass
class GlimpseRecord(KeptCounts):
    """Scores and masks of all visual tokens of a batch, in prompt order, row after row.

    Only reading `kept`, `retention` or `visuals` waits for the device.

    Attributes:
        importance: `(N,)` logits, or None when the caller gave the keep mask. Differentiable in a
            training forward.
        keep_mask: `(N,)` bool, True where kept.
        rows: `(N,)` row of the batch of each token.
        geometry: `(N, 6)` frame, row and column of each token, then its image's frames, height and
            width, all in tokens.
        kinds: `"image"` or `"video"`, one an item.
        sizes: tokens of each item; a view may have none.
        item_rows: `(items,)` row of the batch of each.
        grids: `(items, 3)` frames, height and width of each, in tokens.
        glimpse_layer: K, where the glimpse's attention was read.
        prune_layer: P, after whose attention the tokens are dropped.
        encoded: `(N,)` bool, False at tokens that were left out in front of the vision encoder,
            whose importance is -inf; None where none was.
    """

    importance: torch.Tensor | None
    keep_mask: torch.Tensor
    rows: torch.Tensor
    geometry: torch.Tensor
    kinds: list[str]
    sizes: list[int]
    item_rows: torch.Tensor
    grids: torch.Tensor
    glimpse_layer: int
    prune_layer: int
    encoded: torch.Tensor | None = None

    def nan_counts(self, num_rows: int) -> torch.Tensor:
        """`(num_rows,)` scores of each row that are no numbers. Does not wait for the device."""
        counts = self.rows.new_zeros(num_rows)
        if self.importance is None:
            return counts
        return counts.index_add_(0, self.rows, self.importance.detach().isnan().to(counts))

    @property
    def visuals(self) -> list[VisualRecord]:
        """The images and videos, one record each, in prompt order."""
        importance = encoded = [None] * len(self.sizes)
        if self.importance is not None:
            importance = self.importance.split(self.sizes)
        if self.encoded is not None:
            encoded = self.encoded.split(self.sizes)
        keep_masks = self.keep_mask.split(self.sizes)
        rows, grids = self.item_rows.tolist(), self.grids.tolist()
        return [
            VisualRecord(
                kind=kind,
                row=rows[i],
                importance=importance[i],
                keep_mask=keep_masks[i],
                grid=tuple(grids[i]),
                encoded=encoded[i],
            )
            for i, kind in enumerate(self.kinds)
        ]


def refuse_nan(nan_counts: list[int]) -> None:
    """Refuse scores that are no numbers, of which nothing can be chosen.

    Infinite ones are numbers: they are above or below every threshold.

    Args:
        nan_counts: of each row of the batch.

    Raises:
        ValueError: naming the rows.
    """
    rows = [row for row, count in enumerate(nan_counts) if count]
    if rows:
        raise ValueError(
            f"the importance scores of row(s) {rows} are no numbers (nan), so nothing can be "
            "pruned: look for nan in the pixel values and in the weights, and for numbers beyond "
            "float16's range (bfloat16 and float32 reach further)"
        )
