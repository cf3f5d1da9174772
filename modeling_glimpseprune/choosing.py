"""Which visual tokens of a prompt stay: scores from attention, and a selection by them."""

import torch

from .glimpse_record import GlimpseRecord
from .prune_request import PruneRequest
from .selection import corner_tokens, select_visual_tokens
from .token_block import TokenBlock
from .visual_tokens import VisualTokens

SCORED_AT_ONCE = 2**14  # visual tokens, what bounds the predictor's memory in a batch


def choose(
    request: PruneRequest, block: TokenBlock, attention: dict[int, torch.Tensor]
) -> GlimpseRecord:
    """Choose, by the caller's mask or by scores, and write down what was chosen.

    Args:
        request: what to do with the visual tokens.
        block: the prompt they stand in.
        attention: `(N, heads)` of each layer that was read, for the N tokens of the request.
    """
    importance = None
    tokens = request.tokens.whole or request.tokens  # as the caller knows them
    if request.visual_keep_mask is not None:
        keep = request.visual_keep_mask.to(tokens.rows.device)
    elif request.visual_log_keep is not None:
        keep = torch.ones_like(tokens.rows, dtype=torch.bool)
    else:
        layers = request.glimpse.attention_layers
        importance = _score(request, torch.cat([attention[index] for index in layers], dim=-1))
        if request.tokens.places is not None:
            of_all = importance.new_full((tokens.total,), float("-inf"))
            importance = of_all.index_put((request.tokens.places,), importance)
        keep = _select(request, block, importance.detach(), tokens)
    if tokens.encoded is not None:
        keep = keep & tokens.encoded
    return GlimpseRecord(
        importance,
        keep,
        tokens.rows,
        tokens.geometry,
        tokens.kinds,
        tokens.sizes,
        tokens.item_rows,
        tokens.grids,
        request.glimpse_layer,
        request.prune_layer,
        tokens.encoded,
    )


def _score(request: PruneRequest, attention: torch.Tensor) -> torch.Tensor:
    """Importance `(N,)` from attention `(N, columns)`; of many tokens some items at a time."""
    tokens = request.tokens
    parts = [tokens]
    if tokens.total > SCORED_AT_ONCE and not torch.is_grad_enabled():
        parts = tokens.parts(SCORED_AT_ONCE)
    seen, scores = 0, []
    for part in parts:
        of_part = attention[seen : seen + part.total]
        conditions = [part.of_each(layer) for layer in part.features]
        groups = part.groups(request.predictor_window)
        scores.append(request.glimpse(of_part, conditions, part.geometry[:, 1:3], groups))
        seen += part.total
    return torch.cat(scores).to(attention.device)


def _select(
    request: PruneRequest, block: TokenBlock, importance: torch.Tensor, tokens: VisualTokens
) -> torch.Tensor:
    """`(N,)` bool, True at tokens that stay."""
    keep = select_visual_tokens(
        importance,
        tokens.rows,
        len(block.hidden_states),
        request.prune_threshold,
        request.max_keep_ratio,
        request.min_keep_tokens,
    )
    keep |= corner_tokens(tokens.geometry, request.anchor_corners)
    # The answer's first logits are read at the last prompt token, so it stays.
    last_column = (block.prompt_length if block.order is None else block.length) - 1
    return keep | (tokens.columns == last_column)
