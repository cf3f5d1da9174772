"""Exact-match accuracy of a model on held-out pages, by greedy generation through the processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from .asking import ask
from .pages import Page, PageSettings, Question, draw_page, make_page, page_generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

MOST_PAGES_WITHOUT = 1000  # a question, before it is called impossible


def held_out_questions(
    split: str,
    seed: int,
    settings: PageSettings,
    grid: tuple[int, int],
    kind: str = "value",
    questions_a_page: int = 8,
) -> Iterator[tuple[Page, Question]]:
    """Questions of a kind about page after page of a split, without end.

    Raises:
        ValueError: when page after page has no such question, as neighbours on pages of one slot.
    """
    asked = 0
    for index in count():
        generator = page_generator(seed, split, index)
        page = make_page(generator, split, settings, grid)
        for question in ask(page, kind, questions_a_page, generator):
            yield page, question
            asked += 1
        if not asked and index == MOST_PAGES_WITHOUT:
            rows, columns = grid
            raise ValueError(f"pages of {rows}x{columns} tokens have no question of kind {kind!r}")


@torch.inference_mode()
def generated_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[np.ndarray],
    texts: Sequence[str],
    max_new_tokens: int = 16,
    **generate_options: object,
) -> list[str]:
    """Greedy answers to one question an image (uint8 `(height, width, 3)`), as one batch.

    No answer about a page takes more than 12 tokens (a list's). Prompts are padded on the left;
    `generate_options` go to `model.generate` as they are.
    """
    prompts = [chat_prompt(processor, text) for text in texts]
    inputs = processor(
        text=prompts,
        images=list(images),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    tokens = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, **generate_options
    )
    answers = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)


def chat_prompt(processor: ProcessorMixin, text: str) -> str:
    """The chat template's prompt for one image and a question about it."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    message = {"role": "user", "content": content}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def generation_accuracy(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    grid: tuple[int, int],
    questions: int,
    *,
    kind: str = "value",
    split: str = "test",
    seed: int = 0,
    settings: PageSettings | None = None,
    batch_size: int = 16,
    **generate_options: object,
) -> dict[str, float | int]:
    """Exact-match accuracy over `questions` held-out questions about pages of one grid.

    Returns `{"accuracy": ..., "questions": ..., "correct": ...}`.
    """
    stream = held_out_questions(split, seed, settings or PageSettings(), grid, kind)
    remaining = islice(stream, questions)
    correct = asked = 0
    while batch := list(islice(remaining, batch_size)):
        images = [draw_page(page) for page, _ in batch]
        texts = [question.text for _, question in batch]
        answers = generated_answers(model, processor, images, texts, **generate_options)
        correct += sum(
            answer == question.answer for answer, (_, question) in zip(answers, batch, strict=True)
        )
        asked += len(batch)
    return {"accuracy": correct / asked, "questions": asked, "correct": correct}
