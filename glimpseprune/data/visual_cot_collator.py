"""Batches of questions, answers and evidence masks for training with a prompt boundary.

Prompts are padded on the left and completions on the right, so that one column, `prompt_length`,
divides prompt and completion in every row.
"""

from collections.abc import Sequence

import torch
from transformers import ProcessorMixin

from modeling_glimpseprune.processing_glimpseprune import ImageLayout, QwenProcessorMixin
from modeling_glimpseprune.stock import TRANSFORMERS_5

from ..images import open_image
from .visual_cot import VisualCoTRow, visible_evidence

IGNORED_LABEL = -100
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")
ROW_INPUTS = ("image_grid_thw",)  # inputs of an image that the language model wants for each row


class VisualCoTCollator:
    """Turns groups of questions into a batch.

    A row is the chat template's prompt (image, then question) and the answer with the tokenizer's
    end-of-sequence token; a row without an answer has an empty completion. An image that several
    rows ask about is processed once.

    Args:
        processor: a GlimpsePrune processor.
        min_pixels, max_pixels: bounds on the processed image's area; default: the processor's. Only
            Qwen's image processor has any.

    Calling it with groups of rows returns, with B rows, `prompt_length` P, completions of at most C
    tokens, U different images and N visual tokens over all rows:

    - `input_ids`, `attention_mask`, `labels`: `(B, P + C)`; labels are -100 outside of completions;
    - `mm_token_type_ids`: `(B, P + C)`, 1 at visual tokens (Qwen on transformers 5 only);
    - `visuals`: what the vision encoder takes of the U images, in the order in which rows first
      show them;
    - `image_grid_thw`: `(B, 3)`, the patch grid of each row's image (Qwen only);
    - `image_index`: `(B,)`, which of the U images each row shows;
    - `evidence_mask`: `(N,)` bool, visual tokens in prompt order, row after row;
    - `prompt_length`: P;
    - `names`: for each row its image and question, for messages.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.size = {}
        if (min_pixels, max_pixels) != (None, None):
            self.size = {
                "size": _size(dict(processor.image_processor.size), min_pixels, max_pixels)
            }

    def __call__(self, groups: Sequence[Sequence[VisualCoTRow]]) -> dict:
        rows = [row for group in groups for row in group]
        paths = list(dict.fromkeys(row.image for row in rows))
        images = self.processor.image_processor(
            images=[open_image(path) for path in paths], return_tensors="pt", **self.size
        )
        index = [paths.index(row.image) for row in rows]
        layouts = self.processor.image_layouts(images)
        evidence = [
            self._evidence(row, layouts[image]) for row, image in zip(rows, index, strict=True)
        ]
        prompts = [
            self._prompt(row, layouts[image].placeholders)
            for row, image in zip(rows, index, strict=True)
        ]
        completions = [self._completion(row) for row in rows]
        return {
            **self._text_inputs(prompts, completions),
            **{name: images[name][index] for name in ROW_INPUTS if name in images},
            "visuals": dict(images),
            "image_index": torch.tensor(index),
            "evidence_mask": torch.cat(evidence),
            "prompt_length": max(map(len, prompts)),
            "names": [f"{row.image}: {row.question!r}" for row in rows],
        }

    def _evidence(self, row: VisualCoTRow, layout: ImageLayout) -> torch.Tensor:
        """Which of a row's visual tokens show evidence: `(n,)` bool, view after view."""
        return visible_evidence(self.processor, row.boxes, row.width, row.height, layout.grids)

    def _prompt(self, row: VisualCoTRow, num_placeholders: int) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": row.question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text).input_ids
        if ids.count(self.image_token_id) != 1:
            raise ValueError(
                f"the prompt of {row.question!r} must hold {self.processor.image_token} once, for "
                f"its image; it holds it {ids.count(self.image_token_id)} times"
            )
        place = ids.index(self.image_token_id)
        return [*ids[:place], *[self.image_token_id] * num_placeholders, *ids[place + 1 :]]

    def _completion(self, row: VisualCoTRow) -> list[int]:
        if row.answer is None:
            return []
        text = row.answer + self.tokenizer.eos_token
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _text_inputs(
        self, prompts: list[list[int]], completions: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        padding = self.tokenizer.pad_token_id
        prompt_ids = _pad(prompts, padding, left=True)
        completion_ids = _pad(completions, padding, left=False)
        prompt_mask = _pad([[1] * len(ids) for ids in prompts], 0, left=True)
        completion_mask = _pad([[1] * len(ids) for ids in completions], 0, left=False)
        labels = completion_ids.masked_fill(completion_mask == 0, IGNORED_LABEL)
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.cat([prompt_mask, completion_mask], dim=1),
            "labels": torch.cat([torch.full_like(prompt_ids, IGNORED_LABEL), labels], dim=1),
        }
        if TRANSFORMERS_5 and isinstance(self.processor, QwenProcessorMixin):
            inputs["mm_token_type_ids"] = (input_ids == self.image_token_id).int()
        return inputs


def repeat_visuals(
    visuals: dict[str, torch.Tensor], index: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the vision encoder takes of a batch's different images, once for every row.

    Args:
        visuals, index: `visuals` and `image_index` of a batch.
    """
    pixels, grids = visuals["pixel_values"], visuals.get("image_grid_thw")
    if grids is None:
        return {name: visuals[name][index] for name in visuals}
    of_images = pixels.split(grids.prod(1).tolist())  # patches of all images in one tensor
    repeated = torch.cat([of_images[image] for image in index.tolist()])
    return {"pixel_values": repeated, "image_grid_thw": grids[index]}


def _size(size: dict, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """The image processor's bounds, with those given put in their place."""
    if "longest_edge" not in size:
        raise ValueError(
            "min_pixels and max_pixels must be left out: this model's images have one size"
        )
    shortest, longest = size["shortest_edge"], size["longest_edge"]
    bounds = {
        "shortest_edge": shortest if min_pixels is None else min_pixels,
        "longest_edge": longest if max_pixels is None else max_pixels,
    }
    if not 0 < bounds["shortest_edge"] <= bounds["longest_edge"]:
        raise ValueError(
            "min_pixels must be positive and at most max_pixels, got "
            f"{bounds['shortest_edge']} and {bounds['longest_edge']}"
        )
    return bounds


def _pad(rows: list[list[int]], value: int, left: bool) -> torch.Tensor:
    """`(rows, longest)` of token ids."""
    length = max(map(len, rows))
    if left:
        padded = [[value] * (length - len(row)) + row for row in rows]
    else:
        padded = [row + [value] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long)
