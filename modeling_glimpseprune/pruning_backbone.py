"""The backbone: encodes images and videos, and turns a call into a `PruneRequest`."""

from dataclasses import replace
from itertools import compress

import torch
from torch import nn
from transformers.cache_utils import Cache

from .glimpse import Glimpse
from .glimpse_weights import GlimpseWeightsMixin
from .later_turns import (
    later_positions,
    new_visuals,
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
from .stock import (
    AS_OUTPUT,
    OF_ENCODERS,
    add_encoded,
    backbone_names,
    embeddings_of,
    encoder_fields,
    given_cache,
    in_stock_form,
    take_cache,
)
from .visual_features import VisualFeatures, described, tap_outputs
from .visual_tokens import collect_visual_tokens


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
            outputs = encode(**inputs, **AS_OUTPUT)
        pixels, *others = self.visual_inputs[kind]
        others = {name: inputs[name] for name in others if inputs.get(name) is not None}
        features = self.describe_visuals(embeddings_of(outputs), taps, **others)
        return replace(features, **encoder_fields(outputs))

    def encode_plainly(self, kind: str, **inputs) -> VisualFeatures:
        """Encode by the stock method alone; arguments as for `encode_visual`."""
        self.check_config()
        outputs = getattr(super(), f"get_{kind}_features")(**inputs, **AS_OUTPUT)
        return VisualFeatures(pooler_output=embeddings_of(outputs), **encoder_fields(outputs))

    def asked_of_encoders(self, asked: dict) -> dict:
        """What a call asks to see of layers, as far as the stock backbone hands it to encoders."""
        return {name: value for name, value in asked.items() if value is not None}

    def get_image_features(self, **inputs):
        """The stock features; on transformers 5 with what the predictor needs beside them."""
        return self.stock_features("image", inputs)

    def stock_features(self, kind: str, inputs: dict):
        """What the stock method `get_{kind}_features` returns, in the form the caller wants."""
        return_dict = inputs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return in_stock_form(self.encode_visual(kind, **inputs), return_dict)

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
        describes = arguments.prune is not False or past_length(cache) > 0
        encoded = self._encode(mm_encoder_outputs, kwargs, describes)
        masks = self._placeholder_masks(input_ids, inputs_embeds, encoded)
        inputs_embeds = self._merge(inputs_embeds, encoded, masks)
        request = None
        if encoded and arguments.prune is not False:
            self._check_boundary(arguments)
            request = self._prune_request(encoded, masks, arguments)
        has_visuals = bool(encoded)
        if has_visuals and past_length(cache):
            position_ids = self.turn_positions(
                input_ids, position_ids, inputs_embeds, cache, encoded, kwargs
            )
        elif (pruned := pruned_layer(cache)) is not None:
            position_ids = later_positions(pruned, inputs_embeds, kwargs.get("attention_mask"))
        elif (
            after := positions_after_turn(cache, inputs_embeds, kwargs.get("attention_mask"))
        ) is not None:
            position_ids = after
        elif request is not None and position_ids is None and not self.positions_from_ids:
            position_ids = prompt_positions(kwargs.get("attention_mask"))
        if request is not None:  # a long prefill can use the memory
            encoded = {
                kind: replace(features, glimpse_views=None) for kind, features in encoded.items()
            }
        del masks
        outputs = super().forward(
            input_ids=input_ids if self.positions_from_ids else None,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            prune_request=request,
            return_dict=True,
            **given_cache(cache),
            **kwargs,
        )
        if has_visuals and request is None:
            self.note_positions(outputs)
        add_encoded(outputs, encoded)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _check_exactly_one(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> None:
        """Refuse no tokens at all; and both forms of them, where ids say nothing more."""
        both = input_ids is not None and inputs_embeds is not None
        if (input_ids is None and inputs_embeds is None) or (both and not self.positions_from_ids):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

    def _check_boundary(self, arguments: PruningArguments) -> None:
        """Refuse to train on answers that would take part in choosing the visual tokens."""
        trains = self.training and torch.is_grad_enabled()
        if trains and arguments.prompt_length is None and not arguments.only_glimpse:
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
        self, encoded: dict[str, VisualFeatures] | None, kwargs: dict, describes: bool
    ) -> dict[str, VisualFeatures]:
        """Encode what comes as pixels, which leave `kwargs`.

        Args:
            describes: whether anybody asks where visual tokens are; else the stock encoder runs.

        Raises:
            ValueError: when visuals come both as pixels and encoded.
        """
        encode = self.encode_visual if describes else self.encode_plainly
        asked = self.asked_of_encoders({name: kwargs.get(name) for name in OF_ENCODERS})
        encoded, of_pixels = dict(encoded or {}), {}
        for kind, names in self.visual_inputs.items():
            inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            if kwargs.pop(names[0], None) is not None:
                of_pixels[kind] = encode(kind, **inputs, **asked)
        if encoded and of_pixels:
            raise ValueError("give mm_encoder_outputs or pixels, not both")
        return encoded or of_pixels

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
