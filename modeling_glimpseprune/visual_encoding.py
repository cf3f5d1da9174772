"""Encodes images and videos by the stock methods, and keeps what the predictor needs of them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .encode_choice import ENCODE_ARGUMENTS, EncodeChoice
from .glimpse import Glimpse
from .layer_additions import LayerAdditions
from .pruning_arguments import validate_mask
from .redundant_patches import telling_tokens
from .stock import AS_OUTPUT, OF_ENCODERS, encoder_fields, in_stock_form
from .visual_features import VisualFeatures, tap_outputs


class VisualEncodingMixin:
    """The part of a backbone that encodes visuals. A family says:

    Attributes:
        visual_inputs: for each kind of visual, the arguments that its encoder takes, pixels first.
        visual_notes: further arguments with one entry a visual, which its encoder does not take.
        adds_between_layers: whether encoders return something to add between decoder layers, too.
        features_class: of encoded visuals.
        pixel_statistics: mean and standard deviation, by channel, that normalise published pixels.
    """

    config: object
    glimpse: Glimpse
    visual_inputs: dict[str, tuple[str, ...]] = {}
    visual_notes: dict[str, tuple[str, ...]] = {}
    adds_between_layers = False
    features_class: type[VisualFeatures] = VisualFeatures
    pixel_statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

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
        with tap_outputs(self.tapped_modules(), self.reduce_tap) as taps:
            outputs = self.run_encoder(kind, **inputs, **AS_OUTPUT)
        pixels, *others = self.visual_inputs[kind]
        others = {name: inputs[name] for name in others if inputs.get(name) is not None}
        features = self._of_stock(outputs)
        described = self.describe_visuals(features.pooler_output, taps, **others)
        features["glimpse_views"] = described.glimpse_views
        return features

    def encode_part(
        self, kind: str, choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **inputs
    ) -> VisualFeatures:
        """As `encode_visual`, with the encoder on some of the visual tokens.

        Args:
            choose: from the pixels and the `(N, 6)` geometry (see `token_geometry`), which tokens
                to encode, `(N,)` bool.

        Raises:
            ValueError: where the family's encoder takes whole images only.
        """
        raise ValueError(f"visual_encode_mask: {type(self.config).redundancy_choice}")

    def encode_telling(
        self, kind: str, redundant_patches: float | bool | None = None, **inputs
    ) -> VisualFeatures:
        """As `encode_visual`, without redundant patches.

        Args:
            redundant_patches: as for `generate`: None is as configured, False encodes everything.
        """
        choice = self.encode_choice({"redundant_patches": redundant_patches})
        return self._encode_by(choice, None, kind, **inputs)

    def asks_for_part(self, given: dict) -> bool:
        """Whether a call's arguments ask for a part of its visuals to be encoded."""
        tolerance, mask = (given.get(name) for name in ENCODE_ARGUMENTS)
        return mask is not None or not (tolerance is None or tolerance is False)

    def encode_choice(self, given: dict) -> EncodeChoice:
        """What of a call's visuals to encode; what is not given comes from the configuration.

        Args:
            given: of `redundant_patches` and `visual_encode_mask` what the call says.
        """
        tolerance, mask = given.get("redundant_patches"), given.get("visual_encode_mask")
        tolerance = self.config.redundant_patches if tolerance is None else tolerance
        self.config.validate_field("redundant_patches", tolerance)
        return EncodeChoice(None if tolerance is False else tolerance, mask)

    def _encode_by(
        self, choice: EncodeChoice, mask: torch.Tensor | None, kind: str, **inputs
    ) -> VisualFeatures:
        """Encode visuals of a kind, or the part of them that is chosen.

        Args:
            mask: the caller's own choice for this kind, if there is one.
        """
        if mask is not None:

            def choose(pixels: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
                validate_mask(mask, len(geometry), "visual_encode_mask")
                return mask.to(geometry.device)

            return self.encode_part(kind, choose, **inputs)
        if choice.tolerance is not None:
            settings = {"tolerance": choice.tolerance, "statistics": self.pixel_statistics}
            choose = partial(telling_tokens, **settings)
            return self.encode_part(kind, choose, **inputs)
        return self.encode_visual(kind, **inputs)

    def encode_plainly(self, kind: str, **inputs) -> VisualFeatures:
        """Encode by the stock method alone; arguments as for `encode_visual`."""
        self.check_config()
        return self._of_stock(self.run_encoder(kind, **inputs, **AS_OUTPUT))

    def _of_stock(self, outputs) -> VisualFeatures:
        return self.features_class.of(encoder_fields(outputs, self.adds_between_layers))

    def run_encoder(self, kind: str, **inputs):
        """Call the stock method `get_{kind}_features`."""
        return getattr(super(), f"get_{kind}_features")(**inputs)

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

    def _encode(
        self,
        encoded: dict[str, VisualFeatures] | None,
        kwargs: dict,
        describes: bool,
        choice: EncodeChoice,
        input_ids: torch.LongTensor | None,
    ) -> dict[str, VisualFeatures]:
        """Encode what comes as pixels, which leave `kwargs`.

        Args:
            describes: whether anybody asks where visual tokens are; else the stock encoder runs.
            choice: what to encode.
            input_ids: `(batch, length)` of the tokens that bring the visuals, if known.

        Raises:
            ValueError: when visuals come both as pixels and encoded.
        """
        given = [
            kind for kind, names in self.visual_inputs.items() if kwargs.get(names[0]) is not None
        ]
        masks = choice.by_kind(given, input_ids, self.config)
        asked = self.asked_of_encoders({name: kwargs.get(name) for name in OF_ENCODERS})
        encoded, of_pixels = dict(encoded or {}), {}
        for kind, names in self.visual_inputs.items():
            inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            if kwargs.pop(names[0], None) is None:
                continue
            if describes:
                of_pixels[kind] = self._encode_by(choice, masks.get(kind), kind, **inputs, **asked)
            else:
                of_pixels[kind] = self.encode_plainly(kind, **inputs, **asked)
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

    def _layer_additions(
        self, encoded: dict[str, VisualFeatures], masks: dict[str, torch.Tensor]
    ) -> LayerAdditions | None:
        """What encoded visuals add between decoder layers, if they do."""
        if not encoded or not self.adds_between_layers:
            return None
        features = [
            [torch.cat(list(layer)) for layer in encoded[kind].deepstack_features] for kind in masks
        ]
        return LayerAdditions(list(masks.values()), features)
