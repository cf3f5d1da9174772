"""A model that answers units: looks once at their images, asks all their questions."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.stock import cache_of, given_cache

from ..images import open_image
from ..loading import load_model, prepare
from ..package_files import SAMPLE_PAGE
from .pictures import MOST_PIXELS, read_picture
from .questions import Row
from .results import answered, failed, sentence_of
from .units import Unit

READERS = 4  # of images at once
LOST_DEVICE = ("CUDA error", "device-side assert", "HIP error")


class DeviceLost(OSError):
    """The accelerator answers no more: the process has to end, and the unit is asked again."""


@dataclass(frozen=True)
class AnswerSettings:
    """How a model is asked.

    Attributes:
        model: folder or Hub repository; None for the tiny one.
        prune: False answers with all visual tokens.
        prune_threshold, max_keep_ratio, min_keep_tokens, prune_layer: where given, instead of the
            configuration's.
        batch_size: most questions that are asked at once.
        max_new_tokens: of an answer.
        max_pixels: of an image; larger ones are not read.
        masks: whether answers tell which tokens were kept.
        dtype: of the weights, as `load_model` takes it.
    """

    model: str | None = None
    prune: bool = True
    prune_threshold: float | None = None
    max_keep_ratio: float | None = None
    min_keep_tokens: int | None = None
    prune_layer: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 64
    max_pixels: int = MOST_PIXELS
    masks: bool = False
    dtype: str = "auto"


class Answerer:
    """Answers units of questions.

    Args:
        model, processor: of a GlimpsePrune repository.
        settings: how they are asked.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: AnswerSettings):
        self.model, self.processor, self.settings = model, processor, settings
        self.readers = ThreadPoolExecutor(READERS)
        names = ("prune_threshold", "max_keep_ratio", "min_keep_tokens")
        given = {name: getattr(settings, name) for name in names}
        self.options = {name: value for name, value in given.items() if value is not None}
        if not settings.prune:
            self.options["prune"] = False

    @classmethod
    def load(cls, settings: AnswerSettings, device: str | None = None) -> "Answerer":
        """Load the model, and answer one question of its own, so that what is wrong shows at once.

        Raises:
            OSError: when there is no such model.
            ValueError: when it cannot be asked so.
        """
        answerer = cls(*load_model(settings.model, device, settings.dtype), settings)
        with torch.inference_mode():
            prefix = answerer._look([open_image(SAMPLE_PAGE)])
            answerer._generate(prefix, [0], [Row(0, "?")], max_new_tokens=1)
        return answerer

    def pictures(self, unit: Unit) -> list[Image.Image | str | None]:
        """The images of a unit, read together; a sentence where one cannot be."""
        return list(self.readers.map(self._picture, [group.image for group in unit.groups]))

    @torch.inference_mode()
    def answer(self, unit: Unit, pictures: Sequence[Image.Image | str | None]) -> list[dict]:
        """Answers of a unit's rows, in their order there; a row that fails has an `error`.

        Args:
            pictures: what `pictures` made of its images.

        Raises:
            DeviceLost: when nothing can be answered any more.
        """
        answers, shown, masks = [], [], self.settings.masks
        for group, picture in zip(unit.groups, pictures, strict=True):
            if isinstance(picture, Image.Image):
                shown.append((picture, group.rows))
            else:
                answers += [failed(row, row.error or picture, masks) for row in group.rows]
        answers += self._of_images(shown)
        place = {row.number: index for index, row in enumerate(unit.rows)}
        return sorted(answers, key=lambda answer: place[answer["row"]])

    def _of_images(self, shown: list[tuple[Image.Image, Sequence[Row]]]) -> list[dict]:
        """Answers over one look, or, where that fails, over one an image."""
        if not shown:
            return []
        start = perf_counter()
        try:
            prefix = self._look([picture for picture, _ in shown])
        except Exception as error:
            sentence = checked(error)
        else:
            rows = [row for _, of_image in shown for row in of_image]
            places = [place for place, (_, of_image) in enumerate(shown) for _ in of_image]
            return self._of_rows(prefix, places, rows, (perf_counter() - start) / len(rows))
        if len(shown) > 1:
            return [answer for one in shown for answer in self._of_images([one])]
        return [failed(row, sentence, self.settings.masks) for row in shown[0][1]]

    def _of_rows(
        self, prefix, places: list[int], rows: list[Row], seconds_of_look: float
    ) -> list[dict]:
        """Answers over a look, batch by batch.

        Args:
            places: row of the prefix that each question is about.
            seconds_of_look: a question's share.
        """
        size, answers = self.settings.batch_size, []
        for first in range(0, len(rows), size):
            batch = slice(first, first + size)
            answers += self._of_batch(prefix, places[batch], rows[batch])
        for answer in answers:
            if answer["error"] is None:
                answer["seconds"] = round(answer["seconds"] + seconds_of_look, 6)
        return answers

    def _of_batch(self, prefix, places: list[int], rows: list[Row]) -> list[dict]:
        """Answers of a batch, or, where that fails, of its rows alone."""
        try:
            return self._generate(prefix, places, rows)
        except Exception as error:
            sentence = checked(error)
        if len(rows) == 1:
            return [failed(rows[0], sentence, self.settings.masks)]
        alone = zip(places, rows, strict=True)
        return [answer for place, row in alone for answer in self._of_batch(prefix, [place], [row])]

    def _look(self, pictures: list[Image.Image]):
        """The prefix of some images, a row each; without pruning it is of whole images."""
        inputs = prepare(self.processor, pictures, ["?"] * len(pictures)).to(self.model.device)
        settings = {} if self.settings.prune else {"redundant_patches": False}
        return self.model.look(**inputs, **settings, prune_layer=self.settings.prune_layer)

    def _generate(
        self, prefix, places: list[int], rows: list[Row], max_new_tokens: int | None = None
    ) -> list[dict]:
        """Answers of some questions, as one batch."""
        start = perf_counter()
        over = prefix.select_rows(places)
        questions = [row.question for row in rows]
        inputs = prepare(self.processor, None, questions, prefix=over).to(self.model.device)
        generated = self.model.generate(
            **inputs,
            **given_cache(over),
            **self.options,
            max_new_tokens=max_new_tokens or self.settings.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        completions = generated.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.batch_decode(completions, skip_special_tokens=True)
        counts = over.visual_counts(len(rows))
        masks, grids = kept_of(cache_of(generated), over, counts)
        seconds = (perf_counter() - start) / len(rows)
        return [
            answered(row, text.strip(), mask, grid, seconds, self.settings.masks)
            for row, text, mask, grid in zip(rows, texts, masks, grids, strict=True)
        ]

    def _picture(self, image: str | bytes | None) -> Image.Image | str | None:
        if image is None:
            return None
        try:
            return read_picture(image, self.settings.max_pixels)
        except Exception as error:  # of any of the libraries that read what anybody made
            return sentence_of(error)


def kept_of(cache, prefix, counts: list[int]) -> tuple[list[list[bool]], list[list]]:
    """Keep masks of each row, and the grids of its views as `[frames, height, width]`.

    Args:
        cache: what `generate` returned.
        prefix: what it was asked over.
        counts: visual tokens of each row.
    """
    if not hasattr(cache, "glimpse"):
        masks = [[True] * count for count in counts]
    else:
        masks = [mask.tolist() for mask in cache.glimpse.keep_mask.cpu().split(counts)]
    held = prefix.held
    grids: list[list] = [[] for _ in held.states]
    for row, grid in zip(held.item_rows, held.tokens.grids.tolist(), strict=True):
        grids[row].append(grid)
    return masks, [grids[row] for row in held.rows.tolist()]


def checked(error: Exception) -> str:
    """What a row says of its failure.

    Raises:
        DeviceLost: when it is no failure of the row.
    """
    if any(sign in str(error) for sign in LOST_DEVICE):
        raise DeviceLost(
            f"the accelerator is lost ({sentence_of(error)}): start the same command again, which "
            "goes on where this one was"
        ) from error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"too large for the memory: {sentence_of(error)}"
    return sentence_of(error)
