"""GlimpsePrune for Qwen2.5-VL: the stock model, whose prefill drops visual tokens.

transformers 4 loads no more of a local folder than what this file imports by itself, so it also
names siblings that only other siblings use.
"""

import torch
from torch import nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
)
from transformers.cache_utils import Cache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLPreTrainedModel,
)

from .base_weights import located_weights  # noqa: F401
from .configuration_glimpseprune import GlimpsePruneQwen2_5_VLConfig
from .glimpse import Glimpse
from .glimpse_record import GlimpseRecord  # noqa: F401
from .importance_predictor import VisualImportancePredictor  # noqa: F401
from .pruned_cache import pruned_layer
from .pruned_forward import TRANSFORMERS_5, PrunedForwardMixin
from .pruning_model import PruningGenerationMixin, PruningModelMixin, completion_start
from .selection import select_visual_tokens  # noqa: F401
from .visual_tokens import VisualFeatures, tap_outputs, token_geometry


class GlimpsePruneQwen2_5_VLTextModel(PrunedForwardMixin, Qwen2_5_VLTextModel):
    """The stock decoder behind the split forward; rotary positions have three axes."""

    def rotary_position_ids(
        self, position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, past_length: int
    ) -> torch.Tensor:
        """`(3, batch, length)`; `generate` puts plain text positions in front of the three."""
        position_ids = super().rotary_position_ids(position_ids, inputs_embeds, past_length)
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        return position_ids[-3:]


