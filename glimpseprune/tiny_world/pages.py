"""Pages of labels: what is on them, how they are drawn, and what can be asked about them.

A label is a two-letter key and a number of two to four digits, side by side or one above the
other, on a coloured tile. Labels lie in slots of 112 x 56 pixels, some slots stay empty, ruled
lines and noise disturb the page. A page is a pure function of (seed, split, index, settings).

No two splits can share a page, whatever the seeds: each (key, value) pair belongs to one split
by its hash, and a page of a split holds only pairs of that split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from .glyphs import glyph

TOKEN = 28  # pixels a side of one visual token: patch 14, merged two by two
SLOT_COLUMNS, SLOT_ROWS = 4, 2  # tokens a slot
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which look like digits
SPLITS = ("train", "validation", "test")
KINDS = ("value", "colour", "compare", "count", "none", "neighbour", "list", "pair")
TILE_COLOURS = {
    "red": (236, 120, 112),
    "orange": (244, 178, 104),
    "yellow": (240, 232, 120),
    "green": (140, 208, 136),
    "blue": (132, 176, 240),
    "purple": (190, 146, 226),
    "pink": (250, 190, 216),
    "white": (252, 252, 252),
}
COLOUR_NAMES = tuple(TILE_COLOURS)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class PageSettings:
    """What pages may look like. Grids are (rows, columns) of 28-pixel tokens.

    `aligned` keeps slots on the token grid; switching it off, a wider range of text sizes, more
    noise or larger grids make harder pages.
    """

    grids: tuple[tuple[int, int], ...] = ((8, 8), (8, 12), (10, 9), (10, 13), (12, 12))
    smallest_text: int = 13
    largest_text: int = 27
    filled: tuple[float, float] = (0.6, 1.0)
    most_labels: int | None = None
    noise: float = 6.0
    ruled_lines: int = 6
    aligned: bool = True
    kinds: tuple[str, ...] = ("value",)

    def __post_init__(self) -> None:
        for rows, columns in self.grids:
            if rows < SLOT_ROWS or columns < SLOT_COLUMNS:
                raise ValueError(f"grids: ({rows}, {columns}) has no room for a label (2, 4)")
        if not 8 <= self.smallest_text <= self.largest_text <= 28:
            raise ValueError(
                "smallest_text and largest_text must satisfy 8 <= smallest <= largest <= 28, "
                f"got {self.smallest_text} and {self.largest_text}"
            )
        if not 0.0 <= self.filled[0] <= self.filled[1] <= 1.0:
            raise ValueError(f"filled: {self.filled} is not a range within [0, 1]")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"kinds: {self.kinds} must be a choice of {KINDS}")


@dataclass(frozen=True)
class Mark:
    """One drawn character; `x` and `y` are the left and the top of its ink in pixels."""

    character: str
    x: int
    y: int
    width: int
    height: int

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Label:
    """A key with its value, its tile and its ink. `marks` are the key's, then the value's."""

    key: str
    value: str
    colour: str
    tile: Box
    marks: tuple[Mark, ...]
    text_size: int
    bold: bool

    @property
    def box(self) -> Box:
        """The smallest box (x0, y0, x1, y1), ends excluded, around the ink of key and value."""
        return (
            min(mark.x for mark in self.marks),
            min(mark.y for mark in self.marks),
            max(mark.x + mark.width for mark in self.marks),
            max(mark.y + mark.height for mark in self.marks),
        )


@dataclass(frozen=True)
class Page:
    """A laid-out page; `paint_seed` fixes everything that only the drawing needs."""

    rows: int
    columns: int
    labels: tuple[Label, ...]
    paint_seed: int
    settings: PageSettings = field(repr=False)

    @property
    def width(self) -> int:
        return self.columns * TOKEN

    @property
    def height(self) -> int:
        return self.rows * TOKEN


@dataclass(frozen=True)
class Question:
    """A question about a page with its answer and the boxes that one must see to answer it."""

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]


def page_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of page `index` of a split; streams of different pages are unrelated."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {SPLITS}")
    digest = hashlib.sha256(f"{split}/{seed}/{index}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def pair_split(key: str, value: str) -> str:
    """The one split whose pages may hold this pair: 80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.sha256(f"{key}={value}".encode()).digest()[0]
    return "train" if bucket < 205 else "validation" if bucket < 230 else "test"


