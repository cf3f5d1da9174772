"""One question about one image, as evaluation asks it."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .data.visual_cot import Box


@dataclass(frozen=True)
class Sample:
    """A question with its reference answer.

    Attributes:
        image: the picture, or None for a question asked without it.
        group: what results are broken down by.
        kind: what sort of question it is, where the data say so.
        boxes: where the evidence is, in pixels of a `size` image.
        size: `(width, height)` that the boxes refer to.
        path: the image file; questions of one file belong together.
        number: the question's number in its data set.
    """

    image: Image.Image | None
    question: str
    answer: str
    group: str = "all"
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] = (1, 1)
    path: Path = Path()
    number: int = 0
    kind: str | None = None
