"""The model users hold: `generate` that prunes, and `glimpse`."""

import inspect
from functools import wraps

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .assisted_decoding import AssistedDecodingMixin
from .compaction import UNTRAINED
from .glimpse import Glimpse
from .glimpse_prefix import GlimpsePrefix
from .glimpse_record import GlimpseRecord, refuse_nan
from .glimpse_weights import GlimpseWeightsMixin
from .later_turns import check_placeholders, past_length
from .looking import LookingMixin
from .pruned_cache import pruned_layer
from .repeated_inputs import ENCODED, RepeatedInputsMixin
from .row_boundaries import first_labelled
from .stock import CACHE_NAME, ENCODES_FIRST, cache_of, counts_positions, given_cache, take_cache


class PruningGenerationMixin(
    LookingMixin, AssistedDecodingMixin, RepeatedInputsMixin, GlimpseWeightsMixin
):
    """The model users hold: `generate` that prunes, and `glimpse`.

    A family puts it in front of the stock class, names the backbone, and shows the arguments of
    `forward` (see `show_pruning_arguments`).

    Attributes:
        backbone_class: the family's backbone.
    """

    backbone_class: type[PreTrainedModel]

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # not the stock class's, which builds its backbone
        self.model = self.backbone_class(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def glimpse_module(self) -> Glimpse:
        return self.model.glimpse

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prompt_length: int | torch.Tensor | None = None,
        **kwargs,
    ):
        """The stock forward with the arguments of `PruningArguments`.

        Hidden states and logits come back in the prompt's full length, with zeros at dropped
        tokens; with `logits_to_keep=1`, as in `generate`, nothing is laid out again.
        """
        cache = take_cache(kwargs, cache)
        if prompt_length is None and self._prunes(kwargs, cache):
            prompt_length = completion_start(labels, logits_to_keep, input_ids)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        return super().forward(
            input_ids=input_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            prompt_length=prompt_length,
            compact_output=last_only,
            **given_cache(cache),
            **kwargs,
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        """The stock method with the arguments of `PruningArguments`."""
        cache = take_cache(kwargs)
        if isinstance(cache, GlimpsePrefix):
            args, kwargs = (), self._over_prefix(cache, *args, **kwargs)
        if cache is not None:
            kwargs |= given_cache(cache)
        return super().generate(*args, **kwargs)

    def _over_prefix(self, prefix: GlimpsePrefix, inputs=None, *args, **kwargs) -> dict:
        """Arguments of `generate` with whole prompts laid out over a prefix."""
        names = [*inspect.signature(GenerationMixin.generate).parameters][2:]
        kwargs |= dict(zip(names, args, strict=False))
        if inputs is not None:
            kwargs["input_ids"] = inputs
        given = kwargs.get("input_ids")
        kwargs = self.over_prefix(prefix, kwargs)
        if kwargs["input_ids"].shape != given.shape:
            raise ValueError(
                "prompts over a prefix are padded between it and what is behind it, which makes "
                f"these {kwargs['input_ids'].shape[1]} tokens long instead of {given.shape[1]}: "
                "give processor(text=..., prefix=prefix), or prefix.prompts(input_ids, "
                "attention_mask)"
            )
        return kwargs

    @torch.no_grad()
    def glimpse(self: PreTrainedModel, **inputs) -> GlimpseRecord:
        """Score the visual tokens of a prompt without answering: runs K layers.

        Args:
            inputs: what `generate` takes, settings of the selection included.

        Returns:
            Importance, keep masks and grids of all images and videos, in prompt order.

        Raises:
            ValueError: when the prompt has no visual tokens, the glimpse weights are untrained, or
                scores are no numbers.
        """
        if inputs.get("visual_keep_mask") is None and not self.model.glimpse.trained:
            raise ValueError(UNTRAINED)
        asked = {"only_glimpse": True, "use_cache": True, "return_dict": True}
        if isinstance(cache := take_cache(inputs), GlimpsePrefix):
            inputs = self.behind_prefix(cache, inputs)
        elif cache is not None:
            inputs |= given_cache(cache)
        outputs = self.model(**inputs, prune=True, **asked)
        cache = cache_of(outputs)
        if not hasattr(cache, "glimpse"):
            raise ValueError("this prompt has no image or video to glimpse at")
        refuse_nan(cache.glimpse.nan_counts(len(outputs.last_hidden_state)).tolist())
        return cache.glimpse

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Leave out images and videos that a kept cache has seen already; encode parts of others.

        Raises:
            ValueError: when the cache holds another prompt's.
        """
        inputs, name, model_kwargs = super()._prepare_model_inputs(
            inputs, bos_token_id, model_kwargs
        )
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        past = past_length(cache)
        if past and name == "input_ids":
            if mask is None or mask.shape[-1] == inputs.shape[1]:  # else ids of new tokens alone
                check_placeholders(cache, self.model.placeholders(inputs))
            model_kwargs = self.model.drop_cached_visuals(inputs, past, model_kwargs)
        ids = inputs[:, past:] if name == "input_ids" else None
        if ENCODES_FIRST:
            model_kwargs = self.model.encode_ahead(ids, model_kwargs)
        return inputs, name, model_kwargs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Plain positions over a kept cache, where the backbone counts on from it (transformers 5).

        The stock method would look for the conversation's first visuals.
        """
        cache = model_kwargs.get(CACHE_NAME)
        if pruned_layer(cache) is not None or (past_length(cache) and self._visuals(model_kwargs)):
            return GenerationMixin._prepare_position_ids_for_generation(
                self, inputs_tensor, model_kwargs
            )
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs):
        """As the stock method, with the visuals that a later turn brings where it forgets them."""
        kwargs["inputs_embeds"] = inputs_embeds
        cache = kwargs.get(CACHE_NAME)
        past = past_length(cache)
        positions_known = (
            counts_positions(GenerationMixin) or kwargs.get("position_ids") is not None
        )
        if positions_known or not past:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new_ids = input_ids[:, past:]
        brought = [
            name
            for kind, names in self.model.visual_inputs.items()
            if kwargs.get(names[0]) is not None and new_ids.shape[1] > 1
            if bool((new_ids == getattr(self.config, f"{kind}_token_id")).any())
            for name in names
        ]
        attention_mask = kwargs.get("attention_mask")
        counts_on = brought or pruned_layer(cache) is not None
        if counts_on and attention_mask is not None:
            kwargs["position_ids"] = attention_mask.long().cumsum(-1) - 1  # the backbone counts on
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return model_inputs | {name: kwargs.get(name) for name in brought}

    def _prunes(self, inputs: dict, cache: Cache | None) -> bool:
        """Whether a call goes through a pruned prefill; over a prefix all do."""
        if isinstance(cache, GlimpsePrefix):
            return True
        return inputs.get("prune") is not False and self._visuals(inputs)

    def _visuals(self, inputs: dict) -> bool:
        """Whether a call brings images or videos."""
        names = [names[0] for names in self.model.visual_inputs.values()]
        given = any(inputs.get(name) is not None for name in names)
        return given or bool(inputs.get(ENCODED))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Refuse what cannot be pruned, and forget the prompt's end where a cache remembers it.

        A prefill in chunks cannot know what the question at its end needs; a static cache has no
        room that pruning could free.
        """
        cache = model_kwargs.get(CACHE_NAME)
        prunes = self._prunes(model_kwargs, cache)
        if isinstance(cache, GlimpsePrefix) and not generation_config.use_cache:
            raise ValueError(
                "use_cache=False cannot be combined with a prefix, which is a cache: leave one out"
            )
        if prunes and generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size cannot be combined with pruning: use prune=False")
        if prunes and generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"a {generation_config.cache_implementation} cache cannot be pruned: use the "
                "default DynamicCache, or prune=False"
            )
        if generation_config.use_cache:
            model_kwargs.pop("prompt_length", None)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )


def completion_start(
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    input_ids: torch.LongTensor | None,
) -> int | torch.Tensor | None:
    """Where the completion begins, if the caller's other arguments tell.

    Args:
        labels: `(batch, length)`, see `first_labelled`.
        logits_to_keep: n > 1, but not all, asks for the last prompt token's logits and n - 1 tokens
            after it.
        input_ids: `(batch, length)`.

    Returns:
        Number of prompt tokens, `(batch,)` where rows differ, or None when all are prompt.
    """
    if labels is not None:
        return first_labelled(labels)
    if not isinstance(logits_to_keep, int) or input_ids is None:
        return None
    length = input_ids.shape[1]
    return length - logits_to_keep + 1 if 1 < logits_to_keep < length else None
