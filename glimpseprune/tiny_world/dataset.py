"""Pages written as PNG images beside a JSON-lines file in the Visual-CoT schema.

Each line is one question: `question`, `answer`, `image` (a path relative to the file), `bboxs`
(boxes `[x0, y0, x1, y1]` in pixels, ends excluded), `dataset`, `width`, `height`, and besides
`kind` and `split`. `datasets.load_dataset("json", data_files=...)` reads the file as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from .asking import ask
from .pages import Page, PageSettings, Question, draw_page, make_page, page_generator

DATASET_NAME = "tiny_world"


def write_pages(
    folder: Path,
    split: str,
    page_numbers: Iterable[int],
    seed: int = 0,
    settings: PageSettings | None = None,
    questions_a_kind: int = 4,
) -> Path:
    """Write the pages of a split with questions of each of the settings' kinds.

    Returns the path of the JSON-lines file, `folder/{split}.jsonl`; images are in
    `folder/images/{split}`. The same arguments always give the same questions and pixels.
    """
    settings = settings or PageSettings()
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    lines_path = folder / f"{split}.jsonl"
    with open(lines_path, "w", encoding="utf-8") as lines:
        for number in page_numbers:
            generator = page_generator(seed, split, number)
            page = make_page(generator, split, settings)
            image = images / f"{seed}_{number:06d}.png"
            Image.fromarray(draw_page(page)).save(image)
            for kind in settings.kinds:
                for question in ask(page, kind, questions_a_kind, generator):
                    record = question_record(page, question, image.relative_to(folder), split)
                    lines.write(json.dumps(record) + "\n")
    return lines_path


def question_record(page: Page, question: Question, image: Path, split: str) -> dict[str, object]:
    """One question in the Visual-CoT schema."""
    return {
        "question": question.text,
        "answer": question.answer,
        "image": image.as_posix(),
        "bboxs": [list(box) for box in question.boxes],
        "dataset": DATASET_NAME,
        "width": page.width,
        "height": page.height,
        "kind": question.kind,
        "split": split,
    }
