"""A later turn over a kept cache: which visuals are new, and where its tokens stand."""

import torch
from transformers.cache_utils import Cache

from .pruned_cache import pruned_layer
from .pruned_forward import TRANSFORMERS_5


def past_length(cache: Cache | None) -> int:
    """Tokens that a cache holds, pruned ones counted."""
    return cache.get_seq_length() if isinstance(cache, Cache) else 0


def new_visuals(
    input_ids: torch.LongTensor, token_id: int, past: int, sizes: list[int]
) -> list[bool]:
    """Which images (or videos) stand behind what the cache holds.

    Callers may give the visuals of the whole conversation, or those of the new turn only.

    Args:
        input_ids: `(batch, length)`, the whole conversation.
        token_id: of the placeholders.
        past: tokens that the cache holds, the first ones of `input_ids`.
        sizes: placeholders of each visual that was given, in prompt order.

    Raises:
        ValueError: when they are neither all of the conversation's nor those of the new turn.
    """
    columns = (input_ids == token_id).nonzero()[:, 1]
    is_new = columns >= past
    if sum(sizes) == int(is_new.sum()):
        return [True] * len(sizes)
    if sum(sizes) != len(columns):
        raise ValueError(
            f"the prompts have {len(columns)} placeholders of token {token_id}, "
            f"{int(is_new.sum())} of them behind the cached tokens, but the images or videos given "
            f"fill {sum(sizes)}"
        )
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    return is_new[starts.to(is_new.device)].tolist()


def first_positions(cache: Cache, attention_mask: torch.Tensor | None) -> torch.Tensor | int:
    """Rotary position of the first token behind a cache, `(batch, 1)` or one for all rows.

    A pruned cache carries its own. One with visuals that were not pruned carries `rope_deltas`,
    which transformers 5 counts from a row's tokens and transformers 4 from its padded length.

    Args:
        attention_mask: `(batch, past and new tokens)`.
    """
    past, layer = past_length(cache), pruned_layer(cache)
    if layer is not None:
        return past + layer.position_delta
    tokens = past if attention_mask is None else attention_mask[:, :past].sum(1, keepdim=True)
    rope_deltas = getattr(cache, "rope_deltas", None)
    if rope_deltas is None:
        return tokens
    return (tokens if TRANSFORMERS_5 else past) + rope_deltas
