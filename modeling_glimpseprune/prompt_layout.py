"""Prompts over a prefix: whether they begin with it, and how they are padded behind it."""

from collections.abc import Sequence

import torch


def behind_prefix(
    begun_ids: torch.LongTensor,
    begun_mask: torch.Tensor,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Pad prompts between the prefix and what is behind it, where padding may stand.

    Args:
        begun_ids, begun_mask: `(batch, prefix)` on the host, ids and bool.
        input_ids: `(batch, length)` whole prompts, padded on the left or behind the prefix.
        attention_mask: `(batch, length)`, or None for all ones.

    Returns:
        `input_ids` and `attention_mask`, `(batch, prefix + longest rest)`.

    Raises:
        ValueError: when a prompt does not begin with the prefix, or is nothing else.
    """
    ids, real = input_ids.cpu(), torch.ones(input_ids.shape, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.cpu().bool()
    begun = zip(begun_ids, begun_mask, strict=True)
    rests = [
        _rest(row, prefix[of_prefix], ids[row][real[row]])
        for row, (prefix, of_prefix) in enumerate(begun)
    ]
    padding = ids[~real][:1].tolist() or [0]
    behind = padded_left(rests, padding[0])
    return {
        "input_ids": torch.cat([begun_ids, behind["input_ids"]], dim=1).to(input_ids.device),
        "attention_mask": torch.cat([begun_mask.long(), behind["attention_mask"]], dim=1).to(
            input_ids.device
        ),
    }


def padded_left(rows: Sequence[torch.Tensor], padding: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(rows, longest)` of rows of ids."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _rest(row: int, prefix: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """What of a prompt's ids stands behind its prefix, neither with padding."""
    common = min(len(prefix), len(prompt))
    same = prefix[:common] == prompt[:common]
    if common < len(prefix) or not same.all():
        place = common if same.all() else int((~same).nonzero()[0])
        raise ValueError(
            f"prompt {row} does not begin with the prefix: they differ from token {place} on, and "
            f"the prefix has {len(prefix)}: look at this prompt, or leave the prefix out"
        )
    if len(prompt) == len(prefix):
        raise ValueError(f"prompt {row} is all prefix: a question has to stand behind it")
    return prompt[len(prefix) :]
