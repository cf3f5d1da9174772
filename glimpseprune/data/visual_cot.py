"""Questions with evidence boxes, from files of Visual-CoT (arXiv 2403.16999).

Two forms are read. JSON lines (`.jsonl`) are Visual-CoT's metadata, and the tiny world's: each line
holds `question`, `answer`, `image` (a path relative to a folder), `bboxs` (a list of
`[x0, y0, x1, y1]` in pixels, ends excluded), `dataset`, and the `width` and `height` that the boxes
refer to; it may hold `kind`, what sort of question it is. JSON (`.json`) is the form of its
training set and its benchmark: a list of conversations, see `conversation_fields`. Other fields are
ignored. Boxes lie on the picture as people see it, turned where its EXIF orientation says so.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from ..images import PictureSize, picture_size

FIELDS = ("question", "answer", "image", "bboxs", "dataset", "width", "height")
BOX_REQUEST = "Please provide the bounding box"
NUMBER = r"\s*(-?[\d.]+)\s*"
BOX = re.compile(rf"###\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")

Box = tuple[float, float, float, float]


class VisualCoTError(ValueError):
    """A line or entry that cannot be used; the message begins with its file and number."""


@dataclass(frozen=True)
class VisualCoTRow:
    """One question about one image.

    Attributes:
        image: path of the image file.
        answer: None where there is none.
        boxes: where the evidence is, `(x0, y0, x1, y1)` in pixels of a `width` x `height` image.
        dataset: name of the data set that the question comes from.
        kind: what sort of question it is, where the data say so.
    """

    question: str
    answer: str | None
    image: Path
    boxes: tuple[Box, ...]
    width: int
    height: int
    dataset: str
    kind: str | None = None


class VisualCoTDataset(Dataset):
    """Questions in groups that share an image, so that a batch need encode it only once.

    Args:
        rows: the questions, in any order.
        questions_per_image: most questions in a group; with 1 every question is its own group.

    Raises:
        ValueError: when there is no row, or `questions_per_image` is not positive.
    """

    def __init__(self, rows: Sequence[VisualCoTRow], questions_per_image: int = 1):
        if not rows:
            raise ValueError("there are no questions to train or evaluate on")
        if questions_per_image < 1:
            raise ValueError(f"questions_per_image must be 1 or more, got {questions_per_image}")
        self.num_questions = len(rows)
        self._groups = _group_by_image(rows, questions_per_image)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> list[VisualCoTRow]:
        return self._groups[index]


def read_visual_cot(
    path: str | Path,
    image_folder: str | Path | None = None,
    skip_rows_without_boxes: bool = False,
    need_boxes: bool = True,
    need_answers: bool = True,
) -> list[VisualCoTRow]:
    """Read a file and check every question of it.

    Args:
        path: `.json` for conversations, else JSON lines; empty lines are skipped.
        image_folder: folder that image paths are relative to; default: the file's own.
        skip_rows_without_boxes: leave out questions without evidence instead of refusing them.
        need_boxes: False takes lines without boxes, or without the field.
        need_answers: False takes lines whose answer is empty or null, or without the field.

    Returns:
        The questions in the order of the file.

    Raises:
        FileNotFoundError: when there is no such file.
        VisualCoTError: naming file and line, when a line is not a JSON object, lacks a field or has
            one of a wrong type, has no box, has a box that is empty, inverted or outside the image,
            or names an image file that does not exist.
    """
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    rows, known_images = [], {}
    optional = {"bboxs": []} if not need_boxes else {}
    if not need_answers:
        optional["answer"] = None
    for place, parse in _entries(path, folder, known_images, optional):
        try:
            row = parse()
            if not row.boxes and skip_rows_without_boxes:
                continue
            _check_row(row, known_images, need_boxes)
        except ValueError as error:
            raise VisualCoTError(f"{path}, {place}: {error}") from error
        rows.append(row)
    return rows


def _entries(
    path: Path,
    folder: Path,
    known_images: dict[Path, PictureSize | None],
    optional: dict[str, object],
) -> Iterator[tuple[str, Callable[[], VisualCoTRow]]]:
    """Where each question stands in a file, and how to read it."""
    if path.suffix == ".json":
        for number, entry in enumerate(_read_list(path)):
            yield f"entry {number}", partial(_parse_conversation, entry, folder, known_images)
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", partial(_parse_row, line, folder, optional)


def _read_list(path: Path) -> list:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise VisualCoTError(f"{path}: not JSON: {error}") from None
    if not isinstance(entries, list):
        raise VisualCoTError(f"{path}: not a list of conversations but {type(entries).__name__}")
    return entries


def conversation_fields(entry: object) -> tuple[str, str, str, list[float]]:
    """Question, answer, image path and evidence box of one conversation.

    An entry's `image` lists the image and the image again with `###[x0, y0, x1, y1]` behind it, the
    box in its pixels; its `conversations` hold the question with a request for the box, the box,
    the cut-out image and the answer. Entries without a box have two turns and one image.

    Raises:
        ValueError: when it is of another form.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"not a JSON object but a {type(entry).__name__}")
    images, turns = entry.get("image"), entry.get("conversations")
    images = [images] if isinstance(images, str) else images
    if not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f"image must name one image or two, got {images!r}")
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError(f"conversations must hold a question and an answer, got {turns!r}")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("every turn of conversations must have a text as its value")
    question = texts[0].split(BOX_REQUEST)[0].replace("<image>", "").strip()
    found = BOX.search(images[-1])
    box = [float(edge) for edge in found.groups()] if found else []
    return question, texts[-1], images[0].split("###")[0], box


