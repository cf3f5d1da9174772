"""Visual tokens that the vision encoder never saw: the decoder does not see them either."""

from dataclasses import replace

import torch

from .prune_request import PruneRequest
from .token_block import TokenBlock
from .visual_tokens import VisualTokens

ENDS_UNSEEN = (
    "a prompt ends in a visual token that was left out in front of the vision encoder, where the "
    "answer would start: put text behind the image, or leave redundant_patches out"
)


def leave_out(block: TokenBlock, request: PruneRequest) -> PruneRequest:
    """Take a prompt's unencoded tokens out of its block, before layer 0 and the glimpse.

    The tokens left are packed to the right; all keep the positions that they have in the whole
    prompt. It is the second place where a prefill waits for the device.

    Args:
        block: the prompt, of which a prefix may hold the beginning.
        request: what to do with all of its visual tokens.

    Returns:
        The request with those visual tokens alone that are there, by the slots they are in.

    Raises:
        ValueError: when a prompt ends in a token that was left out.
    """
    tokens, held = request.tokens, request.held
    if tokens.encoded is None:
        return request
    start = 0 if held is None else held.logical_length
    kept = block.valid.clone()
    own = ~tokens.encoded & (tokens.columns >= start)
    kept[tokens.rows[own], tokens.columns[own] - start] = False
    known = torch.cat([kept.sum(1), (kept[:, -1] == block.valid[:, -1]).all().view(1)]).tolist()
    *counts, ends_seen = known
    if not ends_seen:
        raise ValueError(ENDS_UNSEEN)
    slots, length = max(counts), kept.shape[1]
    if slots < length:
        order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - slots :]
        all_real = block.mask is None and min(counts) == slots
        block.take(order, None if all_real else kept.gather(1, order))
        block.prompt_length -= length - slots
    order = block.order
    if held is not None:
        order = held.with_order(order, len(kept), block.prompt_length)
    return replace(request, tokens=_in_slots(tokens.seen_by_encoder(), order, start + length))


def _in_slots(tokens: VisualTokens, order: torch.Tensor | None, length: int) -> VisualTokens:
    """Tokens by slots instead of columns.

    Args:
        order: `(batch, slots)` column of each slot, or None where they are the same.
        length: columns.
    """
    if order is None:
        return tokens
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    of_column = slots.new_zeros(len(order), length).scatter(1, order, slots)
    return replace(tokens, columns=of_column[tokens.rows, tokens.columns])
