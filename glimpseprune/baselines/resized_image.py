"""The whole image at fewer tokens: down-sampling to an equal budget.

VTC-Bench (arXiv 2510.07143) reports that this beats many methods, and divides questions by whether
the smaller image already answers them.
"""

from dataclasses import dataclass, replace

from PIL import Image
from transformers import ProcessorMixin

from ..sample import Sample
from .method import Method
from .prompt_tokens import budget_of


@dataclass(frozen=True)
class ResizedImage(Method):
    """Shows the image at the largest token grid within the budget, with nearly its proportions."""

    name: str = "resized image"

    def present(self, sample: Sample, processor: ProcessorMixin) -> Sample:
        """Raises ValueError when the processor gives the image no tokens, or always as many."""
        height, width = _grid(sample.image, processor)
        if height * width == 0:
            raise ValueError(
                f"an image of {sample.image.width} x {sample.image.height} pixels has no "
                "high-resolution tokens, so no smaller image has fewer"
            )
        budget = budget_of(height * width, self.ratio)
        rows, columns = smaller_grid(height, width, budget)
        size = (
            round(sample.image.width * columns / width),
            round(sample.image.height * rows / height),
        )
        image = sample.image.resize(size, Image.Resampling.BICUBIC)
        found = _grid(image, processor)
        if found[0] * found[1] > budget:
            raise ValueError(
                f"an image of {size[0]} x {size[1]} pixels still makes {found[0] * found[1]} "
                f"visual tokens, more than the budget of {budget}: this processor cannot make fewer"
            )
        return replace(sample, image=image)


def smaller_grid(height: int, width: int, budget: int) -> tuple[int, int]:
    """The grid with the most tokens within the budget, sides within one of the right proportion."""
    scale = (budget / (height * width)) ** 0.5
    candidates = []
    for rows in {max(1, int(height * scale)), min(height, int(height * scale) + 1)}:
        columns = min(budget // rows, int(width * scale) + 1, width)
        if columns:
            candidates.append((rows * columns, rows, columns))
    return max(candidates)[1:]


def _grid(image: Image.Image, processor: ProcessorMixin) -> tuple[int, int]:
    processed = processor.image_processor(images=[image], return_tensors="pt")
    return processor.image_layouts(processed)[0].grids[-1]
