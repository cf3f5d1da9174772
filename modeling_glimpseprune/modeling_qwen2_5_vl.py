"""GlimpsePrune for Qwen2.5-VL: the stock model, whose prefill drops visual tokens.

Qwen3-VL builds on the classes here that state both.

transformers 4 loads no more of a local folder than what this file imports by itself, so it also
names siblings that only other siblings use.
"""

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)

from .assisted_decoding import HELD  # noqa: F401
from .base_weights import located_weights  # noqa: F401
from .call_checks import check_covered  # noqa: F401
from .choosing import SCORED_AT_ONCE  # noqa: F401
from .compaction import seal  # noqa: F401
from .configuration_glimpseprune import GlimpsePruneQwen2_5_VLConfig
from .decoder_call import DecoderCall  # noqa: F401
from .decoder_layers import run_layer  # noqa: F401
from .decoder_run import DecoderRun  # noqa: F401
from .encode_choice import EncodeChoice  # noqa: F401
from .encoder_subset import EncoderSubset, SubsetVisionEncoder, at_places
from .fingerprints import fingerprint  # noqa: F401
from .given_visuals import GivenVisualsMixin  # noqa: F401
from .glimpse import Glimpse
from .glimpse_fields import FIELDS  # noqa: F401
from .glimpse_prefix import GlimpsePrefix  # noqa: F401
from .glimpse_record import GlimpseRecord  # noqa: F401
from .glimpse_weights import GlimpseWeightsMixin  # noqa: F401
from .held_prompt import HeldPrompt  # noqa: F401
from .importance_predictor import VisualImportancePredictor  # noqa: F401
from .later_turns import first_positions, follows_turn, note_turn, past_length
from .layer_additions import LayerAdditions  # noqa: F401
from .layer_outputs import spread  # noqa: F401
from .left_out import leave_out  # noqa: F401
from .look_ahead import LookAhead  # noqa: F401
from .looking import LookingMixin  # noqa: F401
from .low_rank import low_rank_additions  # noqa: F401
from .prefill import Prefill  # noqa: F401
from .prefix_file import read_parts  # noqa: F401
from .prefix_parts import to_parts  # noqa: F401
from .prefix_processing import PrefixProcessingMixin  # noqa: F401
from .prompt_layout import behind_prefix  # noqa: F401
from .prune_request import PruneRequest  # noqa: F401
from .pruned_cache import pruned_layer
from .pruned_forward import PrunedForwardMixin
from .pruning_arguments import show_arguments, show_pruning_arguments
from .pruning_backbone import PruningModelMixin
from .pruning_generation import PruningGenerationMixin
from .redundant_patches import telling_tokens  # noqa: F401
from .repeated_inputs import RepeatedInputsMixin  # noqa: F401
from .row_boundaries import IGNORED_LABEL  # noqa: F401
from .runners import Runners  # noqa: F401
from .selection import select_visual_tokens  # noqa: F401
from .shared_layer import SharedLayer  # noqa: F401
from .stock import AS_OUTPUT, cache_of, encoder_fields, subset_arguments, token_types
from .token_block import TokenBlock  # noqa: F401
from .token_positions import TokenPositionsMixin  # noqa: F401
from .visual_encoding import VisualEncodingMixin  # noqa: F401
from .visual_features import VisualFeatures, tap_outputs, token_geometry, whole_images
from .visual_tokens import VisualTokens  # noqa: F401


class QwenTextMixin(PrunedForwardMixin):
    """In front of Qwen's text models, whose rotary positions have three axes."""

    def rotary_position_ids(
        self, position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, past_length: int
    ) -> torch.Tensor:
        """`(3, batch, length)`; `generate` puts plain text positions in front of the three."""
        position_ids = super().rotary_position_ids(position_ids, inputs_embeds, past_length)
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        return position_ids[-3:]


class GlimpsePruneQwen2_5_VLTextModel(QwenTextMixin, Qwen2_5_VLTextModel):
    """The stock decoder behind the split forward."""

    forward = show_arguments(Qwen2_5_VLTextModel.forward)(QwenTextMixin.forward)


