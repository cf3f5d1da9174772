"""What every GlimpsePrune family shares outside its text model."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .base_weights import located_weights, own_weights
from .configuration_glimpseprune import validate_selection
from .glimpse import Glimpse, GlimpseToken
from .glimpse_record import GlimpseRecord
from .pruned_forward import UNTRAINED, PruneRequest
from .visual_tokens import VisualFeatures, collect_visual_tokens


class GlimpseWeightsMixin:
    """Initialisation of the added weights; a checkpoint that lacks any of them is untrained."""

    def glimpse_module(self) -> Glimpse:
        """The module whose weights are added to the base."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As the stock method; the base of a glimpse-only repository is fetched.

        Weights that a checkpoint lacks make the glimpse untrained. transformers 4 fills missing
        weights in before it reads the others, `trained` among them.
        """
        with located_weights(pretrained_model_name_or_path, kwargs) as (source, arguments):
            loaded = super().from_pretrained(source, *args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        own_weights(model, pretrained_model_name_or_path)
        glimpse = model.glimpse_module()
        if glimpse.declared_untrained:
            glimpse.trained.fill_(False)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Called for fresh modules and, when loading, for those the checkpoint lacks weights of."""
        super()._init_weights(module)
        if isinstance(module, GlimpseToken):
            nn.init.normal_(module.embeddings, std=self.config.get_text_config().initializer_range)
        glimpse = self.glimpse_module()
        if any(module is part for part in glimpse.modules()):
            glimpse.declare_untrained()


