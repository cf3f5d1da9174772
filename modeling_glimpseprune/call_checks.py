"""What a call of a backbone or a text model may not ask, said before anything is computed."""

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from .encode_choice import NONE_BEHIND
from .glimpse_prefix import GlimpsePrefix, check_made_by
from .later_turns import past_length
from .prune_request import PruneRequest
from .pruning_arguments import PruningArguments

SOFT_ATTENTIONS = ("eager", "sdpa")


def check_form(
    input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None, takes_both: bool
) -> None:
    """Refuse no tokens at all; and both forms of them, where ids say nothing more.

    Args:
        takes_both: whether the stock backbone reads ids beside embeddings.

    Raises:
        ValueError: as said.
    """
    both = input_ids is not None and inputs_embeds is not None
    if (input_ids is None and inputs_embeds is None) or (both and not takes_both):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")


def check_over_prefix(
    prefix: GlimpsePrefix, model: nn.Module, inputs_embeds: torch.Tensor, inputs: dict
) -> None:
    """Check a call that goes on with a prefix.

    Args:
        model: the backbone.
        inputs_embeds: `(batch, length, hidden)`, of the tokens behind the prefix.
        inputs: the call's other arguments.

    Raises:
        ValueError: when the prefix was made by other weights, no cache is wanted, or the tokens
            are not those behind it.
    """
    if inputs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False cannot be combined with a prefix, which is a cache: leave one out"
        )
    length, mask = past_length(prefix) + inputs_embeds.shape[1], inputs.get("attention_mask")
    if mask is not None and mask.shape[-1] != length:
        raise ValueError(
            f"over a prefix of {past_length(prefix)} tokens forward takes the ids behind it, "
            f"and a mask of both ({length} columns here), as over any cache; got a mask of "
            f"{mask.shape[-1]} columns. generate and glimpse take whole prompts"
        )
    check_made_by(prefix, model)


def check_whole(cache: Cache | None) -> None:
    """Refuse `prune=False` over visuals that were encoded in part, which the stock model never is.

    Args:
        cache: a prefix, or the cache of an earlier turn.

    Raises:
        ValueError: as said.
    """
    layers = getattr(cache, "layers", None)
    lacks = getattr(layers[0], "lacks_patches", None) if layers else None
    if lacks is not None and bool(lacks.any()):
        held, remedy = "this cache", "start again without the cache"
        if isinstance(cache, GlimpsePrefix):
            held, remedy = "this prefix", "look again with redundant_patches=False, at every turn"
        raise ValueError(
            f"{held} lacks the patches that redundant_patches or visual_encode_mask left out in "
            f"front of the vision encoder, and prune=False answers from all: {remedy}"
        )


def check_brings_none(asks_for_part: bool, placeholders: torch.Tensor | None) -> None:
    """Refuse tokens over a prefix that speak of visuals, where none were given.

    Args:
        asks_for_part: whether the call says what to encode of visuals.
        placeholders: `(batch, length)` bool, or None where the tokens came without ids.

    Raises:
        ValueError: for either.
    """
    if placeholders is not None and bool(placeholders.any()):
        raise ValueError(
            "the tokens behind the prefix hold placeholders, but no image or video was given "
            "for them: forward takes new tokens alone, generate and glimpse whole prompts"
        )
    if asks_for_part:
        raise ValueError(NONE_BEHIND)


def check_boundary(model: nn.Module, arguments: PruningArguments) -> None:
    """Refuse to train on answers that would take part in choosing the visual tokens.

    Raises:
        ValueError: as said.
    """
    trains = model.training and torch.is_grad_enabled()
    goes_on = not (arguments.only_glimpse or arguments.hold)
    if trains and arguments.prompt_length is None and goes_on:
        raise ValueError(
            "in training a model must be told where the answer begins, as visual tokens are "
            "chosen by the prompt alone: give prompt_length (a number, or one a row), or "
            "labels to the whole model; or train with prune=False"
        )


def check_prunable(
    config: PretrainedConfig,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past: int,
    request: PruneRequest,
) -> None:
    """Check that the text model can prune a prompt that came so.

    Args:
        config: of the text model.
        past: tokens that the cache holds.

    Raises:
        ValueError: for masks that are not 2-D, packed rows, sliding windows, and soft masks under
            an attention that takes none.
    """
    if not (attention_mask is None or is_2d(attention_mask)):
        raise ValueError(
            "pruning takes a 2-D attention mask (batch, length) and a DynamicCache; static "
            "caches come with a mask of their own: use the default cache, or prune=False"
        )
    if attention_mask is None and not past and _is_packed(position_ids):
        raise ValueError(
            "position_ids start again within a row: sequences packed into one row cannot be "
            "pruned, as each would need a glimpse of its own; give one sequence a row, or use "
            "prune=False"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError("sliding-window layers cannot be pruned; use prune=False")
    attention = config._attn_implementation
    if request.visual_log_keep is not None and attention not in SOFT_ATTENTIONS:
        raise ValueError(
            f"visual_log_keep needs attn_implementation {' or '.join(SOFT_ATTENTIONS)}, which "
            f"take a mask of numbers; got {attention}"
        )


def check_covered(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> None:
    """Refuse a mask with fewer columns than tokens.

    Raises:
        ValueError: as said.
    """
    if attention_mask is not None and attention_mask.shape[1] < inputs_embeds.shape[1]:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for "
            f"{inputs_embeds.shape[1]} tokens: it covers every token, those of the cache included"
        )


def is_2d(attention_mask: object) -> bool:
    """Whether it is a mask `(batch, length)`."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def _is_packed(position_ids: torch.Tensor | None) -> bool:
    """Whether text positions, `(batch, length)` or the first of four rows, start again in a row."""
    if position_ids is None or position_ids.ndim == 3 and len(position_ids) != 4:
        return False
    text = position_ids[0] if position_ids.ndim == 3 else position_ids
    return bool((text.diff(dim=-1) < 0).any())
