"""What every GlimpsePrune family shares outside its text model."""

from itertools import compress

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .base_weights import located_weights, own_weights
from .glimpse import Glimpse, GlimpseToken
from .glimpse_record import GlimpseRecord
from .importance_predictor import RMSNorm
from .later_turns import later_positions, new_visuals, past_length
from .pruned_cache import pruned_layer
from .pruned_forward import TRANSFORMERS_5, UNTRAINED, PruneRequest
from .pruning_arguments import PruningArguments
from .visual_tokens import VisualFeatures, collect_visual_tokens, tap_outputs


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
            if isinstance(module, (RMSNorm, nn.LayerNorm)):  # not every stock class knows norms
                nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
            glimpse.declare_untrained()


class PruningModelMixin(GlimpseWeightsMixin):
    """Backbone (vision encoder and text model) that turns a call into a `PruneRequest`.

    A family builds `glimpse` and a `language_model` with `PrunedForwardMixin` in front, and says:

    Attributes:
        visual_inputs: for each kind of visual, the arguments that its encoder takes, pixels first.
        visual_notes: further arguments with one entry a visual, which its encoder does not take.
        positions_from_ids: whether the stock backbone derives rotary positions from `input_ids`.
        predictor_window: side of the vision encoder's attention windows in tokens, if it has any.
    """

    config: object
    glimpse: Glimpse
    visual_inputs: dict[str, tuple[str, ...]] = {}
    visual_notes: dict[str, tuple[str, ...]] = {}
    positions_from_ids = False
    predictor_window: int | None = None

    def glimpse_module(self) -> Glimpse:
        return self.glimpse

    def check_config(self) -> None:
        """Check the configuration, whose fields may have been set since the model was built.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        self.config.validate_glimpse_fields()
        self.glimpse.check_built_for(self.config)

    def tapped_modules(self) -> list[nn.Module]:
        """The modules whose outputs condition the predictor, in the order of its layers."""
        raise NotImplementedError

    def reduce_tap(self, output: torch.Tensor) -> torch.Tensor:
        """What to keep of a tapped module's output while the encoder goes on."""
        return output

    def describe_visuals(
        self, embeddings: list[torch.Tensor], taps: list[torch.Tensor], **inputs
    ) -> VisualFeatures:
        """Say which visual tokens an encoder's output holds, where they are, and what was tapped.

        Args:
            embeddings: one `(placeholders, hidden)` tensor an image.
            taps: what `reduce_tap` kept of the outputs of `tapped_modules`.
            inputs: what the encoder was given, pixels apart.
        """
        raise NotImplementedError

    def encode_visual(self, kind: str, **inputs) -> VisualFeatures:
        """Encode images or videos by the stock method and tap the vision encoder on the way.

        Args:
            kind: `"image"` or `"video"`.
            inputs: what the stock method `get_image_features` or `get_video_features` takes.

        Raises:
            ValueError: for a field of the configuration that cannot be.
        """
        self.check_config()
        encode = getattr(super(), f"get_{kind}_features")
        with tap_outputs(self.tapped_modules(), self.reduce_tap) as taps:
            outputs = encode(**inputs)
        embeddings = outputs.pooler_output if TRANSFORMERS_5 else outputs
        pixels, *others = self.visual_inputs[kind]
        others = {name: inputs[name] for name in others if inputs.get(name) is not None}
        return self.describe_visuals(list(embeddings), taps, **others)

    def get_image_features(self, pixel_values: torch.Tensor, *args, **kwargs):
        """The stock features; on transformers 5 with what the predictor needs beside them."""
        pixels, *others = self.visual_inputs["image"]
        inputs = {pixels: pixel_values} | dict(zip(others, args, strict=False))
        return self.as_stock(self.encode_visual("image", **inputs, **kwargs))

    def as_stock(self, features: VisualFeatures):
        """Encoded visuals in the form in which the stock methods return them."""
        return features if TRANSFORMERS_5 else features.pooler_output

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, VisualFeatures] | None = None,
        **kwargs,
    ):
        """The stock forward with pruning.

        Args:
            mm_encoder_outputs: encoded visuals by kind, in place of their pixels.
            kwargs: other arguments of the stock forward, and those of `PruningArguments`.
        """
        arguments = PruningArguments.take_from(kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = self._encode(mm_encoder_outputs, kwargs)
        masks = self._placeholder_masks(input_ids, inputs_embeds, encoded)
        inputs_embeds = self._merge(inputs_embeds, encoded, masks)
        request = None
        if encoded and arguments.prune is not False:
            request = self._prune_request(encoded, masks, arguments)
        has_visuals = bool(encoded)
        if has_visuals and past_length(past_key_values):
            position_ids = self.turn_positions(
                input_ids, position_ids, inputs_embeds, past_key_values, encoded, kwargs
            )
        elif (pruned := pruned_layer(past_key_values)) is not None:
            position_ids = later_positions(pruned, inputs_embeds, kwargs.get("attention_mask"))
        elif request is not None and position_ids is None and not self.positions_from_ids:
            position_ids = prompt_positions(kwargs.get("attention_mask"))
        del encoded, masks  # a long prefill can use the memory
        outputs = super().forward(
            input_ids=input_ids if self.positions_from_ids else None,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            prune_request=request,
            **kwargs,
        )
        if has_visuals and request is None:
            self.note_positions(outputs)
        return outputs

    def note_positions(self, outputs) -> None:
        """Put on the cache of visuals that were not pruned what later turns need to count on."""

    def turn_positions(
        self,
        input_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache,
        encoded: dict[str, VisualFeatures],
        inputs: dict,
    ) -> torch.LongTensor | None:
        """Rotary positions of a later turn that brings visuals, behind what the cache holds.

        Args:
            position_ids: those given with the call.
            inputs: its other arguments.
        """
        pruned = pruned_layer(cache)
        if pruned is None:
            return position_ids
        return later_positions(pruned, inputs_embeds, inputs.get("attention_mask"))

    def visual_sizes(self, kind: str, **inputs) -> list[int]:
        """Placeholders of each visual of a kind, from the arguments that describe it."""
        raise NotImplementedError

    def pixel_rows(self, kind: str, **inputs) -> list[int]:
        """Rows of the pixel tensor that each visual takes."""
        return [1] * len(inputs[self.visual_inputs[kind][0]])

    def drop_cached_visuals(self, input_ids: torch.LongTensor, past: int, inputs: dict) -> dict:
        """Inputs of a later turn without the visuals whose tokens the cache holds.

        Args:
            input_ids: `(batch, length)`, the whole conversation.
            past: tokens that the cache holds.
            inputs: the call's other arguments.

        Raises:
            ValueError: when images or videos and placeholders differ in number.
        """
        inputs = dict(inputs)
        for kind, names in self.visual_inputs.items():
            pixels = inputs.get(names[0])
            if pixels is None:
                continue
            sizes = self.visual_sizes(kind, **inputs)
            token_id = getattr(self.config, f"{kind}_token_id")
            is_new = new_visuals(input_ids, token_id, past, sizes)
            parts = pixels.split(self.pixel_rows(kind, **inputs))
            inputs[names[0]] = torch.cat([*compress(parts, is_new)]) if any(is_new) else None
            notes = self.visual_notes.get(kind, ())
            for name in (*names[1:], *notes):
                values = inputs.get(name)
                if isinstance(values, torch.Tensor):
                    inputs[name] = values[is_new] if any(is_new) else None
                elif name in notes and values is not None:
                    inputs[name] = [*compress(values, is_new)] or None
        return {name: value for name, value in inputs.items() if value is not None}

    def visual_counts(self, input_ids: torch.LongTensor, **inputs) -> list[int]:
        """Visual tokens of each prompt: what a keep mask has to cover.

        Args:
            input_ids: `(batch, length)`.
            inputs: the prompts' other inputs.
        """
        visual = self.visual_token_ids.to(input_ids.device)
        return torch.isin(input_ids, visual).sum(1).tolist()

    @property
    def visual_token_ids(self) -> torch.Tensor:
        """Ids of the placeholders."""
        return torch.tensor(
            [getattr(self.config, f"{kind}_token_id") for kind in self.visual_inputs]
        )

    def _encode(
        self, encoded: dict[str, VisualFeatures] | None, kwargs: dict
    ) -> dict[str, VisualFeatures]:
        """Encode what comes as pixels, which leave `kwargs`."""
        encoded = dict(encoded or {})
        for kind, names in self.visual_inputs.items():
            inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            if kwargs.pop(names[0], None) is not None:
                encoded[kind] = self.encode_visual(kind, **inputs)
        return encoded

    def _placeholder_masks(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        encoded: dict[str, VisualFeatures],
    ) -> dict[str, torch.Tensor]:
        """`(batch, length)` bool by kind; the stock check of the counts included."""
        masks = {}
        for index, kind in enumerate(self.visual_inputs):
            if kind in encoded:
                features = torch.cat(list(encoded[kind].pooler_output))
                found = self.get_placeholder_mask(
                    input_ids, inputs_embeds, **{f"{kind}_features": features}
                )
                masks[kind] = (found[index] if isinstance(found, tuple) else found)[..., 0]
        return masks

    def _merge(
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

    def _prune_request(
        self,
        encoded: dict[str, VisualFeatures],
        masks: dict[str, torch.Tensor],
        arguments: PruningArguments,
    ) -> PruneRequest:
        """Describe the pruning of one prefill; settings that are None come from the configuration.

        Raises:
            ValueError: for a setting out of range or a keep mask that does not fit.
        """
        config = self.config
        self.check_config()
        settings = {}
        for name in ("prune_threshold", "max_keep_ratio", "min_keep_tokens"):
            given = getattr(arguments, name)
            settings[name] = getattr(config, name) if given is None else given
            config.validate_field(name, settings[name])
        tokens = collect_visual_tokens(encoded, masks)
        if arguments.visual_keep_mask is not None:
            validate_keep_mask(arguments.visual_keep_mask, tokens.total)
        if arguments.visual_log_keep is not None:
            validate_log_keep(arguments, tokens.total)
        return PruneRequest(
            glimpse=self.glimpse,
            tokens=tokens,
            glimpse_layer=config.glimpse_layer,
            predictor_window=self.predictor_window if config.predictor_windowed else None,
            anchor_corners=config.anchor_corners,
            visual_keep_mask=arguments.visual_keep_mask,
            visual_log_keep=arguments.visual_log_keep,
            prompt_length=arguments.prompt_length,
            in_place=arguments.in_place,
            only_glimpse=arguments.only_glimpse,
            compact_output=arguments.compact_output,
            **settings,
        )


class PruningGenerationMixin(GlimpseWeightsMixin):
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
        *args,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prompt_length: int | None = None,
        **kwargs,
    ):
        """The stock forward with the arguments of `PruningArguments`.

        Hidden states and logits come back in the prompt's full length, with zeros at dropped
        tokens; with `logits_to_keep=1`, as in `generate`, nothing is laid out again.
        """
        if prompt_length is None:
            prompt_length = completion_start(labels, logits_to_keep, input_ids)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        return super().forward(
            input_ids,
            *args,
            labels=labels,
            logits_to_keep=logits_to_keep,
            prompt_length=prompt_length,
            compact_output=last_only,
            **kwargs,
        )

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

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Leave out images and videos that a kept cache has seen already."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(
            inputs, bos_token_id, model_kwargs
        )
        past = past_length(model_kwargs.get("past_key_values"))
        if past and name == "input_ids":
            model_kwargs = self.model.drop_cached_visuals(inputs, past, model_kwargs)
        return inputs, name, model_kwargs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Plain positions over a kept cache, where the backbone counts on from it (transformers 5).

        The stock method would look for the conversation's first visuals.
        """
        cache = model_kwargs.get("past_key_values")
        if pruned_layer(cache) is not None or (past_length(cache) and self._visuals(model_kwargs)):
            return GenerationMixin._prepare_position_ids_for_generation(
                self, inputs_tensor, model_kwargs
            )
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """As the stock method, and on transformers 4 with the visuals that a later turn brings."""
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        past = past_length(past_key_values)
        if TRANSFORMERS_5 or not past or kwargs.get("position_ids") is not None:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        new_ids = input_ids[:, past:]
        brought = [
            name
            for kind, names in self.model.visual_inputs.items()
            if kwargs.get(names[0]) is not None and new_ids.shape[1] > 1
            if bool((new_ids == getattr(self.config, f"{kind}_token_id")).any())
            for name in names
        ]
        attention_mask = kwargs.get("attention_mask")
        counts_on = brought or pruned_layer(past_key_values) is not None
        if counts_on and attention_mask is not None:
            kwargs["position_ids"] = attention_mask.long().cumsum(-1) - 1  # the backbone counts on
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return model_inputs | {name: kwargs.get(name) for name in brought}

    def _visuals(self, inputs: dict) -> bool:
        """Whether a call brings images or videos."""
        names = [names[0] for names in self.model.visual_inputs.values()]
        given = any(inputs.get(name) is not None for name in names)
        return given or bool(inputs.get("mm_encoder_outputs"))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Refuse what cannot be pruned, and forget the prompt's end where a cache remembers it.

        A prefill in chunks cannot know what the question at its end needs; a static cache has no
        room that pruning could free.
        """
        prunes = self._visuals(model_kwargs) and model_kwargs.get("prune") is not False
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

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        """Repeat the keep mask row by row, as images are, and note where the prompt ends.

        The stock method repeats a tensor's elements. The end of the prompt matters without a cache,
        where later steps run the prompt again with what was generated behind it.
        """
        keep_mask = model_kwargs.pop("visual_keep_mask", None)
        new_ids = self.new_placeholders(input_ids, model_kwargs) if expand_size > 1 else None
        if expand_size > 1:
            self._check_placeholders(new_ids, model_kwargs.get("mm_encoder_outputs") or {})
        if keep_mask is not None and expand_size > 1:
            counts = self.model.visual_counts(new_ids, **model_kwargs)
            validate_keep_mask(keep_mask, sum(counts))
            keep_mask = torch.cat([row.repeat(expand_size) for row in keep_mask.split(counts)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if keep_mask is not None:
            model_kwargs["visual_keep_mask"] = keep_mask
        if input_ids.shape[1] > 0:
            model_kwargs["prompt_length"] = input_ids.shape[1]
        return input_ids, model_kwargs

    def new_placeholders(self, input_ids: torch.LongTensor, inputs: dict) -> torch.LongTensor:
        """Ids `(batch, new tokens)` of the tokens that a kept cache does not hold.

        Of prompts given as embeddings only the placeholders are told.
        """
        embeddings = inputs.get("inputs_embeds")
        if embeddings is None or input_ids.shape[1] > 0:
            return input_ids[:, past_length(inputs.get("past_key_values")) :]
        token_ids = self.model.visual_token_ids.to(embeddings.device)
        new_ids = torch.full(embeddings.shape[:2], -1, device=embeddings.device)
        for token_id, vector in zip(token_ids, self.get_input_embeddings()(token_ids), strict=True):
            new_ids[(embeddings == vector).all(-1)] = token_id
        return new_ids

    def _check_placeholders(
        self, input_ids: torch.LongTensor, encoded: dict[str, VisualFeatures]
    ) -> None:
        """Refuse encoded visuals and placeholders that differ, before their rows are repeated.

        The stock method leaves out what it finds no row for.
        """
        for kind, features in encoded.items():
            given = sum(len(embeddings) for embeddings in features.pooler_output)
            found = int((input_ids == getattr(self.config, f"{kind}_token_id")).sum())
            if found != given:
                raise ValueError(
                    f"{kind} features and {kind} tokens do not match: {given} features, "
                    f"{found} tokens"
                )


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


def validate_log_keep(arguments: PruningArguments, num_visual_tokens: int) -> None:
    """Check a caller's soft mask, whose values are not looked at.

    Raises:
        ValueError: unless it is a float tensor of shape `(num_visual_tokens,)` and alone.
    """
    log_keep = arguments.visual_log_keep
    if not isinstance(log_keep, torch.Tensor) or not log_keep.is_floating_point():
        found = getattr(log_keep, "dtype", type(log_keep).__name__)
        raise ValueError(f"visual_log_keep must be a float tensor, got {found}")
    if log_keep.shape != (num_visual_tokens,):
        raise ValueError(
            f"visual_log_keep must have shape ({num_visual_tokens},), one entry a visual token of "
            f"the batch in prompt order, got {tuple(log_keep.shape)}"
        )
    for name in ("visual_keep_mask", "in_place", "only_glimpse"):
        given = getattr(arguments, name)
        if given is not None and given is not False:
            raise ValueError(f"visual_log_keep cannot be combined with {name}")


def prompt_positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Rotary positions `(batch, length)` as `generate` counts them, or None without a 2-D mask.

    Scores of a padded prompt are the same then whether `generate` takes the glimpse or not.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


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
