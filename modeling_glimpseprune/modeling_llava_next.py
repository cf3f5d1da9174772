"""GlimpsePrune for LLaVA-NeXT: LLaVA with images of any resolution, cut into tiles."""

import math

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextMultiModalProjector,
    get_anyres_image_grid_shape,
    unpad_image,
)

from .assisted_decoding import AssistedDecodingMixin  # noqa: F401
from .base_weights import located_weights  # noqa: F401
from .call_checks import check_form  # noqa: F401
from .choosing import choose  # noqa: F401
from .compaction import kept_counts  # noqa: F401
from .configuration_glimpseprune import GlimpsePruneLlavaNextConfig
from .decoder_call import DecoderCall  # noqa: F401
from .decoder_layers import run_layer  # noqa: F401
from .decoder_run import DecoderRun  # noqa: F401
from .encode_choice import ENCODE_ARGUMENTS  # noqa: F401
from .encoder_subset import SubsetVisionEncoder  # noqa: F401
from .fingerprints import SAMPLES  # noqa: F401
from .given_visuals import GivenVisualsMixin  # noqa: F401
from .glimpse import Glimpse  # noqa: F401
from .glimpse_fields import FIELDS  # noqa: F401
from .glimpse_prefix import check_made_by  # noqa: F401
from .glimpse_record import GlimpseRecord  # noqa: F401
from .glimpse_weights import GlimpseWeightsMixin  # noqa: F401
from .held_prompt import HeldPrompt  # noqa: F401
from .importance_predictor import VisualImportancePredictor  # noqa: F401
from .later_turns import new_visuals  # noqa: F401
from .layer_additions import LayerAdditions  # noqa: F401
from .layer_outputs import LayerOutputs  # noqa: F401
from .left_out import ENDS_UNSEEN  # noqa: F401
from .look_ahead import LookAhead  # noqa: F401
from .looking import LookingMixin  # noqa: F401
from .low_rank import LowRankAddition  # noqa: F401
from .modeling_llava import ClipBackboneMixin, ClipGenerationMixin
from .prefill import Prefill  # noqa: F401
from .prefix_file import FORMAT  # noqa: F401
from .prefix_parts import PrefixOrigin  # noqa: F401
from .prompt_layout import padded_left  # noqa: F401
from .prune_request import PruneRequest  # noqa: F401
from .pruned_cache import PrunedLayer  # noqa: F401
from .pruned_forward import PrunedForwardMixin  # noqa: F401
from .pruning_arguments import show_arguments, show_pruning_arguments
from .pruning_backbone import PruningModelMixin
from .pruning_generation import completion_start  # noqa: F401
from .redundant_patches import CHANNELS  # noqa: F401
from .repeated_inputs import ENCODED  # noqa: F401
from .row_boundaries import first_labelled  # noqa: F401
from .runners import Runners  # noqa: F401
from .selection import select_visual_tokens  # noqa: F401
from .shared_layer import SharedLayer  # noqa: F401
from .stock import given_cache  # noqa: F401
from .token_block import TokenBlock  # noqa: F401
from .token_positions import TokenPositionsMixin  # noqa: F401
from .visual_encoding import VisualEncodingMixin  # noqa: F401
from .visual_features import ImageView, VisualFeatures, token_geometry
from .visual_tokens import VisualTokens  # noqa: F401


