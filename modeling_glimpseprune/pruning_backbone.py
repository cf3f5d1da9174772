"""The backbone: encodes images and videos, and turns a call into a `PruneRequest`."""

from dataclasses import replace

import torch
from transformers.cache_utils import Cache

from .call_checks import (
    check_boundary,
    check_brings_none,
    check_form,
    check_over_prefix,
    check_whole,
)
from .encode_choice import ENCODE_ARGUMENTS, EncodeChoice
from .given_visuals import GivenVisualsMixin
from .glimpse import Glimpse
from .glimpse_prefix import GlimpsePrefix
from .glimpse_weights import GlimpseWeightsMixin
from .held_prompt import HeldPrompt, prune_layer_over
from .later_turns import (
    note_placeholders,
    past_length,
)
from .prune_request import PruneRequest
from .pruning_arguments import (
    CALL_SETTINGS,
    PruningArguments,
    validate_keep_mask,
    validate_log_keep,
)
from .stock import add_encoded, backbone_names, cache_of, given_cache, take_cache
from .token_positions import TokenPositionsMixin
from .visual_encoding import VisualEncodingMixin
from .visual_features import VisualFeatures, described, refuse_parts
from .visual_tokens import collect_visual_tokens


class PruningModelMixin(
    TokenPositionsMixin, VisualEncodingMixin, GivenVisualsMixin, GlimpseWeightsMixin
):
    """Backbone (vision encoder and text model) that turns a call into a `PruneRequest`.

    A family builds `glimpse` and a `language_model` with `PrunedForwardMixin` in front, and says
    what the mixins ask, and:

    Attributes:
        predictor_window: side of the vision encoder's attention windows in tokens, if it has any.
    """

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
        check_form(input_ids, inputs_embeds, self.takes_ids_beside_embeddings)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if arguments.prune is False:
            check_whole(cache)
        held = None
        if isinstance(cache, GlimpsePrefix):
            check_over_prefix(cache, self, inputs_embeds, kwargs)
            cache, held = cache.fork(len(inputs_embeds), arguments.in_place)
        describes = arguments.prune is not False or past_length(cache) > 0
        choice = self._encode_choice(arguments, mm_encoder_outputs)
        encoded = self._encode(mm_encoder_outputs, kwargs, describes, choice, input_ids)
        masks = self._placeholder_masks(input_ids, inputs_embeds, encoded)
        inputs_embeds = self._merge(inputs_embeds, encoded, masks)
        request = None
        if held is not None or (encoded and arguments.prune is not False):
            check_boundary(self, arguments)
            request = self._prune_request(encoded, masks, arguments, held)
        elif arguments.hold:
            raise ValueError("this prompt has no image or video to look at")
        has_visuals, is_fresh = bool(encoded), not past_length(cache)
        placeholders = self.placeholders(input_ids, masks)
        if held is not None and not encoded:
            check_brings_none(self.asks_for_part(_of_encoder(arguments)), placeholders)
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
        given = _of_encoder(arguments)
        if arguments.prune is False:
            refuse_parts(encoded or {})
        asks = self.asks_for_part(given)
        if asks and (encoded or arguments.prune is False):
            raise ValueError(
                "redundant_patches and visual_encode_mask are for pixels of a prompt that is "
                "pruned: leave them out with prune=False and with mm_encoder_outputs"
            )
        return EncodeChoice() if arguments.prune is False else self.encode_choice(given)

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


def _of_encoder(arguments: PruningArguments) -> dict:
    """The arguments that say what to encode."""
    return {name: getattr(arguments, name) for name in ENCODE_ARGUMENTS}
