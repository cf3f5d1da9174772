"""Keep decisions as actions of reinforcement learning: masks drawn at random, and how likely.

A visual token is kept with the probability `sigmoid(importance - logit(prune_threshold))`, each by
itself, so what the model chooses when asked is what is more likely than not.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from modeling_glimpseprune.glimpse_record import GlimpseRecord
from modeling_glimpseprune.selection import corner_tokens, select_visual_tokens
from modeling_glimpseprune.stock import cache_of

from .rollout import SharedPrompts
from .soft_mask import logistic_noise


def check_threshold(config: PretrainedConfig) -> None:
    """Raise a ValueError where no probability says what the model chooses."""
    if not 0 < config.prune_threshold < 1:
        raise ValueError(
            f"masks are drawn around prune_threshold, which must lie between 0 and 1 for it, got "
            f"{config.prune_threshold}"
        )


def glimpse_at(model: nn.Module, prompts: SharedPrompts, chosen: list[int]) -> GlimpseRecord:
    """What a glimpse sees of some prompts; with gradients where they are switched on.

    Args:
        model: a GlimpsePrune model, or a wrapper of it.
        prompts: of whose masks nothing is used.
        chosen: which of them.
    """
    inputs = replace(prompts, keep_masks=None).forward_inputs(chosen)
    outputs = model(**inputs, only_glimpse=True, use_cache=True, logits_to_keep=1)
    return cache_of(outputs).glimpse


def share_masks(rows: list[int], masks_per_prompt: int | None) -> tuple[list[int], list[int]]:
    """Deal the completions of each prompt out to so many masks, in equal runs.

    Args:
        rows: the prompt of each completion.
        masks_per_prompt: at most so many; None: one a completion.

    Returns:
        The prompt of each mask, and the mask of each completion.
    """
    sizes, seen = Counter(rows), Counter()
    numbers: dict[tuple[int, int], int] = {}
    dealt = []
    for prompt in rows:
        masks = min(masks_per_prompt or sizes[prompt], sizes[prompt])
        own = (prompt, seen[prompt] * masks // sizes[prompt])
        dealt.append(numbers.setdefault(own, len(numbers)))
        seen[prompt] += 1
    return [prompt for prompt, _ in numbers], dealt


@torch.no_grad()
def draw_masks(
    record: GlimpseRecord, config: PretrainedConfig, sizes: Sequence[int], copies: Sequence[int]
) -> torch.Tensor:
    """Keep masks from PyTorch's random state.

    Standard logistic noise on the importance makes the model's own rule, bounds included, a draw.

    Args:
        record: of U prompts.
        config: of the model.
        sizes: visual tokens of each prompt.
        copies: the prompt of each of the masks.

    Returns:
        The masks one after the other.
    """
    importance = _of_copies(record.importance, sizes, copies)
    counts = torch.tensor([sizes[prompt] for prompt in copies], device=importance.device)
    rows = torch.arange(len(copies), device=importance.device).repeat_interleave(counts)
    keep = select_visual_tokens(
        importance.float() + logistic_noise(importance),
        rows,
        len(copies),
        config.prune_threshold,
        config.max_keep_ratio,
        config.min_keep_tokens,
    )
    keep |= corner_tokens(_of_copies(record.geometry, sizes, copies), config.anchor_corners)
    return keep & (importance > -math.inf)  # what was not encoded cannot be kept


def mask_log_probs(
    record: GlimpseRecord,
    config: PretrainedConfig,
    sizes: Sequence[int],
    copies: Sequence[int],
    masks: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Log-probability of each mask, averaged over its visual tokens.

    Bounds on how many tokens are kept are left out of account, and tokens that are always kept, or
    were not encoded.

    Args:
        record, config, sizes, copies: as for `draw_masks`.
        masks: bool tensors.

    Returns:
        One float32 number a mask, differentiable.
    """
    threshold = config.prune_threshold
    logits = record.importance.float() - math.log(threshold / (1 - threshold))
    free = ~corner_tokens(record.geometry, config.anchor_corners)
    if record.encoded is not None:
        free, logits = free & record.encoded, logits.masked_fill(~record.encoded, 0.0)
    logits, free = _of_copies(logits, sizes, copies), _of_copies(free, sizes, copies)
    taken = torch.cat(list(masks)).to(logits)
    log_probs = -F.binary_cross_entropy_with_logits(logits, taken, reduction="none") * free
    parts = log_probs.split([sizes[prompt] for prompt in copies])
    return torch.stack([part.mean() for part in parts])


def _of_copies(values: torch.Tensor, sizes: Sequence[int], copies: Sequence[int]) -> torch.Tensor:
    """Per-token values of U prompts, those of each copy one after the other."""
    of_prompts = values.split(list(sizes))
    return torch.cat([of_prompts[prompt] for prompt in copies])