class GlimpsePruneLlavaNextModel(ClipBackboneMixin, LlavaNextModel):
    """The stock backbone, whose images come in two views with visual tokens of their own.

    An image's placeholders are the patches of the base view (the whole image, squeezed into the
    tower's square input), then the rows of the high-resolution grid (its tiles put together and
    unpadded), each row followed by a newline token.

    - Scored, and dropped if unimportant: the patches of the base view and those of the grid. The
      selection counts both together; the predictor attends within each view by itself.
    - Always kept: the newline tokens. They show no part of the image, so they are no visual tokens:
      keep masks, records and retention leave them out, as they do the prompt's text.
    - 2-D positions: row and column in the token's own view, from 0.

    Records hold two entries an image, of the kinds `"base_view"` and `"image"`, in this order. Of a
    very long and narrow image no column (or row) of patches is left in the grid, which then has no
    tokens; the newline tokens of its rows stay.
    """

    config_class = GlimpsePruneLlavaNextConfig
    projector_class = LlavaNextMultiModalProjector
    visual_inputs = {
        "image": (
            "pixel_values",
            "image_sizes",
            "vision_feature_layer",
            "vision_feature_select_strategy",
        )
    }

    forward = show_pruning_arguments(LlavaNextModel.forward)(PruningModelMixin.forward)
    get_image_features = show_arguments(LlavaNextModel.get_image_features)(
        PruningModelMixin.get_image_features
    )

    def asked_of_encoders(self, asked: dict) -> dict:
        return {}

    def add_own_weights(self) -> None:
        hidden_size = self.config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(hidden_size) / math.sqrt(hidden_size))

    def describe_visuals(
        self,
        embeddings: list[torch.Tensor],
        taps: list[torch.Tensor],
        image_sizes: torch.Tensor,
        **inputs,
    ) -> VisualFeatures:
        shapes = [self._tile_shape(size) for size in image_sizes]
        tiles = [1 + down * across for down, across in shapes]
        patches = [tap[:, -(self.side**2) :].split(tiles) for tap in taps]  # (tiles, count, width)
        of_images = zip(*patches, strict=True)
        views = [
            self._views(list(layers), size, shape)
            for layers, size, shape in zip(of_images, image_sizes, shapes, strict=True)
        ]
        return VisualFeatures(pooler_output=embeddings, glimpse_views=views)

    def _views(
        self, layers: list[torch.Tensor], image_size: torch.Tensor, shape: tuple[int, int]
    ) -> list[ImageView]:
        """The base view and the high-resolution grid, from each layer's `(tiles, count, width)`."""
        maps = [self._put_together(layer[1:], image_size, shape) for layer in layers]
        rows, columns = maps[0].shape[1:]
        device, count = layers[0].device, self.side**2
        return [
            ImageView(
                [layer[0] for layer in layers],
                *_geometry(self.side, self.side, device),
                torch.arange(count, device=device),
                "base_view",
            ),
            ImageView(
                [each.flatten(1).T for each in maps],
                *_geometry(rows, columns, device),
                self._grid_places(rows, columns, device),
                "image",
            ),
        ]

    def _tile_shape(self, image_size: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of tiles that an image is cut into."""
        tile = self.config.vision_config.image_size
        return get_anyres_image_grid_shape(image_size, self.config.image_grid_pinpoints, tile)

    def _put_together(
        self, tiles: torch.Tensor, image_size: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """`(tiles, side * side, width)` to the unpadded grid `(width, rows, columns)`."""
        tiles = tiles.unflatten(0, shape).unflatten(2, (self.side, self.side))
        whole = tiles.permute(4, 0, 2, 1, 3)  # (width, down, side, across, side)
        return unpad_image(whole.flatten(3, 4).flatten(1, 2), image_size)

    def _grid_places(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """`(rows * columns,)`: behind the base view, a newline after each row."""
        places = torch.arange(rows * (columns + 1), device=device) + self.side**2
        return places.view(rows, columns + 1)[:, :columns].flatten()

    def image_rows(
        self, input_ids: torch.LongTensor, image_sizes=None, mm_encoder_outputs=None, **inputs
    ) -> list[list[int]]:
        encoded = (mm_encoder_outputs or {}).get("image")
        sizes = [] if encoded is None else encoded.sizes
        if image_sizes is not None:
            sizes = [self._image_size(size) for size in image_sizes]
        rows, images = [], iter(sizes)
        for placeholders in PruningModelMixin.visual_counts(self, input_ids):
            row = []
            while placeholders > 0:
                taken, visual = next(images, (placeholders + 1, 0))
                row.append(visual)
                placeholders -= taken
            if placeholders < 0:
                raise ValueError(f"{len(sizes)} images and the prompts' image tokens do not match")
            rows.append(row)
        return rows

    def visual_sizes(self, kind: str, **inputs) -> list[int]:
        return [self._image_size(size)[0] for size in inputs["image_sizes"]]

    def _image_size(self, image_size: torch.Tensor) -> tuple[int, int]:
        """`(placeholders, visual tokens)` of an image of `(height, width)` pixels."""
        down, across = self._tile_shape(image_size)
        whole = torch.empty(1, down * self.side, across * self.side, device="meta")
        rows, columns = unpad_image(whole, image_size).shape[1:]
        visual = self.side**2 + rows * columns
        return visual + rows, visual


class GlimpsePruneLlavaNextForConditionalGeneration(
    ClipGenerationMixin, LlavaNextForConditionalGeneration
):
    """LLaVA-NeXT whose `generate` drops the visual tokens nobody asked about.

    Beside the stock arguments, `forward` and `generate` take those of `PruningArguments`. Which
    tokens are scored and which stay is said at `GlimpsePruneLlavaNextModel`.
    """

    config_class = GlimpsePruneLlavaNextConfig
    backbone_class = GlimpsePruneLlavaNextModel
    forward = show_pruning_arguments(LlavaNextForConditionalGeneration.forward)(
        ClipGenerationMixin.forward
    )


def _geometry(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Geometry `(tokens, 6)`, see `token_geometry`, and grid `(3,)` of a view."""
    grids = torch.tensor([[1, rows, columns]], device=device)
    return token_geometry(grids, [rows * columns]), grids[0]
