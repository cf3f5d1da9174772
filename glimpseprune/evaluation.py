"""Accuracy and retention of a model over questions about images, one result a setting."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.glimpse_record import GlimpseRecord

from .loading import prepare


@dataclass(frozen=True)
class Sample:
    """One question about one image; `group` names what results are broken down by."""

    image: Image.Image
    question: str
    answer: str
    group: str = "all"


Options = Callable[[list[int]], dict[str, object]]
"""Options of `generate` for a batch, given each row's number of visual tokens."""


def all_tokens(visual_counts: list[int]) -> dict[str, object]:
    """The stock model."""
    return {"prune": False}


def pruned(**settings: object) -> Options:
    """The model's own pruning, with settings for this run."""
    return lambda visual_counts: dict(settings)


def random_tokens(max_keep_ratio: float, seed: int) -> Options:
    """As many tokens as the bound allows, drawn blindly: what a mask has to beat."""
    generator = torch.Generator().manual_seed(seed)

    def options(visual_counts: list[int]) -> dict[str, object]:
        ranks = [torch.randperm(count, generator=generator) for count in visual_counts]
        masks = [
            rank < max(1, int(max_keep_ratio * count))
            for rank, count in zip(ranks, visual_counts, strict=True)
        ]
        return {"visual_keep_mask": torch.cat(masks)}

    return options


@dataclass
class Result:
    """Counts of one setting, whole and by group."""

    correct: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    questions: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    retention: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, group: str, correct: bool, retention: float) -> None:
        for name in ("all", group) if group != "all" else ("all",):
            self.correct[name] += correct
            self.questions[name] += 1
            self.retention[name] += retention

    def summary(self) -> dict[str, dict[str, float]]:
        """Per group: questions, exact-match accuracy, mean retention over the questions."""
        return {
            name: {
                "questions": count,
                "accuracy": self.correct[name] / count,
                "retention": self.retention[name] / count,
            }
            for name, count in self.questions.items()
        }


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: list[Sample],
    options: Options,
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> Result:
    """Answer every question greedily and compare with the reference by exact match.

    Retention of a question is kept over all visual tokens of its prompt; means are over questions.
    """
    result = Result()
    for batch in tqdm(list(_batches(samples, batch_size)), leave=False):
        inputs = prepare(
            processor, [sample.image for sample in batch], [sample.question for sample in batch]
        ).to(model.device)
        visual_counts = model.model.visual_counts(**inputs)
        generated = model.generate(
            **inputs,
            **options(visual_counts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        completions = generated.sequences[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(completions, skip_special_tokens=True)
        retention = [1.0] * len(batch)
        if hasattr(generated.past_key_values, "glimpse"):
            retention = retention_by_row(generated.past_key_values.glimpse, visual_counts)
        for sample, answer, share in zip(batch, answers, retention, strict=True):
            result.add(sample.group, answer.strip() == sample.answer.strip(), share)
    return result


def retention_by_row(record: GlimpseRecord, visual_counts: list[int]) -> list[float]:
    """The kept share of each prompt's visual tokens, whatever images and views they are of."""
    rows = record.keep_mask.split(visual_counts)
    return [row.float().mean().item() if len(row) else 1.0 for row in rows]


def _batches(samples: list[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Batches of images of one size, so that no prompt is padded for another's image."""
    by_size = sorted(samples, key=lambda sample: sample.image.size)
    for start in range(0, len(by_size), batch_size):
        yield by_size[start : start + batch_size]
