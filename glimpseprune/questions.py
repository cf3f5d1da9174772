"""Questions made ready for the model: as whole prompts, or over looks at their images."""

import time
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.stock import ENCODES_FIRST, given_cache
from modeling_glimpseprune.visual_features import VisualFeatures

from .baselines.method import PreparedBatch
from .loading import prepare
from .sample import Sample


class Questions:
    """Some questions, all with an image or all without, made ready in each way asked for, once.

    Each different image is encoded once, and looked at once for each prune layer.

    Args:
        samples: the questions; those about one image hold the same image object.
        by_image: False takes every question's image for another one.
        hold_prompts: let looks go on over each question's own tokens but the last, for several
            methods; each question holds an image of its own then.

    Attributes:
        seconds: that encoder and looks took so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        samples: Sequence[Sample],
        by_image: bool = True,
        hold_prompts: bool = False,
    ):
        self.model, self.processor, self.samples = model, processor, list(samples)
        self.seconds, self.hold_prompts = 0.0, hold_prompts
        self._ready: dict[tuple[int | None, float | None], PreparedBatch] = {}
        self._features: dict[float | None, VisualFeatures] = {}
        images = [id(sample.image) if by_image else row for row, sample in enumerate(samples)]
        number = {image: index for index, image in enumerate(dict.fromkeys(images))}
        self._image_of_row = [number[image] for image in images]
        self._first = [images.index(image) for image in number]

    def ready(self, look_layer: int | None = None, tolerance: float | None = None) -> PreparedBatch:
        """The questions as `generate` takes them.

        Args:
            look_layer: P of the looks to ask over, or None for whole prompts.
            tolerance: of `redundant_patches`; None encodes everything.
        """
        way = look_layer, tolerance
        if way not in self._ready:
            self._ready[way] = self._whole(tolerance) if look_layer is None else self._looked(*way)
        return self._ready[way]

    def _whole(self, tolerance: float | None) -> PreparedBatch:
        images = [sample.image for sample in self.samples]
        with_images = images[0] is not None
        inputs = self._prepare(self.samples).to(self.model.device)
        counts, encoded = self.model.model.visual_counts(**inputs), inputs
        if with_images:
            encoded = self._encoded(inputs, tolerance, self._image_of_row)
        return PreparedBatch(self.samples, inputs, counts, encoded)

    def _looked(self, look_layer: int, tolerance: float | None) -> PreparedBatch:
        inputs = self._different.to(self.model.device)
        counts = self.model.model.visual_counts(**inputs)
        inputs = self._encoded(inputs, tolerance, list(range(len(counts))))
        start = time.perf_counter()
        prefix = self.model.look(**inputs, prune_layer=look_layer)
        self.seconds += time.perf_counter() - start
        prefix = prefix.select_rows(self._image_of_row)
        questions = [sample.question for sample in self.samples]
        prompts = dict(prepare(self.processor, None, questions, prefix).to(self.model.device))
        prompts |= given_cache(prefix)
        if self.hold_prompts:
            start = time.perf_counter()
            lengths = prompts["attention_mask"].sum(1) - 1
            prompts |= given_cache(self.model.look(**prompts, prefix_length=lengths.tolist()))
            self.seconds += time.perf_counter() - start
        counts = [counts[image] for image in self._image_of_row]
        return PreparedBatch(self.samples, prompts, counts, prompts)

    @cached_property
    def _different(self) -> dict:
        """Whole prompts, one for each different image."""
        return self._prepare([self.samples[place] for place in self._first])

    def _encoded(self, inputs: dict, tolerance: float | None, images: list[int]) -> dict:
        """Inputs whose pixels are encoded, where `generate` takes them so; else told how to be.

        Args:
            images: which of the different images each row shows.
        """
        if not ENCODES_FIRST:
            return inputs | {"redundant_patches": as_asked(tolerance)}
        pixels = self.model.model.visual_inputs["image"][0]
        left = {name: value for name, value in inputs.items() if name != pixels}
        features = self._features_without(tolerance).select(images)
        return left | {"mm_encoder_outputs": {"image": features}}

    def _features_without(self, tolerance: float | None) -> VisualFeatures:
        """What the vision encoder makes of the different images."""
        if tolerance not in self._features:
            inputs = self._different.to(self.model.device)
            start = time.perf_counter()
            names = self.model.model.visual_inputs["image"]
            taken = {name: inputs[name] for name in names if name in inputs}
            features = self.model.model.encode_telling("image", as_asked(tolerance), **taken)
            self._features[tolerance] = features
            self.seconds += time.perf_counter() - start
        return self._features[tolerance]

    def _prepare(self, samples: Sequence[Sample]) -> dict:
        images = [sample.image for sample in samples]
        questions = [sample.question for sample in samples]
        return prepare(self.processor, images if images[0] is not None else None, questions)


def as_asked(tolerance: float | None) -> float | bool:
    """`redundant_patches` of a call, for which None is as configured."""
    return False if tolerance is None else tolerance