def make_page(
    generator: np.random.Generator,
    split: str,
    settings: PageSettings,
    grid: tuple[int, int] | None = None,
) -> Page:
    """Lay out one page, of the given grid or of one drawn from the settings."""
    rows, columns = grid or settings.grids[generator.integers(len(settings.grids))]
    slots = _slots(generator, rows, columns, settings.aligned)
    share = generator.uniform(*settings.filled)
    number = max(1, round(share * len(slots)))
    if settings.most_labels is not None:
        number = min(number, settings.most_labels)
    chosen = sorted(generator.permutation(len(slots))[:number])
    taken: set[str] = set()
    labels = tuple(_label(generator, slots[slot], split, settings, taken) for slot in chosen)
    return Page(rows, columns, labels, int(generator.integers(2**32)), settings)


def draw_page(page: Page) -> np.ndarray:
    """The page as uint8 pixels `(height, width, 3)`."""
    generator = np.random.default_rng(page.paint_seed)
    paper = generator.uniform(232, 254) + generator.uniform(-4, 4, size=3)
    canvas = np.empty((page.height, page.width, 3), dtype=np.float32)
    canvas[:] = paper
    _rule_lines(canvas, generator, page.settings.ruled_lines)
    for label in page.labels:
        _paint_label(canvas, label, generator)
    if page.settings.noise:
        grain = generator.standard_normal(canvas.shape[:2], dtype=np.float32)
        canvas += (grain * generator.uniform(0, page.settings.noise))[..., None]
    return np.clip(canvas, 0, 255).astype(np.uint8)


def in_next_slot(label: Label, right: Label) -> bool:
    """Whether `right` lies in the slot on the right of the label's; tiles vary by a few pixels."""
    step = SLOT_COLUMNS * TOKEN
    return abs(right.tile[0] - label.tile[0] - step) < 8 and abs(right.tile[1] - label.tile[1]) < 8


