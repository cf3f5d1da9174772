"""Prompts over a prefix, from texts: images that the prefix has seen are not read again."""

from collections.abc import Iterator
from itertools import groupby, islice

import torch
from transformers import BatchFeature

from .prompt_layout import padded_left


class PrefixProcessingMixin:
    """The part of a processor that prepares texts over a prefix."""

    def over_prefix(self, prefix, text: str | list[str], images=None, **kwargs) -> BatchFeature:
        """Prepare prompts that begin with what a model has looked at.

        Args:
            prefix: what the model's `look` returned.
            text: whole prompts, one a row of the batch, with a placeholder for each image or video,
                those of the prefix included.
            images: those behind the prefix, in prompt order.
            kwargs: what the processor takes beside them.

        Returns:
            `input_ids` and `attention_mask`, `(batch, prefix + longest rest)`, and the pixels of
            the images given.

        Raises:
            ValueError: when a prompt does not begin with the prefix, or images and placeholders
                behind it differ in number.
        """
        if kwargs.get("return_tensors", "pt") != "pt":
            raise ValueError(
                f"a prefix takes return_tensors='pt', got {kwargs['return_tensors']!r}"
            )
        texts = [text] if isinstance(text, str) else list(text)
        special = kwargs.get("add_special_tokens", True)
        prompts = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        pixels, sizes = {}, []
        if images is not None:
            pixels = self.processed_images(images)
            sizes = [layout.placeholders for layout in self.image_layouts(pixels)]
        new, begun = iter(sizes), prefix.begun(len(texts)).input_ids.tolist()
        rows = [
            torch.tensor(self._expanded(row, prompt, held, new))
            for row, (prompt, held) in enumerate(zip(prompts, begun, strict=True))
        ]
        if left := len([*new]):
            raise ValueError(
                f"{left} of the {len(sizes)} images given have no placeholder behind the prefix: "
                "give those alone that the prefix has not seen"
            )
        return BatchFeature(prefix.prompts(**padded_left(rows, 0)) | pixels)

    @property
    def visual_token_ids(self) -> list[int]:
        """Ids of the placeholders."""
        ids = (getattr(self, f"{kind}_token_id", None) for kind in ("image", "video"))
        return [token_id for token_id in ids if token_id is not None]

    def _expanded(
        self, row: int, prompt: list[int], held: list[int], new: Iterator[int]
    ) -> list[int]:
        """A prompt's ids with as many placeholders as its visuals have tokens.

        Args:
            prompt: ids with one placeholder a visual.
            held: ids of the prefix, whose placeholders are repeated already.
            new: placeholders of each image behind it.
        """
        seen = iter([count for is_visual, _, count in self._runs(held) if is_visual])
        expanded: list[int] = []
        for is_visual, token_id, count in self._runs(prompt):
            if is_visual and (of_held := next(seen, None)) is not None:
                count = of_held
            elif is_visual:
                sizes = [*islice(new, count)]
                if len(sizes) < count:
                    raise ValueError(
                        f"prompt {row} has more placeholders behind the prefix than there are "
                        "images given: give those that the prefix has not seen"
                    )
                count = sum(sizes)
            expanded += [token_id] * count
        return expanded

    def _runs(self, ids: list[int]) -> Iterator[tuple[bool, int, int]]:
        """Whether it is of placeholders, its id, and how often it stands there, of each run."""
        visual = set(self.visual_token_ids)
        for token_id, run in groupby(ids):
            yield token_id in visual, token_id, len([*run])