def _parse_conversation(
    entry: object, folder: Path, known_images: dict[Path, PictureSize | None]
) -> VisualCoTRow:
    """Boxes of published entries may reach over the image's edge; they are cut to it."""
    question, answer, name, box = conversation_fields(entry)
    image = folder / name
    if known_images.get(image) is None:
        known_images[image] = picture_size(image)
    width, height, _ = known_images[image]
    boxes = []
    if box:
        x0, y0, x1, y1 = box
        boxes = [_box([max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)], width, height)]
    dataset = str(entry.get("dataset", image.parent.name))
    return VisualCoTRow(question, answer, image, tuple(boxes), width, height, dataset)


def evidence_mask(
    boxes: Sequence[Box], width: float, height: float, grid: tuple[int, int]
) -> torch.Tensor:
    """Which visual tokens show evidence: those whose cell a box overlaps.

    The image is divided evenly into `grid` cells. A box that only touches a cell's edge does not
    overlap it. Boxes inside the image are never lost: each overlaps one cell at least.

    Args:
        boxes: `(x0, y0, x1, y1)` in pixels, ends excluded.
        width, height: size in pixels of the image that the boxes refer to; it need not be the size
            at which the image is processed.
        grid: rows and columns of visual tokens.

    Returns:
        `(rows * columns,)` bool in raster order.
    """
    rows, columns = grid
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        mask |= _overlap(y0, y1, height, rows)[:, None] & _overlap(x0, x1, width, columns)
    return mask.flatten()


def visible_evidence(
    processor: ProcessorMixin,
    boxes: Sequence[Box],
    width: int,
    height: int,
    grids: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Which of an image's visual tokens show evidence, view after view, as a processor cuts it.

    Args:
        processor: a GlimpsePrune processor, which says what part of an image the grids cover.
        boxes: `(x0, y0, x1, y1)` in pixels of a `width` x `height` image.
        grids: rows and columns of visual tokens of each view.

    Returns:
        `(n,)` bool.
    """
    left, top, right, bottom = processor.visible_box(width, height)
    inside = [(x0 - left, y0 - top, x1 - left, y1 - top) for x0, y0, x1, y1 in boxes]
    return torch.cat([evidence_mask(inside, right - left, bottom - top, grid) for grid in grids])


def _overlap(start: float, end: float, length: float, cells: int) -> torch.Tensor:
    """Cells of a side `length` that the interval overlaps: `(cells,)` bool.

    Multiplied out instead of divided, so whole numbers are compared exactly.
    """
    edges = torch.arange(cells + 1, dtype=torch.float64) * length
    return (edges[1:] > start * cells) & (edges[:-1] < end * cells)


def _group_by_image(
    rows: Sequence[VisualCoTRow], questions_per_image: int
) -> list[list[VisualCoTRow]]:
    by_image: dict[Path, list[VisualCoTRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    return [
        same[start : start + questions_per_image]
        for same in by_image.values()
        for start in range(0, len(same), questions_per_image)
    ]


def _parse_row(line: str, folder: Path, optional: dict[str, object]) -> VisualCoTRow:
    """Read a line; fields in `optional` may be left out."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but a {type(fields).__name__}")
    fields = optional | fields
    missing = [name for name in FIELDS if name not in fields]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    if "answer" in optional and not fields["answer"]:
        fields["answer"] = None
    for name in ("question", "answer", "image", "dataset"):
        if name == "answer" and fields[name] is None and name in optional:
            continue
        if not isinstance(fields[name], str):
            raise ValueError(f"{name} must be a string, got {fields[name]!r}")
    width, height = (_side(name, fields[name]) for name in ("width", "height"))
    if not isinstance(fields.get("kind"), str | None):
        raise ValueError(f"kind must be a string, got {fields['kind']!r}")
    if not isinstance(fields["bboxs"], list):
        raise ValueError(f"bboxs must be a list of boxes, got {fields['bboxs']!r}")
    return VisualCoTRow(
        question=fields["question"],
        answer=fields["answer"],
        image=folder / fields["image"],
        boxes=tuple(_box(box, width, height) for box in fields["bboxs"]),
        width=width,
        height=height,
        dataset=fields["dataset"],
        kind=fields.get("kind"),
    )


def _side(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return value


def _box(box: object, width: int, height: int) -> Box:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise ValueError(f"a box must be four numbers [x0, y0, x1, y1], got {box!r}")
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"box {box} is empty or inverted: it needs x0 < x1 and y0 < y1")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise ValueError(f"box {box} is outside the image of {width} x {height} pixels")
    return x0, y0, x1, y1


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_row(
    row: VisualCoTRow, known_images: dict[Path, PictureSize | None], need_boxes: bool
) -> None:
    if need_boxes and not row.boxes:
        raise ValueError(
            "bboxs is empty: without evidence there is nothing to learn from "
            "(skip_rows_without_boxes leaves such rows out)"
        )
    if known_images.get(row.image) is None and row.boxes:
        known_images[row.image] = picture_size(row.image)
    if row.image not in known_images and not row.image.is_file():
        raise ValueError(f"there is no image {row.image}")
    known_images.setdefault(row.image, None)
    if row.boxes:
        _check_turned(row, known_images[row.image])


def _check_turned(row: VisualCoTRow, size: PictureSize) -> None:
    """Refuse boxes on a picture that lies on its side."""
    if size.on_its_side and (row.width - row.height) * (size.width - size.height) < 0:
        raise ValueError(
            f"width and height are {row.width} and {row.height}, those of {row.image} as it is "
            f"stored, but its EXIF orientation turns it to {size.width} x {size.height}: give "
            "width, height and boxes of the turned picture"
        )
