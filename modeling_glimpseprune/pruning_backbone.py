"""The backbone: encodes images and videos, and turns a call into a `PruneRequest`."""

from dataclasses import replace

import torch
from transformers.cache_utils import Cache

from .encode_choice import ENCODE_ARGUMENTS, NONE_BEHIND, EncodeChoice
from .given_visuals import GivenVisualsMixin
from .glimpse import Glimpse
from .glimpse_prefix import GlimpsePrefix, check_made_by
from .glimpse_weights import GlimpseWeightsMixin
from .held_prompt import HeldPrompt, prune_layer_over
from .later_turns import (
    later_positions,
    note_placeholders,
    past_length,
    positions_after_turn,
    prompt_positions,
)
from .prune_request import PruneRequest
from .pruned_cache import pruned_layer
from .pruning_arguments import (
    CALL_SETTINGS,
    PruningArguments,
    validate_keep_mask,
    validate_log_keep,
)
from .stock import add_encoded, backbone_names, cache_of, given_cache, take_cache
from .visual_encoding import VisualEncodingMixin
from .visual_features import VisualFeatures, described, refuse_parts
from .visual_tokens import collect_visual_tokens


class PruningModelMixin(VisualEncodingMixin, GivenVisualsMixin, GlimpseWeightsMixin):
    """Backbone (vision encoder and text model) that turns a call into a `PruneRequest`.

    A family builds `glimpse` and a `language_model` with `PrunedForwardMixin` in front, and says
    what the mixins ask, and:

    Attributes:
        positions_from_ids: whether rotary positions are derived from ids.
        takes_ids_beside_embeddings: whether the stock backbone does that itself.
        predictor_window: side of the vision encoder's attention windows in tokens, if it has any.
    """

    positions_from_ids = False
    takes_ids_beside_embeddings = False
    predictor_window: int | None = None

    def glimpse_module(self) -> Glimpse:
        return self.glimpse

    @classmethod
    def named_weights(cls, arguments: dict) -> dict:
        return arguments | backbone_names(cls, arguments.get("key_mapping"))

    def check_config(self) -> None:
        """Check the configuration, whose fields may have been set since the model was built.

        Raises:
            ValueError: naming the field and the value that cannot be.
        """
        self.config.validate_glimpse_fields()
        self.glimpse.check_built_for(self.config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, VisualFeatures] | None = None,
        **kwargs,
    ):
        """The stock forward with pruning.

        Args:
            mm_encoder_outputs: encoded visuals by kind, in place of their pixels.
            kwargs: other arguments of the stock forward, and those of `PruningArguments`.
        """
        cache = take_cache(kwargs, cache)
        arguments = PruningArguments.take_from(kwargs)
        return_dict = kwargs.pop("return_dict", None)
        self._check_exactly_one(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        held = None
        if isinstance(cache, GlimpsePrefix):
            cache, held = self._fork(cache, inputs_embeds, kwargs)
        describes = arguments.prune is not False or past_length(cache) > 0
        choice = self._encode_choice(arguments, mm_encoder_outputs)
        encoded = self._encode(mm_encoder_outputs, kwargs, describes, choice, input_ids)
        masks = self._placeholder_masks(input_ids, inputs_embeds, encoded)
        inputs_embeds = self._merge(inputs_embeds, encoded, masks)
        request = None
        if held is not None or (encoded and arguments.prune is not False):
            self._check_boundary(arguments)
            request = self._prune_request(encoded, masks, arguments, held)
        elif arguments.hold:
            raise ValueError("this prompt has no image or video to look at")
        has_visuals, is_fresh = bool(encoded), not past_length(cache)
        placeholders = self.placeholders(input_ids, masks)
        if held is not None and not encoded:
            self._check_brings_none(arguments, placeholders)
        if has_visuals and not is_fresh:
            position_ids = self.turn_positions(
                input_ids, position_ids, inputs_embeds, cache, encoded, kwargs
            )
        else:
            position_ids = self._positions(
                input_ids, position_ids, inputs_embeds, cache, kwargs, request is not None
            )
        if (additions := self._layer_additions(encoded, masks)) is not None:
            kwargs["layer_additions"] = additions
        if request is not None:  # a long prefill can use the memory
            encoded = {kind: features.without_views() for kind, features in encoded.items()}
        del masks
        outputs = super().forward(
            input_ids=input_ids if self.takes_ids_beside_embeddings else None,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            prune_request=request,
            return_dict=True,
            **given_cache(cache),
            **kwargs,
        )
        if has_visuals and request is None:
            self.note_positions(outputs)
        if is_fresh:
            note_placeholders(cache_of(outputs), placeholders)
        add_encoded(outputs, encoded)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def encode_ahead(self, input_ids: torch.LongTensor | None, inputs: dict) -> dict:
        """A generation's inputs with its visuals encoded, where a part of them is asked for.

        Args:
            input_ids: `(batch, new tokens)`, or None where the prompts came as embeddings.
            inputs: its other inputs.
        """
        inputs = dict(inputs)
        given = {name: inputs.pop(name, None) for name in ENCODE_ARGUMENTS}
        arguments = PruningArguments(prune=inputs.get("prune"), **given)
        choice = self._encode_choice(arguments, inputs.get("mm_encoder_outputs"))
        pixels = [names[0] for names in self.visual_inputs.values()]
        if choice.is_all or all(inputs.get(name) is None for name in pixels):
            return inputs
        return inputs | {"mm_encoder_outputs": self._encode(None, inputs, True, choice, input_ids)}

    def _encode_choice(
        self, arguments: PruningArguments, encoded: dict[str, VisualFeatures] | None
    ) -> EncodeChoice:
        """What to encode of the visuals of a call.

        Raises:
            ValueError: when the call asks for a part of visuals that are encoded already, or not
                to be pruned; when visuals that shall not be pruned were encoded in part.
        """
        given = {name: getattr(arguments, name) for name in ENCODE_ARGUMENTS}
        if arguments.prune is False:
            refuse_parts(encoded or {})
        asks = self.asks_for_part(given)
        if asks and (encoded or arguments.prune is False):
            raise ValueError(
                "redundant_patches and visual_encode_mask are for pixels of a prompt that is "
                "pruned: leave them out with prune=False and with mm_encoder_outputs"
            )
        return EncodeChoice() if arguments.prune is False else self.encode_choice(given)

    def _fork(
        self, prefix: GlimpsePrefix, inputs_embeds: torch.Tensor, inputs: dict
    ) -> tuple[Cache, HeldPrompt]:
        """What a call over a prefix goes on with.

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
        check_made_by(prefix, self)
        return prefix.fork(len(inputs_embeds))

    def _check_brings_none(
        self, arguments: PruningArguments, placeholders: torch.Tensor | None
    ) -> None:
        """Refuse tokens over a prefix that speak of visuals, where none were given.

        Raises:
            ValueError: for placeholders, and for arguments that say what to encode.
        """
        if placeholders is not None and bool(placeholders.any()):
            raise ValueError(
                "the tokens behind the prefix hold placeholders, but no image or video was given "
                "for them: forward takes new tokens alone, generate and glimpse whole prompts"
            )
        if self.asks_for_part({name: getattr(arguments, name) for name in ENCODE_ARGUMENTS}):
            raise ValueError(NONE_BEHIND)

    def _positions(
        self,
        input_ids: torch.LongTensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache | None,
        inputs: dict,
        prunes: bool,
    ) -> torch.LongTensor | None:
        """Rotary positions of a prompt, or of a later turn without visuals; None is stock's way."""
        attention_mask = inputs.get("attention_mask")
        if (pruned := pruned_layer(cache)) is not None:
            return later_positions(pruned, inputs_embeds, attention_mask)
        after = positions_after_turn(cache, inputs_embeds, attention_mask)
        if after is not None:
            return after
        if position_ids is None:
            return self.own_positions(input_ids, inputs_embeds, cache, inputs, prunes)
        return position_ids

    def own_positions(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        cache: Cache | None,
        inputs: dict,
        prunes: bool,
    ) -> torch.LongTensor | None:
        """Rotary positions where the caller gives none; None is stock's way.

        Args:
            inputs: the call's other arguments.
            prunes: whether the call is a prompt that is pruned.
        """
        if self.takes_ids_beside_embeddings or not prunes:
            return None
        return prompt_positions(inputs.get("attention_mask"))

    def _check_exactly_one(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> None:
        """Refuse no tokens at all; and both forms of them, where ids say nothing more."""
        both = input_ids is not None and inputs_embeds is not None
        if (input_ids is None and inputs_embeds is None) or (
            both and not self.takes_ids_beside_embeddings
        ):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

    def _check_boundary(self, arguments: PruningArguments) -> None:
        """Refuse to train on answers that would take part in choosing the visual tokens."""
        trains = self.training and torch.is_grad_enabled()
        goes_on = not (arguments.only_glimpse or arguments.hold)
        if trains and arguments.prompt_length is None and goes_on:
            raise ValueError(
                "in training a model must be told where the answer begins, as visual tokens are "
                "chosen by the prompt alone: give prompt_length (a number, or one a row), or "
                "labels to the whole model; or train with prune=False"
            )

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

    def _prune_request(
        self,
        encoded: dict[str, VisualFeatures],
        masks: dict[str, torch.Tensor],
        arguments: PruningArguments,
        held: HeldPrompt | None,
    ) -> PruneRequest:
        """Describe the pruning of one prefill; settings that are None come from the configuration.

        Raises:
            ValueError: for a setting out of range, a keep mask that does not fit, or encoded
                visuals of another class.
        """
        config = self.config
        encoded = {kind: described(kind, encoded[kind]) for kind in encoded}
        self.check_config()
        settings = {}
        for name in CALL_SETTINGS:
            given = getattr(arguments, name)
            settings[name] = getattr(config, name) if given is None else given
            config.validate_field(name, settings[name])
        if settings["prune_layer"] is None:
            settings["prune_layer"] = config.glimpse_layer
        if held is not None:
            settings["prune_layer"] = prune_layer_over(held, arguments.prune_layer)
        tokens = collect_visual_tokens(encoded, masks) if encoded else None
        if tokens is not None and arguments.visual_keep_mask is None:
            tokens = replace(tokens, features=self.glimpse.conditions(tokens.features))
        if held is not None:
            tokens = held.all_tokens(tokens)
        keep_mask = arguments.visual_keep_mask
        if keep_mask is not None:
            validate_keep_mask(keep_mask, tokens.total)
        elif arguments.prune is False:
            keep_mask = torch.ones_like(tokens.rows, dtype=torch.bool)
        if arguments.visual_log_keep is not None:
            validate_log_keep(arguments, tokens.total)
        return PruneRequest(
            glimpse=self.glimpse,
            tokens=tokens,
            glimpse_layer=config.glimpse_layer,
            predictor_window=self.predictor_window if config.predictor_windowed else None,
            anchor_corners=config.anchor_corners,
            visual_keep_mask=keep_mask,
            visual_log_keep=arguments.visual_log_keep,
            prompt_length=arguments.prompt_length,
            in_place=arguments.in_place,
            only_glimpse=arguments.only_glimpse,
            compact_output=arguments.compact_output,
            held=held,
            hold=arguments.hold,
            **settings,
        )
