"""GlimpsePrune for Qwen3-VL: Qwen2.5-VL without windows, and with features added between layers."""

from dataclasses import dataclass

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLTextModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from .assisted_decoding import HELD  # noqa: F401
from .base_weights import located_weights  # noqa: F401
from .call_checks import check_prunable  # noqa: F401
from .choosing import SCORED_AT_ONCE  # noqa: F401
from .compaction import UNTRAINED  # noqa: F401
from .configuration_glimpseprune import GlimpsePruneQwen3VLConfig
from .decoder_call import DecoderCall  # noqa: F401
from .decoder_layers import MLP_CHUNK  # noqa: F401
from .decoder_run import DecoderRun  # noqa: F401
from .encode_choice import EncodeChoice  # noqa: F401
from .encoder_subset import subset_of
from .fingerprints import SAMPLES  # noqa: F401
from .given_visuals import GivenVisual  # noqa: F401
from .glimpse import GlimpseToken  # noqa: F401
from .glimpse_fields import GLIMPSE_FIELDS  # noqa: F401
from .glimpse_prefix import GlimpsePrefix  # noqa: F401
from .glimpse_record import VisualRecord  # noqa: F401
from .glimpse_weights import GlimpseWeightsMixin  # noqa: F401
from .held_prompt import prune_layer_over  # noqa: F401
from .importance_predictor import TokenGroup  # noqa: F401
from .later_turns import new_visuals  # noqa: F401
from .layer_additions import LayerAdditions
from .layer_outputs import spread  # noqa: F401
from .left_out import leave_out  # noqa: F401
from .look_ahead import LookAhead  # noqa: F401
from .looking import LookingMixin  # noqa: F401
from .low_rank import STALE_MAPS  # noqa: F401
from .modeling_qwen2_5_vl import QwenBackboneMixin, QwenGenerationMixin, QwenTextMixin
from .prefill import Prefill  # noqa: F401
from .prefix_file import write_parts  # noqa: F401
from .prefix_parts import PrefixOrigin  # noqa: F401
from .prefix_processing import PrefixProcessingMixin  # noqa: F401
from .prompt_layout import behind_prefix  # noqa: F401
from .prune_request import PruneRequest  # noqa: F401
from .pruned_cache import PrunedLayer  # noqa: F401
from .pruned_forward import PrunedForwardMixin  # noqa: F401
from .pruning_arguments import show_arguments, show_pruning_arguments
from .pruning_backbone import PruningModelMixin  # noqa: F401
from .pruning_generation import completion_start  # noqa: F401
from .qwen3_vl_calls import multimodal_positions, part_arguments, with_layers_shown
from .redundant_patches import telling_tokens  # noqa: F401
from .repeated_inputs import VISUAL_MASKS  # noqa: F401
from .row_boundaries import AlignedRows  # noqa: F401
from .runners import Runners  # noqa: F401
from .selection import corner_tokens  # noqa: F401
from .shared_layer import shared_cache  # noqa: F401
from .stock import BaseModelOutputWithDeepstackFeatures
from .token_block import TokenBlock  # noqa: F401
from .token_positions import TokenPositionsMixin  # noqa: F401
from .visual_encoding import VisualEncodingMixin  # noqa: F401
from .visual_features import VisualFeatures
from .visual_tokens import VisualTokens  # noqa: F401


@dataclass
class Qwen3VLVisualFeatures(VisualFeatures, BaseModelOutputWithDeepstackFeatures):
    """Output of the vision encoder, which the stock class's users know."""


class SubsetQwen3VisionEncoder(Qwen3VLVisionModel):
    """The stock encoder; on releases that derive places from the grid alone it reads them there."""

    def rot_pos_emb(self, grid_thw: torch.Tensor) -> torch.Tensor:
        """`(patches, half the head's width)` angles, as in the stock encoder."""
        subset = subset_of(grid_thw)
        if subset is None:
            return super().rot_pos_emb(grid_thw)
        return super().rot_pos_emb(subset.whole)[subset.patches]

    def fast_pos_embed_interpolate(self, grid_thw: torch.Tensor) -> torch.Tensor:
        """`(patches, width)` learned positions, interpolated as in the stock encoder."""
        subset = subset_of(grid_thw)
        if subset is None:
            return super().fast_pos_embed_interpolate(grid_thw)
        return super().fast_pos_embed_interpolate(subset.whole)[subset.patches]


class GlimpsePruneQwen3VLTextModel(QwenTextMixin, Qwen3VLTextModel):
    """The stock decoder behind the split forward."""

    forward = show_arguments(Qwen3VLTextModel.forward)(QwenTextMixin.forward)

    def stock_additions(self, additions: LayerAdditions, inputs_embeds: torch.Tensor) -> dict:
        where, what = additions.as_stock(inputs_embeds)
        return {"visual_pos_masks": where, "deepstack_visual_embeds": what}


class GlimpsePruneQwen3VLModel(QwenBackboneMixin, Qwen3VLModel):
    """The stock backbone; its vision encoder has no windows.

    Frames of a video lie apart in the prompt, with their times between them; a video is one entry
    of the record all the same, with one grid over its frames.
    """

    config_class = GlimpsePruneQwen3VLConfig
    vision_class = SubsetQwen3VisionEncoder
    text_model_class = GlimpsePruneQwen3VLTextModel
    adds_between_layers = True
    features_class = Qwen3VLVisualFeatures
    pixel_statistics = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)

    forward = show_pruning_arguments(Qwen3VLModel.forward)(
        with_layers_shown(QwenBackboneMixin.forward)
    )
    get_image_features = show_arguments(Qwen3VLModel.get_image_features)(
        QwenBackboneMixin.get_image_features
    )
    get_video_features = show_arguments(Qwen3VLModel.get_video_features)(
        QwenBackboneMixin.get_video_features
    )

    def run_encoder(self, kind: str, **inputs):
        """The stock method for videos calls the one for images, which is ours."""
        names = zip(self.visual_inputs[kind], self.visual_inputs["image"], strict=True)
        images = {of_image: inputs.pop(name) for name, of_image in names if name in inputs}
        return Qwen3VLModel.get_image_features(self, **images, **inputs)

    def tell_encoder(self, kind, subset, keep, geometry, images) -> dict:
        return part_arguments(self.visual, subset)

    def own_positions(self, input_ids, inputs_embeds, cache, inputs, prunes):
        """The stock backbone takes no ids beside embeddings, so they are derived here."""
        positions = multimodal_positions(self, input_ids, inputs_embeds, cache, inputs)
        if positions is None:
            return super().own_positions(input_ids, inputs_embeds, cache, inputs, prunes)
        return positions


class GlimpsePruneQwen3VLForConditionalGeneration(
    QwenGenerationMixin, Qwen3VLForConditionalGeneration
):
    """Qwen3-VL whose `generate` takes a glimpse and drops the visual tokens nobody asked about.

    Beside the stock arguments, `forward` and `generate` take those of `PruningArguments`.
    """

    config_class = GlimpsePruneQwen3VLConfig
    backbone_class = GlimpsePruneQwen3VLModel
    forward = show_pruning_arguments(Qwen3VLForConditionalGeneration.forward)(
        with_layers_shown(QwenGenerationMixin.forward)
    )
