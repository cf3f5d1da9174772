"""Several questions about one page in one sequence, each as if it were alone.

A packed sequence is the prompt up to the end of the image, then one block a question. A block
sees the shared start and itself, never another block, and sits at the rotary positions it would
have alone; so its logits are those of a sequence of its own.

Blind blocks are a training device: their question's tokens do not see the image, only its last
prompt token and the answer do. A model of this size otherwise looks a value up where the question
names its key and nowhere else, which leaves nothing to see from the end of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .pages import Question

if TYPE_CHECKING:
    from transformers import ProcessorMixin

FORMS = ("key", "short", "chat")


@dataclass(frozen=True)
class PackedBatch:
    """Packed sequences of pages of one grid.

    `input_ids` `(batch, length)`, `position_ids` `(3, batch, length)`; `visible` is the bool
    attention mask `(batch, 1, length, length)`; `labels` `(batch, length)` holds the token to be
    predicted at each place, -100 where none is; `block` `(batch, length)` numbers the blocks
    from 1, 0 for the shared start and -1 for padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    labels: torch.Tensor
    block: torch.Tensor


class Packer:
    """Builds packed batches with a processor's tokenizer, remembering the tokens of texts."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self._tokenizer = processor.tokenizer
        self._known: dict[str, list[int]] = {}

    def pack(
        self,
        grid: tuple[int, int],
        questions: list[list[Question]],
        form: str = "chat",
        blind: bool = False,
    ) -> PackedBatch:
        """Pack each page's questions; `form` is the chat template's, or key and answer alone.

        With `blind`, every other block of a page is blind.
        """
        if form not in FORMS:
            raise ValueError(f"form: {form!r} is not one of {FORMS}")
        opening = self._ids("<|im_start|>user\n<|vision_start|>")
        start = opening + self._ids("<|image_pad|>") * (grid[0] * grid[1])
        start += self._ids("<|vision_end|>")
        start_positions = _start_positions(len(opening), grid)
        rows = [
            _pack_row(start, start_positions, [self._block(each, form) for each in page])
            for page in questions
        ]
        packed = _stack_rows(rows, self._tokenizer.pad_token_id)
        if blind:
            (image_token,) = set(self._ids("<|image_pad|>"))
            _blind_every_other(packed, packed.input_ids == image_token)
        return packed

    def _block(self, question: Question, form: str) -> tuple[list[int], list[int]]:
        if form == "key":
            prompt = question.text.removeprefix("What is the value of ").removesuffix("?")
        elif form == "short":
            prompt = question.text.removeprefix("What is the value of ")
        else:
            prompt = question.text + "<|im_end|>\n<|im_start|>assistant\n"
        return self._ids(prompt), self._ids(question.answer + "<|im_end|>")

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


def _blind_every_other(packed: PackedBatch, image: torch.Tensor) -> None:
    """Hide the image `(batch, length)` from the question tokens of even-numbered blocks."""
    labelled = packed.labels != -100
    following = labelled.flip(1).cummax(dim=1).values.flip(1)
    same_block_answers = packed.block[:, :, None] == packed.block[:, None, :]
    answers_before = (same_block_answers & labelled[:, None, :]).tril(0).any(dim=-1)
    question = (packed.block > 0) & ~answers_before & following
    hidden = (question & (packed.block % 2 == 0))[:, :, None] & image[:, None, :]
    packed.visible[:, 0] &= ~hidden


def misspell(
    packed: PackedBatch, letters: torch.Tensor, share: float, generator: torch.Generator
) -> None:
    """Replace a share of the letters that answers have said so far by random ones, in place.

    What is to be said stays. So the second letter of a key has to be read where the question
    leads, for the first one said leads nowhere. `letters` are the tokens to choose from.
    """
    said = torch.zeros_like(packed.block, dtype=torch.bool)
    said[:, 1:] = packed.labels[:, :-1] == packed.input_ids[:, 1:]
    said &= torch.isin(packed.input_ids, letters)
    wrong = said & (torch.rand(said.shape, generator=generator) < share)
    drawn = torch.randint(len(letters), (int(wrong.sum()),), generator=generator)
    packed.input_ids[wrong] = letters[drawn]


def _start_positions(before: int, grid: tuple[int, int]) -> np.ndarray:
    """Rotary positions `(3, length)` of `before` tokens, the image and the image's end."""
    text = np.tile(np.arange(before), (3, 1))
    down, across = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    image = before + np.stack([np.zeros_like(down), down, across])
    end = np.full((3, 1), before + max(grid))
    return np.concatenate([text, image, end], axis=1)


def _pack_row(
    start: list[int], start_positions: np.ndarray, blocks: list[tuple[list[int], list[int]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions, labels and block numbers of one packed sequence."""
    tokens, labels, numbers = list(start), [-100] * len(start), [0] * len(start)
    positions = [start_positions]
    first = int(start_positions[0, -1]) + 1
    for number, (prompt, answer) in enumerate(blocks, 1):
        length = len(prompt) + len(answer)
        tokens += prompt + answer
        labels += [-100] * (len(prompt) - 1) + answer + [-100]
        numbers += [number] * length
        positions.append(np.tile(np.arange(first, first + length), (3, 1)))
    return np.array(tokens), np.concatenate(positions, axis=1), np.array(labels), np.array(numbers)


def _stack_rows(rows: list[tuple[np.ndarray, ...]], pad: int) -> PackedBatch:
    length = max(len(row[0]) for row in rows)

    def padded(part: int, value: int) -> torch.Tensor:
        filled = [
            np.pad(
                row[part],
                [(0, 0)] * (row[part].ndim - 1) + [(0, length - len(row[0]))],
                constant_values=value,
            )
            for row in rows
        ]
        return torch.from_numpy(np.stack(filled))

    block = padded(3, -1)
    same = block[:, :, None] == block[:, None, :]
    visible = (same | (block == 0)[:, None, :]) & torch.ones(length, length).tril().bool()
    return PackedBatch(
        padded(0, pad), padded(1, 0).transpose(0, 1), visible[:, None], padded(2, -100), block
    )