class QwenBackboneMixin(PruningModelMixin):
    """Qwen's vision encoder and a decoder; what its backbones share.

    Every placeholder is a visual token. A token's features are averaged over its patches, and its
    2-D position is its row and column in the grid of merged patches, frame by frame.

    Attributes:
        vision_class, text_model_class: the encoder and the decoder.
    """

    vision_class: type[PreTrainedModel]
    text_model_class: type[PreTrainedModel]
    _checkpoint_conversion_mapping = {}
    visual_inputs = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    positions_from_ids = True

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.visual = self.vision_class._from_config(config.vision_config)
        self.language_model = self.text_model_class._from_config(config.text_config)
        self.glimpse = Glimpse(config, config.vision_config.hidden_size)
        self.rope_deltas = None  # the stock model's; a pruned cache carries its own
        self.post_init()

    def tapped_modules(self) -> list:
        return [self.visual.blocks[layer] for layer in self.config.vision_layers]

    def reduce_tap(self, output: torch.Tensor) -> torch.Tensor:
        """Averages over the patches of each token: `(N * patches, width)` to `(N, width)`."""
        return output.unflatten(0, (-1, self.visual.spatial_merge_size**2)).mean(dim=1)

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        """As `get_image_features`, for videos."""
        inputs = {"pixel_values_videos": pixel_values_videos, "video_grid_thw": video_grid_thw}
        return self.stock_features("video", inputs | kwargs)

    def visual_sizes(self, kind: str, **inputs) -> list[int]:
        merged = self.visual.spatial_merge_size**2
        return [patches // merged for patches in self.pixel_rows(kind, **inputs)]

    def pixel_rows(self, kind: str, **inputs) -> list[int]:
        return inputs[f"{kind}_grid_thw"].prod(-1).tolist()

    def turn_positions(self, input_ids, position_ids, inputs_embeds, cache, encoded, inputs):
        """`(3, batch, new tokens)`: the stock positions of the new tokens, moved behind the cache.

        Without ids, and where the caller gives all three axes, as the stock model.
        """
        if input_ids is None or (position_ids is not None and position_ids.ndim == 3):
            return super().turn_positions(
                input_ids, position_ids, inputs_embeds, cache, encoded, inputs
            )
        attention_mask, arguments = inputs.get("attention_mask"), {}
        if attention_mask is not None:
            past = past_length(cache)
            arguments["attention_mask"] = attention_mask[:, past : past + input_ids.shape[1]]
        for kind, features in encoded.items():
            first = torch.stack([views[0].grid for views in features.glimpse_views])
            merge = self.visual.spatial_merge_size
            arguments[f"{kind}_grid_thw"] = first * first.new_tensor([1, merge, merge])
        arguments |= token_types(*(input_ids == token for token in self.visual_token_ids.tolist()))
        arguments |= {name: inputs.get(name) for name in self.visual_notes.get("video", ())}
        positions, _ = self.get_rope_index(input_ids, **arguments)
        positions = positions + first_positions(cache, attention_mask)
        if pruned_layer(cache) is None:
            note_turn(cache, positions, attention_mask)
        return positions

    def note_positions(self, outputs) -> None:
        cache = cache_of(outputs)
        if cache is not None and not follows_turn(cache):
            cache.rope_deltas = self.rope_deltas

    def describe_visuals(
        self,
        embeddings: list[torch.Tensor],
        taps: list[torch.Tensor],
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> VisualFeatures:
        """Grids are `(images, 3)` frames, height and width in patches."""
        grids = video_grid_thw if image_grid_thw is None else image_grid_thw
        sizes = [len(of_image) for of_image in embeddings]
        merge = self.visual.spatial_merge_size
        scale = torch.tensor([1, merge, merge], device=grids.device)
        grids = grids // scale
        geometry = token_geometry(grids, sizes).to(taps[0].device)
        return whole_images(
            embeddings, self.in_raster_order(taps, geometry, sizes), geometry, grids
        )

    def encode_part(self, kind, choose, **inputs) -> VisualFeatures:
        """As `PruningModelMixin.encode_part`; the stock encoder runs over the part alone."""
        pixels_name, grid_name = self.visual_inputs[kind]
        pixels, merge = inputs[pixels_name], self.visual.spatial_merge_size
        whole = inputs[grid_name].to(pixels.device)
        grids = inputs[grid_name] // inputs[grid_name].new_tensor([1, merge, merge])
        sizes = grids.prod(-1).tolist()
        geometry = token_geometry(grids, sizes).to(pixels.device)
        keep = choose(pixels, geometry)
        if bool(keep.all()):
            return self.encode_visual(kind, **inputs)
        images = image_numbers(sizes, geometry.device)
        check_every_frame(keep, geometry, images)
        subset = EncoderSubset.of_tokens(keep, geometry, images, whole, merge)
        told = self.tell_encoder(kind, subset, keep, geometry, images)
        part = {pixels_name: pixels[subset.patches], grid_name: subset.grid_for(told)}
        with tap_outputs(self.tapped_modules(), self.reduce_tap) as taps:
            outputs = self.run_encoder(kind, **(inputs | told | part), **AS_OUTPUT)
        fields = encoder_fields(outputs, self.adds_between_layers)
        places = keep.nonzero()[:, 0]
        order = slice(None) if subset.window_index is None else subset.window_index
        layers = [at_places(tap, places[order], len(keep)) for tap in taps]
        embeddings, *added = (
            at_places(torch.cat(list(layer)), places, len(keep)).split(sizes)
            for layer in (fields["pooler_output"], *(fields.get("deepstack_features") or ()))
        )
        described = whole_images(embeddings, layers, geometry, grids, encoded=keep)
        found = {"pooler_output": embeddings, "deepstack_features": added or None}
        found["glimpse_views"] = described.glimpse_views
        return self.features_class.of({k: v for k, v in found.items() if v is not None})

    def tell_encoder(
        self,
        kind: str,
        subset: EncoderSubset,
        keep: torch.Tensor,
        geometry: torch.Tensor,
        images: torch.Tensor,
    ) -> dict:
        """Arguments of the stock method that say where the tokens of a subset are.

        None on releases whose encoder asks its own methods.

        Args:
            keep: `(N,)` bool.
            geometry: `(N, 6)`, see `token_geometry`.
            images: `(N,)` number of each token's image.
        """
        raise NotImplementedError

    def in_raster_order(
        self, taps: list[torch.Tensor], geometry: torch.Tensor, sizes: list[int]
    ) -> list[torch.Tensor]:
        """Tapped features `(N, width)` row after row of each frame, from the encoder's order.

        Args:
            geometry: `(N, 6)`, see `token_geometry`.
            sizes: tokens of each image.
        """
        return taps


class GlimpsePruneQwen2_5_VLModel(QwenBackboneMixin, Qwen2_5_VLModel):
    """The stock backbone; its vision encoder attends within windows."""

    config_class = GlimpsePruneQwen2_5_VLConfig
    vision_class = SubsetVisionEncoder
    text_model_class = GlimpsePruneQwen2_5_VLTextModel
    visual_notes = {"video": ("second_per_grid_ts",)}
    takes_ids_beside_embeddings = True

    forward = show_pruning_arguments(Qwen2_5_VLModel.forward)(QwenBackboneMixin.forward)
    get_image_features = show_arguments(Qwen2_5_VLModel.get_image_features)(
        QwenBackboneMixin.get_image_features
    )
    get_video_features = show_arguments(Qwen2_5_VLModel.get_video_features)(
        QwenBackboneMixin.get_video_features
    )

    @property
    def predictor_window(self) -> int:
        vision = self.config.vision_config
        return vision.window_size // vision.spatial_merge_size // vision.patch_size

    def in_raster_order(
        self, taps: list[torch.Tensor], geometry: torch.Tensor, sizes: list[int]
    ) -> list[torch.Tensor]:
        order = window_order(geometry, sizes, self.predictor_window)
        return [torch.empty_like(tap).index_copy(0, order, tap) for tap in taps]

    def tell_encoder(self, kind, subset, keep, geometry, images) -> dict:
        windows = window_numbers(geometry, images, self.predictor_window)
        subset.into_windows(keep, windows)
        names = ("position_ids", "window_index", "cu_window_seqlens")
        return subset_arguments(kind, {name: getattr(subset, name) for name in names})


class QwenGenerationMixin(PruningGenerationMixin):
    """What Qwen's models share."""

    _checkpoint_conversion_mapping = {}

    @property
    def undrafted_ids(self) -> list[int]:
        """Also what opens an image: behind it transformers 4 expects a placeholder."""
        return [*super().undrafted_ids, self.config.vision_start_token_id]


class GlimpsePruneQwen2_5_VLForConditionalGeneration(
    QwenGenerationMixin, Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL whose `generate` takes a glimpse and drops the visual tokens nobody asked about.

    Beside the stock arguments, `forward` and `generate` take those of `PruningArguments`.
    """

    config_class = GlimpsePruneQwen2_5_VLConfig
    backbone_class = GlimpsePruneQwen2_5_VLModel
    forward = show_pruning_arguments(Qwen2_5_VLForConditionalGeneration.forward)(
        QwenGenerationMixin.forward
    )


def image_numbers(sizes: list[int], device: torch.device) -> torch.Tensor:
    """`(N,)` number of each token's image."""
    repeats = torch.tensor(sizes, device=device)
    images = torch.arange(len(sizes), device=device)
    return images.repeat_interleave(repeats, output_size=sum(sizes))


def window_numbers(geometry: torch.Tensor, images: torch.Tensor, window: int) -> torch.Tensor:
    """A number for each token's attention window, ascending in the order of the vision encoder.

    Args:
        geometry: `(N, 6)`, see `token_geometry`.
        images: `(N,)` number of each token's image.
        window: side of a window in tokens.
    """
    frame, row, column, _, height, width = geometry.unbind(1)
    down, across = (height + window - 1) // window, (width + window - 1) // window
    within_image = (frame * down + row // window) * across + column // window
    return images * (len(geometry) + 1) + within_image


def window_order(geometry: torch.Tensor, sizes: list[int], window: int) -> torch.Tensor:
    """The order in which the vision encoder keeps tokens: window after window of each frame.

    Args:
        geometry: `(N, 6)`, see `token_geometry`.
        sizes: tokens of each image.
        window: side of a window in tokens.

    Returns:
        `(N,)` raster index of the token at each place of the encoder's sequence.
    """
    images = image_numbers(sizes, geometry.device)
    return window_numbers(geometry, images, window).argsort(stable=True)


def check_every_frame(keep: torch.Tensor, geometry: torch.Tensor, images: torch.Tensor) -> None:
    """Refuse to leave an image, or a frame of a video, without a token.

    Raises:
        ValueError: naming the first.
    """
    frames, of_token = torch.stack([images, geometry[:, 0]], 1).unique(dim=0, return_inverse=True)
    counts = keep.new_zeros(len(frames), dtype=torch.long).index_add_(0, of_token, keep.long())
    if not bool(counts.all()):
        image, frame = frames[counts == 0][0].tolist()
        raise ValueError(
            f"visual_encode_mask leaves frame {frame} of visual {image} without a token: let one "
            "stay at least"
        )