def _slots(
    generator: np.random.Generator, rows: int, columns: int, aligned: bool
) -> list[tuple[int, int]]:
    """The top left corners (x, y) in pixels of all slots, the grid of slots moved at random."""
    down, across = rows // SLOT_ROWS, columns // SLOT_COLUMNS
    spare_x = (columns - across * SLOT_COLUMNS) * TOKEN
    spare_y = (rows - down * SLOT_ROWS) * TOKEN
    step = TOKEN if aligned else 1
    left = step * int(generator.integers(spare_x // step + 1))
    top = step * int(generator.integers(spare_y // step + 1))
    width, height = SLOT_COLUMNS * TOKEN, SLOT_ROWS * TOKEN
    return [(left + width * i, top + height * j) for j in range(down) for i in range(across)]


def _label(
    generator: np.random.Generator,
    slot: tuple[int, int],
    split: str,
    settings: PageSettings,
    taken: set[str],
) -> Label:
    key, value = _pair(generator, split, taken)
    size = int(generator.integers(settings.smallest_text, settings.largest_text + 1))
    bold = bool(generator.random() < 0.4)
    marks = _set_text(generator, key, value, size, bold)
    width = max(mark.x + mark.width for mark in marks)
    height = max(mark.y + mark.height for mark in marks)
    room_x, room_y = SLOT_COLUMNS * TOKEN - width, SLOT_ROWS * TOKEN - height
    x = slot[0] + int(generator.integers(2, room_x - 1))
    y = slot[1] + int(generator.integers(2, room_y - 1))
    placed = tuple(Mark(m.character, x + m.x, y + m.y, m.width, m.height) for m in marks)
    margins = generator.integers(0, 3, size=4)
    tile = (
        slot[0] + int(margins[0]),
        slot[1] + int(margins[1]),
        slot[0] + SLOT_COLUMNS * TOKEN - int(margins[2]),
        slot[1] + SLOT_ROWS * TOKEN - int(margins[3]),
    )
    colour = COLOUR_NAMES[generator.integers(len(COLOUR_NAMES))]
    return Label(key, value, colour, tile, placed, size, bold)


def _pair(generator: np.random.Generator, split: str, taken: set[str]) -> tuple[str, str]:
    """A key that is new to the page, with a value that makes the pair one of the split's."""
    while True:
        first, second = generator.integers(len(LETTERS), size=2)
        key = LETTERS[first] + LETTERS[second]
        if key not in taken:
            break
    taken.add(key)
    while True:
        digits = int(generator.integers(2, 5))
        value = str(generator.integers(10 ** (digits - 1), 10**digits))
        if pair_split(key, value) == split:
            return key, value


def _set_text(
    generator: np.random.Generator, key: str, value: str, size: int, bold: bool
) -> list[Mark]:
    """Key and value around the origin, side by side where that fits and the coin says so."""
    spacing = int(generator.integers(1, 3))
    gap = round(size * generator.uniform(0.35, 0.7))
    side_by_side = generator.random() < 0.5
    key_marks, key_width = _set_word(key, 0, size, bold, spacing)
    if side_by_side:
        value_marks, value_width = _set_word(value, key_width + gap, size, bold, spacing)
        if key_width + gap + value_width <= SLOT_COLUMNS * TOKEN - 4:
            return _from_origin(key_marks + value_marks)
    value_marks, _ = _set_word(value, 0, size, bold, spacing)
    line = round(size * 0.74) + min(gap, round(size * 0.4), 52 - 2 * round(size * 0.78))
    return _from_origin(key_marks + [_moved(mark, 0, line) for mark in value_marks])


def _set_word(word: str, x: int, size: int, bold: bool, spacing: int) -> tuple[list[Mark], int]:
    """A word's marks on the baseline 0 from `x` on, and the width it takes."""
    marks, start = [], x
    for character in word:
        cut = glyph(character, size, bold)
        marks.append(Mark(character, x, cut.top, cut.width, cut.opacity.shape[0]))
        x += cut.width + spacing
    return marks, x - spacing - start


def _from_origin(marks: list[Mark]) -> list[Mark]:
    left, top = min(mark.x for mark in marks), min(mark.y for mark in marks)
    return [_moved(mark, -left, -top) for mark in marks]


def _moved(mark: Mark, x: int, y: int) -> Mark:
    return Mark(mark.character, mark.x + x, mark.y + y, mark.width, mark.height)


def _rule_lines(canvas: np.ndarray, generator: np.random.Generator, most: int) -> None:
    height, width = canvas.shape[:2]
    for _ in range(int(generator.integers(most + 1))):
        shade = generator.uniform(180, 225)
        if generator.random() < 0.5:
            canvas[generator.integers(height), :] = shade
        else:
            canvas[:, generator.integers(width)] = shade


def _paint_label(canvas: np.ndarray, label: Label, generator: np.random.Generator) -> None:
    x0, y0, x1, y1 = label.tile
    canvas[y0:y1, x0:x1] = np.array(TILE_COLOURS[label.colour]) + generator.uniform(-8, 8, size=3)
    if generator.random() < 0.3:
        border = generator.uniform(40, 160)
        canvas[y0, x0:x1] = canvas[y1 - 1, x0:x1] = border
        canvas[y0:y1, x0] = canvas[y0:y1, x1 - 1] = border
    ink = generator.uniform(0, 70, size=3).astype(np.float32)
    for mark in label.marks:
        opacity = glyph(mark.character, label.text_size, label.bold).opacity[..., None]
        patch = canvas[mark.y : mark.y + mark.height, mark.x : mark.x + mark.width]
        patch += opacity * (ink - patch)
