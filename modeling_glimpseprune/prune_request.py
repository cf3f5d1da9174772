"""What a prefill is asked to do with its visual tokens."""

from dataclasses import dataclass

import torch

from .glimpse import Glimpse
from .held_prompt import HeldPrompt
from .visual_tokens import VisualTokens


@dataclass
class PruneRequest:
    """What a prefill is asked to do with its visual tokens.

    Attributes:
        glimpse: the trained modules.
        tokens: the batch's visual tokens.
        glimpse_layer: K, the last layer whose attention is read.
        predictor_window: side of the predictor's attention windows in tokens, or None.
        anchor_corners: corners whose token is always kept.
        prune_threshold, max_keep_ratio, min_keep_tokens: see `select_visual_tokens`.
        prune_layer: P, the last layer that sees every token; below K the glimpse is read ahead. -1
            prunes before the decoder, with a mask given by the caller.
        visual_keep_mask: `(N,)` bool given by the caller; no glimpse is taken then.
        visual_log_keep: `(N,)` a soft mask given by the caller; no glimpse is taken, and every
            token stays.
        prompt_length: tokens before the completion, `(batch,)` where rows differ, or None when all
            are prompt.
        in_place: keep every token and leave the glimpse token in the sequence, where the
            completion sees it: the forward of stage 1. With `hold`: run the layers above P as well,
            for questions that do so.
        only_glimpse: stop after the choice.
        compact_output: return the hidden states of kept tokens only, packed to the right.
        held: what a prefix holds of the prompt, whose visual tokens are among `tokens`.
        hold: stop after layer P's attention and let the cache hold the prompt (see `HeldPrompt`).
    """

    glimpse: Glimpse
    tokens: VisualTokens
    glimpse_layer: int
    predictor_window: int | None
    anchor_corners: list[str]
    prune_threshold: float
    max_keep_ratio: float | None
    min_keep_tokens: int
    prune_layer: int
    visual_keep_mask: torch.Tensor | None = None
    visual_log_keep: torch.Tensor | None = None
    prompt_length: int | torch.Tensor | None = None
    in_place: bool = False
    only_glimpse: bool = False
    compact_output: bool = False
    held: HeldPrompt | None = None
    hold: bool = False

    def __post_init__(self) -> None:
        """Refuse what no prefill can do.

        Raises:
            ValueError: when the completion should see a glimpse that is not in the sequence, or
                tokens that only wait for theirs, or that were never encoded.
        """
        over = self.in_place and self.held is not None
        if over and not (self.held.in_place or self.only_glimpse):
            raise ValueError(
                "in_place over a prefix needs one whose upper layers ran, too: look with "
                "in_place=True, or give the whole prompt"
            )
        if (over or self.in_place and self.hold) and self.tokens.encoded is not None:
            raise ValueError(
                "in_place over a prefix needs whole images: leave redundant_patches and "
                "visual_encode_mask out, or give the whole prompt"
            )
        if self.in_place and self.runs_beside:
            raise ValueError(
                "in_place needs the glimpse token in the sequence, so prune_layer must be "
                f"glimpse_layer ({self.glimpse_layer}) and glimpse_lora_rank 0; got prune_layer "
                f"{self.prune_layer}"
            )

    @property
    def takes_glimpse(self) -> bool:
        """Whether the glimpse decides, and not the caller."""
        given = self.visual_keep_mask is not None or self.visual_log_keep is not None
        return not given and not self.hold

    @property
    def looks_ahead(self) -> bool:
        """Whether the glimpse runs on above the last layer that sees every token."""
        return self.takes_glimpse and self.prune_layer < self.glimpse_layer

    @property
    def runs_beside(self) -> bool:
        """Whether the glimpse tokens run beside the prompt, and not as its last rows."""
        return self.looks_ahead or (self.takes_glimpse and self.glimpse.token_additions is not None)
