"""The rules that decide which visual tokens are kept."""

import torch


def select_visual_tokens(
    importance: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    prune_threshold: float,
    max_keep_ratio: float | None,
    min_keep_tokens: int,
) -> torch.Tensor:
    """Keep tokens above the threshold, within bounds that hold for each prompt.

    The rule looks at one prompt (row of the batch) at a time, over all its images together, and in
    this order: tokens whose probability `sigmoid(importance)` exceeds the threshold are kept; if
    that is more than `max_keep_ratio` of the row's n tokens, the `int(max_keep_ratio * n)` most
    important ones are kept instead; if fewer than `min_keep_tokens` are left, the `min_keep_tokens`
    most important ones (all of them, if n is smaller). Among equally important tokens the earlier
    one ranks first. A row without visual tokens keeps none. Nothing here waits for the device.

    Args:
        importance: `(N,)` logits of the batch's visual tokens in prompt order.
        rows: `(N,)` ascending row of each token.
        num_rows: rows in the batch.
        prune_threshold: in [0, 1].
        max_keep_ratio: in (0, 1], or None for no upper bound.
        min_keep_tokens: 0 or more.

    Returns:
        `(N,)` bool, True where kept.
    """
    keep = importance.sigmoid() > prune_threshold
    rank = _rank_in_row(importance, rows, num_rows)
    if max_keep_ratio is not None:
        allowed = _count(torch.ones_like(keep), rows, num_rows).double() * max_keep_ratio
        exceeds = _count(keep, rows, num_rows) > allowed
        keep = torch.where(exceeds[rows], rank < allowed.long()[rows], keep)
    too_few = _count(keep, rows, num_rows) < min_keep_tokens
    return torch.where(too_few[rows], rank < min_keep_tokens, keep)


def corner_tokens(geometry: torch.Tensor, corners: list[str]) -> torch.Tensor:
    """`(N,)` bool, True at the named corners of each frame."""
    _, row, column, _, height, width = geometry.unbind(1)
    found = torch.zeros_like(row, dtype=torch.bool)
    for corner in corners:
        vertical, horizontal = corner.split("_")
        at_row = row == (0 if vertical == "top" else height - 1)
        at_column = column == (0 if horizontal == "left" else width - 1)
        found |= at_row & at_column
    return found


def _count(selected: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    counts = torch.zeros(num_rows, dtype=torch.long, device=rows.device)
    return counts.index_add_(0, rows, selected.long())


def _rank_in_row(importance: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """0 for the most important token of its row, 1 for the next, and so on: `(N,)`."""
    by_importance = importance.argsort(descending=True, stable=True)
    order = by_importance[rows[by_importance].argsort(stable=True)]
    sizes = _count(torch.ones_like(rows), rows, num_rows)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(rows)
    rank[order] = torch.arange(len(rows), device=rows.device) - starts[rows[order]]
    return rank
