"""Units of work: rows of one image together, and several images together up to a batch.

Units follow from the questions alone, never from what was answered before: a run that goes on asks
the same batches as one that was never cut, so it gives the same answers.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .questions import Questions, Row


@dataclass(frozen=True)
class OfImage:
    """Rows that ask about one image.

    Attributes:
        image: as `Row` has it; None for a row that cannot be asked.
        rows: in the file's order, without their images.
    """

    image: str | bytes | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Unit:
    """What is asked, and written down, as one.

    Attributes:
        window: number of the window of rows that it is of.
        index: its number there.
        groups: its images with their rows.
    """

    window: int
    index: int
    groups: tuple[OfImage, ...]

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they are asked."""
        return [row for group in self.groups for row in group.rows]

    @property
    def of_rows(self) -> list["Unit"]:
        """Each row as a unit by itself."""
        return [
            Unit(self.window, self.index, (OfImage(group.image, (row,)),))
            for group in self.groups
            for row in group.rows
        ]


def units_of_window(
    questions: Questions, window: int, window_rows: int, batch_size: int
) -> Iterator[Unit]:
    """The units of rows `window * window_rows` up to the next window's.

    Args:
        batch_size: images are added to a unit until it has so many rows. Rows of one image within
            the window are one unit, however many they are.
    """
    start = window * window_rows
    groups = by_image(questions.rows(start, start + window_rows))
    index, gathered = 0, []
    for group in groups:
        gathered.append(group)
        if sum(len(each.rows) for each in gathered) >= batch_size:
            yield Unit(window, index, tuple(gathered))
            index, gathered = index + 1, []
    if gathered:
        yield Unit(window, index, tuple(gathered))


def by_image(rows: Iterable[Row]) -> list[OfImage]:
    """Rows by their image, in the order in which images first come; each image is held once."""
    images: dict[object, str | bytes | None] = {}
    members: dict[object, list[Row]] = {}
    for row in rows:
        key = _key(row)
        images.setdefault(key, row.image)
        members.setdefault(key, []).append(replace(row, image=None))
    return [OfImage(images[key], tuple(of_image)) for key, of_image in members.items()]


def _key(row: Row) -> object:
    if row.error is not None:
        return row.number
    return hashlib.sha256(row.image).digest() if isinstance(row.image, bytes) else row.image
