"""Assisted decoding beside images: what may be drafted, and the first step over a kept cache."""

from collections.abc import Callable
from functools import wraps

import torch
from transformers import GenerationConfig

from .later_turns import past_length
from .stock import CACHE_NAME

HELD = "tokens_held_at_first"  # inside a call of `generate` only


class AssistedDecodingMixin:
    """In front of a stock model: assisted decoding that says what plain decoding would say.

    A draft ends where a placeholder would begin: it would be taken for one of the prompt's images.
    The first step over a kept cache runs what the cache does not hold; the stock loop of
    transformers 5 runs the whole conversation again.
    """

    @property
    def undrafted_ids(self) -> list[int]:
        """Ids before which a draft ends."""
        return self.model.visual_token_ids.tolist()

    def _assisted_decoding(
        self, input_ids: torch.LongTensor, *args, generation_config: GenerationConfig, **kwargs
    ):
        """The stock method, over a kept cache too.

        Raises:
            ValueError: when ids of tokens that the cache holds were left out.
        """
        held = past_length(kwargs.get(CACHE_NAME))
        if held:
            length, mask = input_ids.shape[1], kwargs.get("attention_mask")
            whole = getattr(
                generation_config, "_mask_length", length
            )  # of a mask that was all ones
            whole = whole if mask is None else mask.shape[1]
            if length <= held or length != whole:
                raise ValueError(
                    f"assisted decoding over a cache that holds {held} tokens takes the ids of the "
                    f"whole conversation, those {held} and new ones behind them; got {length}"
                )
            kwargs[HELD] = held
        return super()._assisted_decoding(
            input_ids, *args, generation_config=generation_config, **kwargs
        )

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """As the stock method; a first step over a kept cache is cut here (transformers 5)."""
        held = kwargs.pop(HELD, 0)
        if held and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = input_ids.shape[1] - held
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """The stock drafter, whose drafts hold no placeholders.

        Raises:
            ValueError: when a draft model would lack images that the cache holds.
        """
        model_kwargs = dict(model_kwargs)
        held = model_kwargs.pop(HELD, 0)
        if held and kwargs.get("assistant_model") is not None and self._visuals(model_kwargs):
            raise ValueError(
                "a draft model cannot follow a turn that brings images over a kept cache, as it "
                "does not have the images that the cache holds: use prompt_lookup_num_tokens, or "
                "start again without the cache"
            )
        drafter = super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)
        drafter.get_candidates = _ending_before(drafter.get_candidates, self.undrafted_ids)
        return drafter


def _ending_before(get_candidates: Callable, token_ids: list[int]) -> Callable:
    """A drafter's `get_candidates`, whose drafts end before the first of some ids."""

    @wraps(get_candidates)
    def cut(input_ids: torch.LongTensor, **kwargs):
        candidates, logits = get_candidates(input_ids, **kwargs)
        length = input_ids.shape[1]
        draft = candidates[0, length:]
        refused = torch.isin(draft, draft.new_tensor(token_ids)).nonzero()
        if not len(refused):
            return candidates, logits
        end = int(refused[0])
        if not end:
            return candidates[:, :length], None
        return candidates[:, : length + end], None if logits is None else logits[:, :end]

    return cut
