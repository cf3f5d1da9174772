"""GlimpsePrune for LLaVA: the stock model, whose prefill drops visual tokens.

The vision tower is CLIP's, whose block outputs condition the predictor without their class token;
the decoder is Llama's or Mistral's. LLaVA-NeXT builds on the classes here that state both.
"""

import torch
from torch import nn
from transformers import (
    AutoModel,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    MistralModel,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .assisted_decoding import AssistedDecodingMixin  # noqa: F401
from .base_weights import located_weights  # noqa: F401
from .call_checks import check_boundary  # noqa: F401
from .choosing import choose  # noqa: F401
from .compaction import compact  # noqa: F401
from .configuration_glimpseprune import GlimpsePruneLlavaConfig
from .decoder_call import DecoderCall  # noqa: F401
from .decoder_layers import run_layer  # noqa: F401
from .decoder_run import DecoderRun  # noqa: F401
from .encode_choice import EncodeChoice  # noqa: F401
from .encoder_subset import EncoderSubset  # noqa: F401
from .fingerprints import pixels_hash  # noqa: F401
from .given_visuals import GivenVisual  # noqa: F401
from .glimpse import Glimpse
from .glimpse_fields import FIELDS  # noqa: F401
from .glimpse_prefix import check_made_by  # noqa: F401
from .glimpse_record import VisualRecord  # noqa: F401
from .glimpse_weights import GlimpseWeightsMixin  # noqa: F401
from .held_prompt import prune_layer_over  # noqa: F401
from .importance_predictor import VisualImportancePredictor  # noqa: F401
from .later_turns import past_length  # noqa: F401
from .layer_additions import LayerAdditions  # noqa: F401
from .layer_outputs import LayerOutputs  # noqa: F401
from .left_out import leave_out  # noqa: F401
from .look_ahead import LookAhead  # noqa: F401
from .looking import LookingMixin  # noqa: F401
from .low_rank import ATTENTION_MAPS  # noqa: F401
from .prefill import Prefill  # noqa: F401
from .prefix_file import write_parts  # noqa: F401
from .prefix_parts import of_parts  # noqa: F401
from .prompt_layout import padded_left  # noqa: F401
from .prune_request import PruneRequest  # noqa: F401
from .pruned_cache import slot_mask  # noqa: F401
from .pruned_forward import PrunedForwardMixin
from .pruning_arguments import show_arguments, show_pruning_arguments
from .pruning_backbone import PruningModelMixin
from .pruning_generation import PruningGenerationMixin
from .redundant_patches import GREY_LEVELS  # noqa: F401
from .repeated_inputs import RepeatedInputsMixin  # noqa: F401
from .row_boundaries import AlignedRows  # noqa: F401
from .runners import Runners  # noqa: F401
from .selection import corner_tokens  # noqa: F401
from .shared_layer import shared_cache  # noqa: F401
from .stock import clip_transformer
from .token_block import TokenBlock  # noqa: F401
from .token_positions import TokenPositionsMixin  # noqa: F401
from .visual_encoding import VisualEncodingMixin  # noqa: F401
from .visual_features import VisualFeatures, token_geometry, whole_images
from .visual_tokens import VisualTokens  # noqa: F401

# transformers 4 names the tower's weights as published, transformers 5 without `vision_model`.
TOWER_NAMES = {"^model.vision_tower.(?!vision_model)": "model.vision_tower.vision_model."}


class GlimpsePruneLlamaModel(PrunedForwardMixin, LlamaModel):
    """The stock Llama decoder behind the split forward."""

    forward = show_arguments(LlamaModel.forward)(PrunedForwardMixin.forward)


class GlimpsePruneMistralModel(PrunedForwardMixin, MistralModel):
    """The stock Mistral decoder behind the split forward."""

    forward = show_arguments(MistralModel.forward)(PrunedForwardMixin.forward)


TEXT_MODELS = {"llama": GlimpsePruneLlamaModel, "mistral": GlimpsePruneMistralModel}


class ClipBackboneMixin(PruningModelMixin):
    """CLIP's tower, a projector and a decoder: what LLaVA's backbones share.

    Attributes:
        projector_class: the stock module between tower and decoder.
    """

    projector_class: type[nn.Module]
    _checkpoint_conversion_mapping = TOWER_NAMES

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = self.projector_class(config)
        text_model_class = TEXT_MODELS[config.text_config.model_type]
        self.language_model = text_model_class._from_config(config.text_config)
        self.glimpse = Glimpse(config, config.vision_config.hidden_size)
        self.add_own_weights()
        self.post_init()

    def add_own_weights(self) -> None:
        """Build what only one family has."""

    @property
    def side(self) -> int:
        """Patches on each side of what the tower sees at once."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def tapped_modules(self) -> list[nn.Module]:
        """The modules that return the hidden states `vision_layers`."""
        tower = clip_transformer(self.vision_tower)
        modules = [tower.pre_layrnorm, *tower.encoder.layers]
        return [modules[layer] for layer in self.config.vision_layers]

    def image_rows(self, input_ids: torch.LongTensor, **inputs) -> list[list[int]]:
        """Visual tokens of each image, row by row; arguments as for `visual_counts`."""
        raise NotImplementedError

    def visual_counts(self, input_ids: torch.LongTensor, **inputs) -> list[int]:
        return [sum(images) for images in self.image_rows(input_ids, **inputs)]


class ClipGenerationMixin(PruningGenerationMixin):
    """What LLaVA's models share."""

    _checkpoint_conversion_mapping = TOWER_NAMES


class GlimpsePruneLlavaModel(ClipBackboneMixin, LlavaModel):
    """The stock backbone; every patch of an image is a visual token.

    A token's 2-D position is its row and column among the patches of the tower's square input. With
    `vision_feature_select_strategy="full"` the class token stands in front of each image's patches;
    it is not scored and never dropped.
    """

    config_class = GlimpsePruneLlavaConfig
    projector_class = LlavaMultiModalProjector
    visual_inputs = {
        "image": ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
    }

    forward = show_pruning_arguments(LlavaModel.forward)(PruningModelMixin.forward)
    get_image_features = show_arguments(LlavaModel.get_image_features)(
        PruningModelMixin.get_image_features
    )

    def asked_of_encoders(self, asked: dict) -> dict:
        """Not single layers: those that the projector reads would be missing."""
        return {name: value for name, value in asked.items() if isinstance(value, bool)}

    def describe_visuals(
        self, embeddings: list[torch.Tensor], taps: list[torch.Tensor], **inputs
    ) -> VisualFeatures:
        count = self.side**2
        grids = torch.tensor([[1, self.side, self.side]] * len(embeddings), device=taps[0].device)
        geometry = token_geometry(grids, [count] * len(embeddings))
        layers = [tap[:, -count:].flatten(0, 1) for tap in taps]  # (images * count, width)
        return whole_images(embeddings, layers, geometry, grids, skipped=len(embeddings[0]) - count)

    def image_rows(self, input_ids: torch.LongTensor, **inputs) -> list[list[int]]:
        taken = self._placeholders(inputs)
        totals = PruningModelMixin.visual_counts(self, input_ids)
        return [[self.side**2] * (total // taken) for total in totals]

    def visual_sizes(self, kind: str, **inputs) -> list[int]:
        return [self._placeholders(inputs)] * len(inputs["pixel_values"])

    def _placeholders(self, inputs: dict) -> int:
        """Placeholders of an image."""
        strategy = inputs.get("vision_feature_select_strategy")
        strategy = strategy or self.config.vision_feature_select_strategy
        return self.side**2 + (strategy == "full")


class GlimpsePruneLlavaForConditionalGeneration(ClipGenerationMixin, LlavaForConditionalGeneration):
    """LLaVA whose `generate` takes a glimpse and drops the visual tokens nobody asked about.

    Beside the stock arguments, `forward` and `generate` take those of `PruningArguments`.
    """

    config_class = GlimpsePruneLlavaConfig
    backbone_class = GlimpsePruneLlavaModel
    forward = show_pruning_arguments(LlavaForConditionalGeneration.forward)(
        ClipGenerationMixin.forward
    )