class GlimpsePruneQwen2_5_VLModel(PruningModelMixin, Qwen2_5_VLModel):
    """The stock backbone; visual tokens are taken from the vision encoder's tapped blocks."""

    config_class = GlimpsePruneQwen2_5_VLConfig
    _checkpoint_conversion_mapping = {}

    def __init__(self, config: GlimpsePruneQwen2_5_VLConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = GlimpsePruneQwen2_5_VLTextModel._from_config(config.text_config)
        self.glimpse = Glimpse(config, config.vision_config.hidden_size)
        self.rope_deltas = None  # the stock model's; a pruned cache carries its own
        self.post_init()

    @property
    def predictor_window(self) -> int:
        vision = self.config.vision_config
        return vision.window_size // vision.spatial_merge_size // vision.patch_size

    @property
    def visual_token_ids(self) -> torch.Tensor:
        return torch.tensor([self.config.image_token_id, self.config.video_token_id])

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        """The stock features; on transformers 5 with what the predictor needs beside them."""
        features = self.encode_visual("image", pixel_values, image_grid_thw, **kwargs)
        return features if TRANSFORMERS_5 else features.pooler_output

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        """As `get_image_features`, for videos."""
        features = self.encode_visual("video", pixel_values_videos, video_grid_thw, **kwargs)
        return features if TRANSFORMERS_5 else features.pooler_output

    def encode_visual(
        self, kind: str, pixels: torch.Tensor, grid_thw: torch.Tensor, **kwargs
    ) -> VisualFeatures:
        """Encode images or videos and tap the vision blocks on the way.

        Args:
            kind: `"image"` or `"video"`.
            pixels: `(patches, patch values)` as the processor returns them.
            grid_thw: `(images, 3)` frames, height and width of each in patches.
        """
        encoder = super().get_image_features if kind == "image" else super().get_video_features
        blocks = [self.visual.blocks[layer] for layer in self.config.vision_layers]
        with tap_outputs(blocks) as taps:
            outputs = encoder(pixels, grid_thw, **kwargs)
        if not isinstance(outputs, tuple):
            outputs = outputs.pooler_output
        sizes = [len(embeddings) for embeddings in outputs]
        merge = self.visual.spatial_merge_size
        scale = torch.tensor([1, merge, merge], device=grid_thw.device)
        geometry = token_geometry(grid_thw // scale, sizes).to(taps[0].device)
        order = window_order(geometry, sizes, self.predictor_window)
        layers = [_in_raster_order(tap, order, merge**2) for tap in taps] + [geometry]
        return VisualFeatures(
            pooler_output=outputs,
            deepstack_features=[list(layer.split(sizes)) for layer in layers],
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, VisualFeatures] | None = None,
        prune: bool | None = None,
        prune_threshold: float | None = None,
        max_keep_ratio: float | None = None,
        min_keep_tokens: int | None = None,
        visual_keep_mask: torch.Tensor | None = None,
        prompt_length: int | None = None,
        in_place: bool = False,
        only_glimpse: bool = False,
        compact_output: bool = False,
        **kwargs,
    ):
        """The stock forward with pruning; see `GlimpsePruneQwen2_5_VLForConditionalGeneration`.

        Args:
            only_glimpse: stop after layer K; the record is on the returned cache.
            compact_output: return kept tokens only, packed to the right, instead of the logical
                layout with zeros at dropped tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            encoded["image"] = self.encode_visual("image", pixel_values, image_grid_thw)
        if pixel_values_videos is not None:
            encoded["video"] = self.encode_visual("video", pixel_values_videos, video_grid_thw)
        masks = self._placeholder_masks(input_ids, inputs_embeds, encoded)
        inputs_embeds = self.merge_visual_features(inputs_embeds, encoded, masks)
        request = None
        if encoded and prune is not False:
            request = self.prune_request(
                encoded,
                masks,
                prune_threshold,
                max_keep_ratio,
                min_keep_tokens,
                visual_keep_mask,
                prompt_length=prompt_length,
                in_place=in_place,
                only_glimpse=only_glimpse,
                compact_output=compact_output,
            )
        elif pruned_layer(past_key_values) is not None:
            position_ids = self._decoding_positions(inputs_embeds, past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            prune_request=request,
            **kwargs,
        )

    def _placeholder_masks(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        encoded: dict[str, VisualFeatures],
    ) -> dict[str, torch.Tensor]:
        """`(batch, length)` bool by kind; the stock check of the counts included."""
        masks = {}
        for index, kind in enumerate(("image", "video")):
            if kind in encoded:
                features = torch.cat(list(encoded[kind].pooler_output))
                found = self.get_placeholder_mask(
                    input_ids, inputs_embeds, **{f"{kind}_features": features}
                )
                masks[kind] = found[index][..., 0]
        return masks

    def _decoding_positions(self, inputs_embeds: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Positions of new tokens from the cache, not from `rope_deltas` of the last prefill.

        The stock model keeps those on the module, where generations disturb each other: at every
        step on transformers 4, at the start of a later turn on transformers 5.
        """
        layer = pruned_layer(cache)
        start = layer.get_seq_length()
        steps = torch.arange(start, start + inputs_embeds.shape[1], device=inputs_embeds.device)
        return (layer.position_delta.to(steps.device) + steps).expand(3, -1, -1)


class GlimpsePruneQwen2_5_VLForConditionalGeneration(
    PruningGenerationMixin, Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL whose `generate` takes a glimpse and drops the visual tokens nobody asked about.

    Beside the stock arguments, `forward` and `generate` take:

        prune: False runs exactly the stock model.
        prune_threshold, max_keep_ratio, min_keep_tokens: override the configuration for one call.
        visual_keep_mask: `(num_visual_tokens,)` bool over the batch in prompt order, the caller's
            own choice; no glimpse is taken.

    and `forward` also:

        prompt_length: tokens before the completion. The prompt is pruned and the completion runs as
            one block over the pruned cache, as when decoding. Default: where `labels` begin; else,
            with `logits_to_keep=n`, all but the last n - 1 tokens are prompt, as in assisted
            decoding and in trl; else everything is. Prompts are left-padded and completions
            right-padded.
        in_place: score only: keep every token and let the completion see the glimpse token.

    Hidden states and logits come back in the prompt's full length, with zeros at dropped tokens;
    with `logits_to_keep=1`, as in `generate`, nothing is laid out again.
    """

    config_class = GlimpsePruneQwen2_5_VLConfig
    _checkpoint_conversion_mapping = {}

    def __init__(self, config: GlimpsePruneQwen2_5_VLConfig):
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = GlimpsePruneQwen2_5_VLModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, VisualFeatures] | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prune: bool | None = None,
        prune_threshold: float | None = None,
        max_keep_ratio: float | None = None,
        min_keep_tokens: int | None = None,
        visual_keep_mask: torch.Tensor | None = None,
        prompt_length: int | None = None,
        in_place: bool = False,
        **kwargs,
    ):
        if prompt_length is None:
            prompt_length = completion_start(labels, logits_to_keep, input_ids)
        last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        if mm_token_type_ids is not None:  # unknown to transformers 4
            kwargs["mm_token_type_ids"] = mm_token_type_ids
        if mm_encoder_outputs is not None:
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            logits_to_keep=logits_to_keep,
            prune=prune,
            prune_threshold=prune_threshold,
            max_keep_ratio=max_keep_ratio,
            min_keep_tokens=min_keep_tokens,
            visual_keep_mask=visual_keep_mask,
            prompt_length=prompt_length,
            in_place=in_place,
            compact_output=last_only,
            **kwargs,
        )


def window_order(geometry: torch.Tensor, sizes: list[int], window: int) -> torch.Tensor:
    """The order in which the vision encoder keeps tokens: window after window of each frame.

    Args:
        geometry: `(N, 6)`, see `token_geometry`.
        sizes: tokens of each image.
        window: side of a window in tokens.

    Returns:
        `(N,)` raster index of the token at each place of the encoder's sequence.
    """
    frame, row, column, _, height, width = geometry.unbind(1)
    down, across = (height + window - 1) // window, (width + window - 1) // window
    within_image = (frame * down + row // window) * across + column // window
    repeats = torch.tensor(sizes, device=geometry.device)
    image = torch.arange(len(sizes), device=geometry.device)
    image = image.repeat_interleave(repeats, output_size=len(geometry))
    return (image * (len(geometry) + 1) + within_image).argsort(stable=True)


def _in_raster_order(tap: torch.Tensor, order: torch.Tensor, patches: int) -> torch.Tensor:
    """Average a block's output over the patches of each token, `(N * patches, w)` to `(N, w)`."""
    tokens = tap.unflatten(0, (-1, patches)).mean(dim=1)
    return torch.empty_like(tokens).index_copy(0, order, tokens)
