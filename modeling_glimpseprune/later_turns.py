"""A later turn over a kept cache: which visuals are new, and where its tokens stand."""

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from .pruned_cache import PrunedLayer, pruned_layer
from .stock import tokens_behind


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


def note_placeholders(cache: Cache | None, placeholders: torch.Tensor | None) -> None:
    """Put on a cache where its prompt's placeholders stand.

    Args:
        cache: that was empty before the prompt.
        placeholders: `(batch, length)` bool, or None where nobody can tell.
    """
    if cache is not None:
        cache.placeholders = placeholders


def check_placeholders(cache: Cache, placeholders: torch.Tensor) -> None:
    """Refuse ids of another prompt than the one that a cache holds; note those that fit.

    What a cache's rows hold is compared with any row: they may have been repeated, reordered or
    selected since.

    Args:
        cache: that holds tokens.
        placeholders: `(batch, length)` bool, of the ids of a whole conversation.

    Raises:
        ValueError: when placeholders stand at other columns than those of the cache's prompt.
    """
    held = getattr(cache, "placeholders", None)
    if held is None:
        return
    length = min(past_length(cache), held.shape[1])
    found = pad(placeholders[:, :length], (0, max(0, length - placeholders.shape[1])))
    same = (found[:, None] == held[:, :length].to(found.device)).all(-1).any(-1)
    if not bool(same.all()):
        raise ValueError(
            "the cache holds another prompt: images or videos of the ids given stand at other "
            f"columns than those of its prompt, in row(s) {(~same).nonzero()[:, 0].tolist()}; give "
            "the ids of the conversation that it holds, or start without the cache"
        )
    cache.placeholders = placeholders


def later_positions(
    layer: PrunedLayer, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Rotary positions `(batch, new tokens)` of tokens after a pruned prompt, from its cache.

    Padding behind the prompt takes no position. Families that keep what they need for it on the
    module, as Qwen2.5-VL its `rope_deltas`, would let generations disturb each other.

    Args:
        layer: the cache's first layer.
        inputs_embeds: `(batch, new tokens, hidden)`.
        attention_mask: `(batch, past and new tokens)`, or None for all ones.
    """
    past, device = layer.get_seq_length(), inputs_embeds.device
    steps = torch.arange(past, past + inputs_embeds.shape[1], device=device)
    if attention_mask is not None and attention_mask.ndim == 2:
        prompt_end = layer.prompt_slots + layer.dropped
        behind = attention_mask[:, prompt_end:].to(device).long().cumsum(1)
        steps = prompt_end - 1 + behind[:, -inputs_embeds.shape[1] :]
    return layer.position_delta.to(device) + steps


def note_turn(cache: Cache, positions: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Put on a cache how far positions are ahead of tokens behind a later turn with visuals.

    The stock model keeps one such number on the module, that of the first visuals it met.

    Args:
        cache: that holds what came before the turn, nothing pruned.
        positions: `(axes, batch, new tokens)` of the turn.
        attention_mask: `(batch, past and new tokens)`, or None for all ones.
    """
    length = past_length(cache) + positions.shape[-1]
    tokens = length if attention_mask is None else attention_mask[:, :length].sum(1, keepdim=True)
    cache.rope_deltas = positions.amax(dim=(0, 2))[:, None] + 1 - tokens_behind(length, tokens)
    cache.follows_turn = True


def follows_turn(cache: Cache | None) -> bool:
    """Whether a cache holds a later turn with visuals that was noted."""
    return getattr(cache, "follows_turn", False)


def positions_after_turn(
    cache: Cache, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Rotary positions `(batch, new tokens)` behind a turn that was noted; None for other caches.

    Args:
        inputs_embeds: `(batch, new tokens, hidden)`.
        attention_mask: `(batch, past and new tokens)`, or None for all ones.
    """
    if not follows_turn(cache):
        return None
    batch, new = inputs_embeds.shape[:2]
    past = past_length(cache)
    places = torch.arange(past, past + new, device=inputs_embeds.device).expand(batch, -1)
    real = places
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask.long().cumsum(1)[:, past : past + new] - 1
    deltas = cache.rope_deltas.to(inputs_embeds.device)
    return tokens_behind(places, real) + deltas.repeat_interleave(batch // len(deltas), dim=0)


def first_positions(cache: Cache, attention_mask: torch.Tensor | None) -> torch.Tensor | int:
    """Rotary position of the first token behind a cache, `(batch, 1)` or one for all rows.

    A pruned cache carries its own. One with visuals that were not pruned carries `rope_deltas`.

    Args:
        attention_mask: `(batch, past and new tokens)`.
    """
    past, layer = past_length(cache), pruned_layer(cache)
    if layer is not None:
        prompt_end = layer.prompt_slots + layer.dropped
        if attention_mask is None:
            return past + layer.position_delta
        behind = attention_mask[:, prompt_end:past].sum(1, keepdim=True)
        return prompt_end + behind + layer.position_delta
    tokens = past if attention_mask is None else attention_mask[:, :past].sum(1, keepdim=True)
    rope_deltas = getattr(cache, "rope_deltas", None)
    if rope_deltas is None:
        return tokens
    return tokens_behind(past, tokens) + rope_deltas


def prompt_positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Rotary positions `(batch, length)` as `generate` counts them, or None without a 2-D mask.

    Scores of a padded prompt are the same then whether `generate` takes the glimpse or not.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
