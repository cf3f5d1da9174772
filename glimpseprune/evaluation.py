"""Answers, accuracy and visual tokens of methods over questions about images."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.glimpse_record import GlimpseRecord
from modeling_glimpseprune.stock import cache_of

from .baselines.method import Method, PreparedBatch, encoded_counts
from .baselines.model_sizes import ModelSizes
from .metrics import exact_match
from .questions import Questions
from .sample import Sample

Metric = Callable[[str, str], float]
"""Takes an answer and the reference, gives a score in [0, 1]."""


@dataclass(frozen=True)
class Answer:
    """What a method made of one question.

    Attributes:
        sample: the question.
        text: the answer.
        score: the metric's.
        visual: visual tokens of the image as given; a resized image has fewer of its own.
        prompt: text tokens of the prompt.
        by_layer: visual tokens that each decoder layer worked on.
        encoded: visual tokens that the vision encoder worked on.
    """

    sample: Sample
    text: str
    score: float
    visual: int
    prompt: int
    by_layer: tuple[int, ...]
    encoded: int

    @property
    def kept(self) -> float:
        """Share of the visual tokens that the last layer, and the answer, worked on."""
        return self.by_layer[-1] / self.visual

    @property
    def over_layers(self) -> float:
        """Share of the visual tokens that a layer worked on, averaged over layers."""
        return sum(self.by_layer) / len(self.by_layer) / self.visual


@dataclass
class Evaluation:
    """Answers by method, in the order in which questions were asked, and where the time went.

    Attributes:
        answers: one list a method, in the methods' order.
        seconds: of the whole run.
        seconds_in_model: of that, inside the vision encoder, `look` and `generate`.
    """

    answers: list[list[Answer]] = field(default_factory=list)
    seconds: float = 0.0
    seconds_in_model: float = 0.0


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    batch_size: int = 16,
    max_new_tokens: int = 16,
    metric: Metric = exact_match,
    fresh: bool = False,
    hold_prompts: bool = False,
) -> Evaluation:
    """Answer every question greedily by every method.

    Batch by batch, so that methods share what the processor and the vision encoder made of a batch,
    and a look at each different image of it where they can be asked over one.

    Args:
        fresh: ask by whole prompts always, each with an image of its own.
        hold_prompts: see `Questions`.
    """
    evaluation = Evaluation([[] for _ in methods])
    start = time.perf_counter()
    for batch in tqdm(list(batches(samples, batch_size)), leave=False, unit="batch"):
        questions = Questions(model, processor, batch, not fresh, hold_prompts)
        for method, answers in zip(methods, evaluation.answers, strict=True):
            config = model.config
            look_layer = None if fresh else method.look_layer(config)
            prepared = questions.ready(look_layer, method.encode_tolerance(config))
            given, seconds = answer_batch(
                model, processor, prepared, method, max_new_tokens, metric
            )
            answers += given
            evaluation.seconds_in_model += seconds
        evaluation.seconds_in_model += questions.seconds
    evaluation.seconds = time.perf_counter() - start
    return evaluation


def answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: PreparedBatch,
    method: Method,
    max_new_tokens: int = 16,
    metric: Metric = exact_match,
) -> tuple[list[Answer], float]:
    """Answers of one method to a batch, and the seconds spent in the model."""
    presented = [method.present(sample, processor) for sample in batch.samples]
    shown, encoding = batch, 0.0
    if any(new is not old for new, old in zip(presented, batch.samples, strict=True)):
        questions = Questions(model, processor, presented)
        shown, encoding = questions.ready(), questions.seconds
    looks = method.looks_into_encoder and not shown.encoder_reading
    inputs = shown.encoded
    if looks:
        inputs = shown.inputs | {"redundant_patches": False}
    sizes = ModelSizes.of(model.config)
    with method.applied(model, processor, shown) as application:
        start = time.perf_counter()
        generated = model.generate(
            **inputs,
            **application.options,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        completions = generated.sequences[:, shown.inputs["input_ids"].shape[1] :].tolist()
        seconds = encoding + time.perf_counter() - start
    cache, counts = cache_of(generated), shown.visual_counts
    by_layer = application.tokens_by_layer(cache, counts, sizes).tolist()
    texts = processor.batch_decode(completions, skip_special_tokens=True)
    lengths = shown.inputs["attention_mask"].sum(1).tolist()
    answers = [
        Answer(
            sample,
            text.strip(),
            metric(text, sample.answer),
            visual,
            length - visual_shown,
            tuple(layers),
            encoded,
        )
        for sample, text, visual, length, visual_shown, layers, encoded in zip(
            batch.samples,
            texts,
            batch.visual_counts,
            lengths,
            counts,
            by_layer,
            encoded_counts(cache, counts),
            strict=True,
        )
    ]
    return answers, seconds


def summarise(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Per group, and over all: questions, mean score and mean share of visual tokens kept.

    Where questions are of several kinds, each kind is a group as well.
    """
    groups: dict[str, list[Answer]] = {"all": list(answers)}
    several_kinds = len({answer.sample.kind for answer in answers}) > 1
    for answer in answers:
        if answer.sample.group != "all":
            groups.setdefault(answer.sample.group, []).append(answer)
        if several_kinds and answer.sample.kind:
            groups.setdefault(answer.sample.kind, []).append(answer)
    return {
        name: {
            "questions": len(members),
            "accuracy": sum(answer.score for answer in members) / len(members),
            "retention": sum(answer.kept for answer in members) / len(members),
        }
        for name, members in groups.items()
    }


def retention_by_row(record: GlimpseRecord, visual_counts: list[int]) -> list[float]:
    """The kept share of each prompt's visual tokens, whatever images and views they are of."""
    rows = record.keep_mask.split(visual_counts)
    return [row.float().mean().item() if len(row) else 1.0 for row in rows]


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Batches of images of one size, so that no prompt is padded for another's image.

    Questions about one image follow one another.
    """
    ordered = by_size(samples)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def by_size(samples: Sequence[Sample]) -> list[Sample]:
    """Questions in the order in which `evaluate` asks them."""
    return sorted(samples, key=lambda sample: (sample.image.size, sample.path))
