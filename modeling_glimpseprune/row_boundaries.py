"""Rows of a batch whose prompts end at different columns.

Training data are often padded on the right as a whole, prompt and completion together. A prefill
wants one boundary: prompts that end, and completions that begin, at one column. `AlignedRows` moves
each row to the right until that is so, and moves what comes back to where the caller's tokens are.
"""

import torch

IGNORED_LABEL = -100


class AlignedRows:
    """Moves rows so that their prompts end together.

    Args:
        boundaries: `(batch,)` tokens of each row before its completion, padding counted. What pads
            a row without a completion on its right belongs to neither.
        length: tokens of the batch as it came.
        attention_mask: `(batch, length)`, or None for all ones.

    Raises:
        ValueError: unless the mask has two axes, and each boundary lies in 1..length.
    """

    def __init__(
        self, boundaries: torch.Tensor, length: int, attention_mask: torch.Tensor | None
    ) -> None:
        if attention_mask is not None and attention_mask.shape != (len(boundaries), length):
            raise ValueError(
                "prompts that end at different columns need an attention mask of shape "
                f"{(len(boundaries), length)}, got {tuple(attention_mask.shape)}"
            )
        if boundaries.min() < 1 or boundaries.max() > length:
            raise ValueError(f"prompt_length must lie in 1..{length}, got {boundaries.tolist()}")
        if attention_mask is not None:
            ends = length - attention_mask.flip(1).to(torch.uint8).argmax(1)
            boundaries = boundaries.minimum(ends.to(boundaries))
        self.prompt_length = int(boundaries.max())
        self.shift = self.prompt_length - boundaries  # each row moves so far to the right
        width = length + int(self.shift.max())
        source = torch.arange(width, device=boundaries.device) - self.shift[:, None]
        self.real = (source >= 0) & (source < length)
        self.source = source.clamp(0, length - 1)
        self.target = torch.arange(length, device=boundaries.device) + self.shift[:, None]
        mask = self.real
        if attention_mask is not None:
            mask = self.move(attention_mask.to(boundaries.device)).bool() & self.real
        self.attention_mask = mask.long()

    def move(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, length, ...)` to `(batch, moved length, ...)`, padding where no token comes."""
        return _gather(tokens, self.source)

    def move_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`(..., batch, length)` to `(..., batch, moved length)`."""
        index = self.source.to(position_ids.device).expand(*position_ids.shape[:-2], -1, -1)
        return position_ids.expand(*position_ids.shape[:-2], len(self.source), -1).gather(-1, index)

    def move_back(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch, moved length, ...)` to `(batch, length, ...)`."""
        return _gather(states, self.target)


def first_labelled(labels: torch.Tensor) -> int | torch.Tensor:
    """Where completions begin, by the labels.

    Args:
        labels: `(batch, length)`, -100 where there is none.

    Returns:
        One number for all rows, or `(batch,)` one each; a row without labels is all prompt.

    Raises:
        ValueError: when a row is labelled from its first token on.
    """
    labelled = labels != IGNORED_LABEL
    has_any = labelled.any(dim=1)
    first = labelled.to(torch.uint8).argmax(dim=1)
    if (first[has_any] == 0).any():
        rows = ((first == 0) & has_any).nonzero()[:, 0].tolist()
        raise ValueError(
            f"labels begin at the first token of row(s) {rows}: label the answer only (-100 over "
            "the prompt), as its visual tokens are chosen by the prompt alone; or use prune=False"
        )
    if bool((has_any & (first == first[0])).all()):
        return int(first[0])
    return torch.where(has_any, first, labels.shape[1])


def _gather(tokens: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    index = columns.to(tokens.device).view(*columns.shape, *[1] * (tokens.ndim - 2))
    return tokens.take_along_dim(index, dim=1)
