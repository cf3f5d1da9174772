"""A prompt with its kept tokens packed together, in hidden states and cache."""

import torch

from .glimpse_record import refuse_nan
from .prune_request import PruneRequest
from .pruned_cache import PrunedLayer
from .token_block import TokenBlock

UNTRAINED = (
    "this checkpoint has no trained glimpse weights, so it cannot tell which visual tokens to "
    "prune: train them (glimpseprune train-stage1), pass visual_keep_mask, or use prune=False"
)


def compact(
    block: TokenBlock,
    layers: list[PrunedLayer],
    request: PruneRequest,
    keep: torch.Tensor,
    nan_counts: torch.Tensor,
) -> None:
    """Pack kept tokens to the right in hidden states, positions, mask and cache layers.

    A slot that pads a row points at a dropped token.

    Args:
        block: the prompt.
        layers: those of the cache that hold it, 0..P.
        request: what to do with the visual tokens.
        keep: `(N,)` bool.
        nan_counts: `(batch,)` scores of each row that are no numbers.

    Raises:
        ValueError: when the mask came from weights that were never trained or from scores that are
            no numbers, or a prompt ends in padding.
    """
    kept = block.valid[:, : block.prompt_length].clone()
    kept[request.tokens.rows, request.tokens.columns] = keep
    counts, all_real, last_visual = kept_counts(block, request, kept, nan_counts)
    slots, length = max(counts), kept.shape[1]
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - slots :]
    past = torch.arange(block.past_slots, device=order.device).expand(len(order), -1)
    index = torch.cat([past, block.past_slots + order], dim=1)
    for layer in layers:
        layer.keep(index)
    block.fixed_slots = block.past_slots + slots - (length - 1 - last_visual)
    block.take(order, None if all_real and min(counts) == slots else kept.gather(1, order))


def kept_counts(
    block: TokenBlock, request: PruneRequest, kept: torch.Tensor, nan_counts: torch.Tensor
) -> tuple[list[int], bool, int]:
    """Kept tokens of each row, whether there is no padding, the last visual token's column.

    It is the one place where the prefill of a single prompt waits for the device.

    Args:
        block, request, nan_counts: see `compact`, which raises what is raised here.
        kept: `(batch, prompt)` bool.
    """
    trained = request.glimpse.trained.to(kept.device).view(1)
    all_real = ends_real = trained.new_ones(1)
    if block.mask is not None:
        all_real = block.mask.all().view(1)
        ends_real = block.valid[:, block.prompt_length - 1].all().view(1)
    last_visual = request.tokens.columns.max().view(1).to(kept.device)
    nan_counts = nan_counts.to(kept.device)
    known = torch.cat([kept.sum(1), nan_counts, trained, all_real, ends_real, last_visual])
    *counts, trained, all_real, ends_real, last_visual = known.tolist()
    counts, nan_counts = counts[: len(kept)], counts[len(kept) :]
    if not trained and request.takes_glimpse:
        raise ValueError(UNTRAINED)
    refuse_nan(nan_counts)
    if not ends_real:
        raise ValueError(
            "a prompt ends in padding, where the answer would start: pad on the left "
            '(processor.tokenizer.padding_side = "left"), or use prune=False'
        )
    return counts, bool(all_real), last_visual


def seal(block: TokenBlock, layers: list[PrunedLayer]) -> None:
    """Tell every cache layer what was dropped, after which it takes tokens behind the prompt.

    Args:
        block: the prompt, packed.
        layers: all of the cache.
    """
    slots = block.past_slots + block.order.shape[1]
    dropped = block.length - block.order.shape[1]
    delta = block.next_position - (slots + block.past_dropped + dropped)
    new_columns = block.past_slots + block.past_dropped + block.order
    for layer in layers:
        layer.dropped = block.past_dropped + dropped
        layer.prompt_slots = slots
        layer.fixed_slots = block.fixed_slots
        layer.prompt_mask = block.mask
        layer.position_delta = delta[:, None]
        layer.seal()
    past_columns = block.past_columns.expand(len(new_columns), -1)
    layers[0].prompt_columns = torch.cat([past_columns, new_columns], dim=1)
