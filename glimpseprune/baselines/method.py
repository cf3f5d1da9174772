"""What every way of answering has: a name, options of `generate`, and a count of visual tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from ..sample import Sample
from .layer_masks import LayerMasks
from .model_sizes import ModelSizes


@dataclass
class PreparedBatch:
    """Questions as the model takes them.

    Attributes:
        samples: the questions, one a row.
        inputs: what `generate` takes, left-padded.
        visual_counts: visual tokens of each row.
        encoded: the same inputs with the images as the vision encoder left them, for methods that
            do not look into it.
        encoder_reading: what a method saw in the vision encoder, for its next run on the batch.
    """

    samples: list[Sample]
    inputs: dict
    visual_counts: list[int]
    encoded: dict
    encoder_reading: list[torch.Tensor] = field(default_factory=list)

    @property
    def everything(self) -> torch.Tensor:
        """A keep mask of all visual tokens."""
        return torch.ones(sum(self.visual_counts), dtype=torch.bool)


@dataclass
class Application:
    """A method at work on one batch.

    Attributes:
        options: arguments of `generate`.
        masks: what each decoder layer works on, where the model's own machinery drops nothing.
        last_full_layer: the last layer that works on all tokens where it does, -1 for none;
            default: the one it was asked to prune at.
    """

    options: dict[str, object]
    masks: LayerMasks | None = None
    last_full_layer: int | None = None

    def tokens_by_layer(
        self, cache: Cache | None, visual_counts: list[int], sizes: ModelSizes
    ) -> torch.Tensor:
        """`(batch, layers)` visual tokens that each layer works on, once the answer is there.

        A model that prunes at a layer works on all tokens up to that layer's attention;
        the layer counts as full here.

        Args:
            cache: what `generate` returned.
            visual_counts: visual tokens of each prompt.
        """
        if self.masks is not None:
            masks = torch.stack([mask.cpu() for mask in self.masks.keep], dim=1).long()
            return torch.stack([row.sum(0) for row in masks.split(visual_counts)])
        counts = torch.tensor(encoded_counts(cache, visual_counts))[:, None].repeat(1, sizes.layers)
        if hasattr(cache, "glimpse"):
            full = cache.glimpse.prune_layer
            full = full if self.last_full_layer is None else self.last_full_layer
            kept = cache.glimpse.keep_mask.cpu().split(visual_counts)
            counts[:, full + 1 :] = torch.stack([row.sum() for row in kept])[:, None]
        return counts


def encoded_counts(cache: Cache | None, visual_counts: list[int]) -> list[int]:
    """Visual tokens of each prompt that the vision encoder saw.

    Args:
        cache: what `generate` returned.
        visual_counts: visual tokens of each prompt.
    """
    encoded = cache.glimpse.encoded if hasattr(cache, "glimpse") else None
    if encoded is None:
        return visual_counts
    return [int(of_row.sum()) for of_row in encoded.cpu().split(visual_counts)]


@dataclass(frozen=True)
class Method:
    """A way of answering; as it stands, with all visual tokens: exactly the stock model.

    Attributes:
        name: what tables call it.
        ratio: the largest share of a prompt's visual tokens it may keep, or None.
        seed: of what it draws.
    """

    name: str = "all tokens"
    ratio: float | None = None
    seed: int = 0

    def present(self, sample: Sample, processor: ProcessorMixin) -> Sample:
        """The question as the model is shown it."""
        return sample

    @contextmanager
    def applied(
        self, model: PreTrainedModel, processor: ProcessorMixin, batch: PreparedBatch
    ) -> Iterator[Application]:
        """Inside the context `generate` with the yielded options answers by this method."""
        yield Application({"prune": False})

    def scoring_flops(self, sizes: ModelSizes, visual: int, prompt: int) -> int:
        """Operations spent on scores for one prompt, beside the decoder's layers.

        Args:
            visual: visual tokens of the prompt.
            prompt: all its tokens.
        """
        return 0

    def look_layer(self, config: PretrainedConfig) -> int | None:
        """P of a look that it can be asked over, or None where it needs whole prompts."""
        return config.glimpse_layer if config.prune_layer is None else config.prune_layer

    def encode_tolerance(self, config: PretrainedConfig) -> float | None:
        """`redundant_patches` of what it answers from; None where everything is encoded."""
        return None

    @property
    def drops_inside_glimpse_layer(self) -> bool:
        """Whether tokens go between the glimpse layer's attention and its MLP."""
        return False

    @property
    def looks_into_encoder(self) -> bool:
        """Whether the vision encoder has to run under the method's eyes."""
        return False


@dataclass(frozen=True)
class TextOnly(Method):
    """The control without an image: what the question alone gives away."""

    name: str = "text only"

    def present(self, sample: Sample, processor: ProcessorMixin) -> Sample:
        return replace(sample, image=None)

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        yield Application({})


@dataclass(frozen=True)
class OwnPruning(Method):
    """The model's own glimpse and predictor; settings left out come from its configuration."""

    name: str = "GlimpsePrune"
    prune_threshold: float | None = None
    min_keep_tokens: int | None = None
    prune_layer: int | None = None
    redundant_patches: float | bool | None = None

    @contextmanager
    def applied(self, model, processor, batch) -> Iterator[Application]:
        settings = {
            "prune_threshold": self.prune_threshold,
            "max_keep_ratio": self.ratio,
            "min_keep_tokens": self.min_keep_tokens,
            "prune_layer": self.prune_layer,
        }
        yield Application({name: value for name, value in settings.items() if value is not None})

    def look_layer(self, config: PretrainedConfig) -> int | None:
        return super().look_layer(config) if self.prune_layer is None else self.prune_layer

    def encode_tolerance(self, config: PretrainedConfig) -> float | None:
        asked = self.redundant_patches
        asked = config.redundant_patches if asked is None else asked
        return None if asked is False else asked

    @property
    def drops_inside_glimpse_layer(self) -> bool:
        return True
