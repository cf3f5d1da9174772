"""What one person shows and asks: an image, one look at it, and the answers over that look."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.glimpse_record import GlimpseRecord
from modeling_glimpseprune.selection import corner_tokens, select_visual_tokens
from modeling_glimpseprune.stock import cache_of, given_cache

from ..images import image_of
from ..loading import prepare

MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # beyond which Pillow warns
NO_IMAGE = "There is no image: choose one, or take the sample page."
NO_QUESTION = "There is no question: type one."
NO_ANSWER = "There is no answer to compare with: ask a question first."


@dataclass(frozen=True)
class Settings:
    """What the sliders say.

    Attributes:
        prune_threshold: in [0, 1].
        max_keep_ratio: in (0, 1]; 1 is no upper bound.
        prune_layer: P of the look.
    """

    prune_threshold: float
    max_keep_ratio: float
    prune_layer: int

    @classmethod
    def of_model(cls, config) -> "Settings":
        """Those of a model's configuration."""
        layer = config.glimpse_layer if config.prune_layer is None else config.prune_layer
        ratio = 1.0 if config.max_keep_ratio is None else config.max_keep_ratio
        return cls(config.prune_threshold, ratio, layer)


@dataclass(frozen=True)
class Answer:
    """An answer over the look at an image.

    Attributes:
        seen: what the visual tokens cover of the image, which some processors cut or pad.
        settings: it was asked with.
        record: scores and masks, on the CPU.
        seconds: from the question to the end of the answer, the look left out.
        seconds_of_look: what the look took.
    """

    seen: Image.Image
    question: str
    text: str
    settings: Settings
    record: GlimpseRecord
    seconds: float
    seconds_of_look: float


@dataclass(frozen=True)
class WholeAnswer:
    """What the stock model answers to the same question, with all visual tokens and no look."""

    text: str
    seconds: float


class Session:
    """What one person shows and asks. Errors leave it as it was, unless something else is said.

    Args:
        model, processor: of a GlimpsePrune repository.
        max_new_tokens: of an answer.
        max_pixels: of an image; larger ones are not read.

    Attributes:
        image: the one shown, or None.
        prefix: what was seen of it, once something was asked.
        answers: to the questions about it, the latest last.
        whole: the stock model's answer to the latest question, once it was asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_new_tokens: int = 256,
        max_pixels: int = MOST_PIXELS,
    ):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.max_pixels = max_new_tokens, max_pixels
        self.show(None)

    def show(self, content: bytes | None) -> None:
        """Take another image, or none. What was seen of the last one is let go in any case.

        Args:
            content: of an image file.

        Raises:
            ValueError: when it is not a readable image or too large.
        """
        self.image: Image.Image | None = None
        self.prefix, self.seconds_of_look = None, 0.0
        self.answers: list[Answer] = []
        self.whole: WholeAnswer | None = None
        if content is not None:
            self.image = image_of(content, "you chose", self.max_pixels)

    @torch.inference_mode()
    def ask(self, question: str, settings: Settings) -> Answer:
        """Answer a question by itself, over the look at the image, which is taken if need be.

        Raises:
            ValueError: when there is no image or no question, or it cannot be asked.
        """
        if self.image is None:
            raise ValueError(NO_IMAGE)
        if not (question := question.strip()):
            raise ValueError(NO_QUESTION)
        if self.prefix is None or self.prefix.held.prune_layer != settings.prune_layer:
            self._look(settings.prune_layer)
        start = self._now()
        inputs = prepare(self.processor, None, [question], self.prefix).to(self.model.device)
        text, cache = self._generate(
            inputs,
            **given_cache(self.prefix),
            prune_threshold=settings.prune_threshold,
            max_keep_ratio=settings.max_keep_ratio,
        )
        seconds = self._now() - start
        record = _on_cpu(cache.glimpse)
        times = seconds, self.seconds_of_look
        answer = Answer(self._seen_part(), question, text, settings, record, *times)
        self.answers.append(answer)
        self.whole = None
        return answer

    @torch.inference_mode()
    def ask_whole(self) -> WholeAnswer:
        """Ask the stock model what was asked last: the image anew, with all its visual tokens.

        Raises:
            ValueError: when nothing was asked.
        """
        if not self.answers:
            raise ValueError(NO_ANSWER)
        start = self._now()
        inputs = prepare(self.processor, [self.image], [self.answers[-1].question])
        text, _ = self._generate(inputs.to(self.model.device), prune=False)
        self.whole = WholeAnswer(text, self._now() - start)
        return self.whole

    def chosen(self, answer: Answer, settings: Settings) -> GlimpseRecord:
        """What a question would keep with other settings, without running the model.

        It is what the model keeps, but for another prune layer, of which the scores say nothing.
        """
        record, config = answer.record, self.model.config
        keep = select_visual_tokens(
            record.importance,
            record.rows,
            1,
            settings.prune_threshold,
            settings.max_keep_ratio,
            config.min_keep_tokens,
        )
        keep |= corner_tokens(record.geometry, config.anchor_corners)
        return replace(record, keep_mask=keep)

    def _seen_part(self) -> Image.Image:
        box = self.processor.visible_box(self.image.width, self.image.height)
        return self.image.crop(tuple(map(round, box)))

    def _look(self, prune_layer: int) -> None:
        self.prefix = None  # never two at once
        start = self._now()
        inputs = prepare(self.processor, [self.image], ["?"]).to(self.model.device)
        self.prefix = self.model.look(**inputs, prune_layer=prune_layer)
        self.seconds_of_look = self._now() - start

    def _generate(self, inputs: dict, **options) -> tuple[str, object]:
        """The answer's text and the cache behind it."""
        generated = self.model.generate(
            **inputs,
            **options,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        completion = generated.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        text = self.processor.batch_decode(completion, skip_special_tokens=True)[0]
        return text.strip(), cache_of(generated)

    def _now(self) -> float:
        """Seconds, all work of the device done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return perf_counter()


@dataclass
class Visitor:
    """Who comes to the page: a session, from the first step on, and where its image was sent to.

    Requests of a page may overtake one another, so each of them says which image it is about.
    """

    session: Session | None = None
    path: str | None = None

    def session_at(self, path: str | None, open_session: Callable[[], Session]) -> Session:
        """The session, showing the image of a file.

        Raises:
            ValueError: when it is not a readable image or too large; the session shows none then.
            OSError: when the file cannot be read.
        """
        if self.session is None:
            self.session = open_session()
        if path != self.path:
            self.path = path
            self.session.show(None)
            self.session.show(None if path is None else Path(path).read_bytes())
        return self.session


def _on_cpu(record: GlimpseRecord) -> GlimpseRecord:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(record, **{name: tensor.cpu() for name, tensor in tensors.items()})