class PruningModelMixin(GlimpseWeightsMixin):
    """Backbone (vision encoder and text model) that turns a call into a `PruneRequest`.

    A family sets `glimpse` and says in `predictor_window` how the vision encoder's windows measure
    in tokens.
    """

    config: object
    glimpse: Glimpse
    predictor_window: int | None = None

    def glimpse_module(self) -> Glimpse:
        return self.glimpse

    def merge_visual_features(
        self,
        inputs_embeds: torch.Tensor,
        encoded: dict[str, VisualFeatures],
        masks: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Put encoded images and videos at their placeholders: `(batch, length, hidden)`."""
        for kind, features in encoded.items():
            embeddings = torch.cat(list(features.pooler_output)).to(inputs_embeds)
            mask = masks[kind][..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(mask, embeddings)
        return inputs_embeds

    def prune_request(
        self,
        encoded: dict[str, VisualFeatures],
        masks: dict[str, torch.Tensor],
        prune_threshold: float | None = None,
        max_keep_ratio: float | None = None,
        min_keep_tokens: int | None = None,
        visual_keep_mask: torch.Tensor | None = None,
        **options,
    ) -> PruneRequest:
        """Describe the pruning of one prefill; settings that are None come from the configuration.

        Raises:
            ValueError: for a setting out of range or a keep mask that does not fit.
        """
        config = self.config
        if prune_threshold is None:
            prune_threshold = config.prune_threshold
        if max_keep_ratio is None:
            max_keep_ratio = config.max_keep_ratio
        if min_keep_tokens is None:
            min_keep_tokens = config.min_keep_tokens
        validate_selection(prune_threshold, max_keep_ratio, min_keep_tokens)
        tokens = collect_visual_tokens(encoded, masks)
        if visual_keep_mask is not None:
            validate_keep_mask(visual_keep_mask, tokens.total)
        return PruneRequest(
            glimpse=self.glimpse,
            tokens=tokens,
            glimpse_layer=config.glimpse_layer,
            predictor_window=self.predictor_window if config.predictor_windowed else None,
            anchor_corners=config.anchor_corners,
            prune_threshold=prune_threshold,
            max_keep_ratio=max_keep_ratio,
            min_keep_tokens=min_keep_tokens,
            visual_keep_mask=visual_keep_mask,
            **options,
        )


class PruningGenerationMixin(GlimpseWeightsMixin):
    """The model users hold: `generate` that prunes, and `glimpse`."""

    def glimpse_module(self) -> Glimpse:
        return self.model.glimpse

    @torch.no_grad()
    def glimpse(self: PreTrainedModel, **inputs) -> GlimpseRecord:
        """Score the visual tokens of a prompt without answering: runs K layers.

        Args:
            inputs: what `generate` takes, settings of the selection included.

        Returns:
            Importance, keep masks and grids of all images and videos, in prompt order.

        Raises:
            ValueError: when the prompt has no visual tokens, or the glimpse weights are untrained.
        """
        if inputs.get("visual_keep_mask") is None and not self.model.glimpse.trained:
            raise ValueError(UNTRAINED)
        outputs = self.model(**inputs, prune=True, only_glimpse=True, use_cache=True)
        if not hasattr(outputs.past_key_values, "glimpse"):
            raise ValueError("this prompt has no image or video to glimpse at")
        return outputs.past_key_values.glimpse

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Refuse a prefill in chunks, which cannot know what the question at its end needs."""
        visual = [model_kwargs.get(name) for name in ("pixel_values", "pixel_values_videos")]
        has_visual = any(each is not None for each in visual) or model_kwargs.get(
            "mm_encoder_outputs"
        )
        chunked = generation_config.prefill_chunk_size is not None
        if chunked and has_visual and model_kwargs.get("prune") is not False:
            raise ValueError("prefill_chunk_size cannot be combined with pruning: use prune=False")
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """Repeat the keep mask row by row, as images are, and note where the prompt ends.

        The stock method repeats a tensor's elements. The end of the prompt matters where later
        steps run it again: without a cache, or with candidates of assisted decoding behind it.
        """
        keep_mask = model_kwargs.pop("visual_keep_mask", None)
        if keep_mask is not None and expand_size > 1:
            visual = self.model.visual_token_ids
            counts = torch.isin(input_ids, visual.to(input_ids.device)).sum(1).tolist()
            validate_keep_mask(keep_mask, sum(counts))
            keep_mask = torch.cat([row.repeat(expand_size) for row in keep_mask.split(counts)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if keep_mask is not None:
            model_kwargs["visual_keep_mask"] = keep_mask
        cache = model_kwargs.get("past_key_values")
        starts = cache is None or cache.get_seq_length() == 0
        if starts and input_ids is not None and input_ids.shape[1] > 0:
            model_kwargs["prompt_length"] = input_ids.shape[1]
        return input_ids, model_kwargs


def validate_keep_mask(visual_keep_mask: torch.Tensor, num_visual_tokens: int) -> None:
    """Check a caller's keep mask.

    Raises:
        ValueError: unless it is a bool tensor of shape `(num_visual_tokens,)`.
    """
    if not isinstance(visual_keep_mask, torch.Tensor) or visual_keep_mask.dtype != torch.bool:
        found = getattr(visual_keep_mask, "dtype", type(visual_keep_mask).__name__)
        raise ValueError(f"visual_keep_mask must be a bool tensor, got {found}")
    if visual_keep_mask.shape != (num_visual_tokens,):
        raise ValueError(
            f"visual_keep_mask must have shape ({num_visual_tokens},), one entry a visual token of "
            f"the batch in prompt order, got {tuple(visual_keep_mask.shape)}"
        )


def completion_start(
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    input_ids: torch.LongTensor | None,
) -> int | None:
    """Where the completion begins, if the caller's other arguments tell.

    Args:
        labels: `(batch, length)`; the first column where any row has a label (not -100).
        logits_to_keep: n > 1 asks for the last prompt token's logits and n - 1 tokens after it.
        input_ids: `(batch, length)`.

    Returns:
        Number of prompt tokens, or None when all are prompt.
    """
    if labels is not None:
        labelled = (labels != -100).any(dim=0).nonzero()
        return int(labelled[0]) if len(labelled) else None
    if isinstance(logits_to_keep, int) and logits_to_keep > 1 and input_ids is not None:
        return input_ids.shape[1] - logits_to_keep + 1
    return None
