"""Questions in files: JSON lines, Parquet, or a folder that `datasets` saved.

A row has a `question`, an `image` (a path, a URL, a data URL, bytes, or `{"bytes", "path"}` as
`datasets` stores pictures) and, if it likes, an `id`. Rows are counted from 0 in the file's order.
Files are opened where rows are read, so that what is here can be sent to other processes.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

FIELDS = ("question", "image", "id")
NEEDED = ("question", "image")
ROWS_AN_OFFSET = 256
BYTES_AT_ONCE = 1 << 20
URLS = ("http://", "https://", "data:")


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        number: its place in the file.
        question: its text.
        image: an absolute path or a URL, or the bytes of an image file.
        id: what the file calls it.
        error: why it cannot be asked; there is no image then.
    """

    number: int
    question: str = ""
    image: str | bytes | None = None
    id: str | None = None
    error: str | None = None


def row_of(number: int, fields: dict[str, object], folder: Path) -> Row:
    """Take a row's fields; what is wrong with them becomes its `error`.

    Args:
        folder: what paths of images are relative to.
    """
    question, image = fields.get("question"), fields.get("image")
    name = None if fields.get("id") is None else str(fields["id"])
    if not isinstance(question, str) or not question.strip():
        return Row(number, id=name, error=f"question must be a text, got {question!r:.80}")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if not isinstance(image, (str, bytes)) or not image:
        error = f"image must be a path, a URL or bytes, got {image!r:.80}"
        return Row(number, question, id=name, error=error)
    if isinstance(image, str) and not image.startswith(URLS):
        image = str(folder / image)
    return Row(number, question, image, name)


class JsonLines:
    """Rows of a file of JSON lines; a damaged line is a row with an error, an empty one is none."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.offsets, self.length = array("Q"), 0  # of every ROWS_AN_OFFSETth row
        place = 0
        with open(path, "rb") as lines:
            for line in lines:
                if line.strip():
                    if self.length % ROWS_AN_OFFSET == 0:
                        self.offsets.append(place)
                    self.length += 1
                place += len(line)

    def __len__(self) -> int:
        return self.length

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of a range."""
        if start >= min(stop, self.length):
            return
        with open(self.path, "rb") as file:
            file.seek(self.offsets[start // ROWS_AN_OFFSET])
            lines = (line for line in file if line.strip())
            for number, line in enumerate(
                islice(lines, start % ROWS_AN_OFFSET, stop - start + start % ROWS_AN_OFFSET), start
            ):
                yield self._row(number, line)

    def _row(self, number: int, line: bytes) -> Row:
        try:
            fields = json.loads(line)
        except ValueError as error:
            return Row(number, error=f"not JSON: {error}")
        if not isinstance(fields, dict):
            return Row(number, error=f"not a JSON object but a {type(fields).__name__}")
        return row_of(number, fields, self.folder)


class ParquetFiles:
    """Rows of Parquet files, one after the other."""

    def __init__(self, paths: list[Path], folder: Path):
        self.paths, self.folder = paths, folder
        self.groups: list[tuple[Path, int, int]] = []  # file, row group, rows
        for path in paths:
            with _parquet(path) as file:
                _check_columns(path, file.schema_arrow.names)
                metadata = file.metadata
                self.groups += [
                    (path, group, metadata.row_group(group).num_rows)
                    for group in range(metadata.num_row_groups)
                ]

        self._waiting: tuple[int, Iterator[Row]] | None = None  # behind the last range

    def __len__(self) -> int:
        return sum(rows for *_, rows in self.groups)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_waiting": None}

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of a range; one that begins where the last ended goes on reading there."""
        waiting, self._waiting = self._waiting, None
        rows = waiting[1] if waiting and waiting[0] == start else self._rows_from(start)
        taken = 0
        for row in islice(rows, stop - start):
            taken += 1
            yield row
        self._waiting = start + taken, rows

    def _rows_from(self, start: int) -> Iterator[Row]:
        first = 0
        for path, group, rows in self.groups:
            if start < first + rows:
                for number, fields in enumerate(self._of_group(path, group), first):
                    if number >= start:
                        yield row_of(number, fields.as_py(), self.folder)
            first += rows

    def _of_group(self, path: Path, group: int) -> Iterator:
        """Rows as Arrow holds them, so that those passed over cost little."""
        with _parquet(path) as file:
            names = [name for name in FIELDS if name in file.schema_arrow.names]
            for batch in file.iter_batches(64, row_groups=[group], columns=names):
                yield from batch.to_struct_array()


class DatasetFolder:
    """Rows of a folder that `Dataset.save_to_disk` wrote."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.length = len(self._open())

    def __len__(self) -> int:
        return self.length

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of a range."""
        dataset = self._open()
        for number in range(start, min(stop, self.length)):
            yield row_of(number, dataset[number], self.folder)

    def _open(self):
        try:
            from datasets import Dataset, Image, load_from_disk
        except ImportError:
            raise ValueError(
                f"{self.path} is a folder that datasets saved: pip install datasets to read it"
            ) from None
        dataset = load_from_disk(str(self.path))
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"{self.path} holds the splits {', '.join(dataset)}: give the folder of one, such "
                f"as {self.path / next(iter(dataset))}"
            )
        _check_columns(self.path, dataset.column_names)
        names = [name for name in FIELDS if name in dataset.column_names]
        dataset = dataset.select_columns(names)
        if isinstance(dataset.features.get("image"), Image):
            dataset = dataset.cast_column("image", Image(decode=False))
        return dataset


Questions = JsonLines | ParquetFiles | DatasetFolder


def open_questions(path: Path, image_folder: Path | None = None) -> Questions:
    """Questions of a file or folder.

    Args:
        path: `.jsonl`, `.parquet`, a folder of `.parquet` files, or one that `datasets` saved.
        image_folder: what paths of images are relative to; default: the folder of the questions.

    Raises:
        ValueError: when it is none of these, or lacks a column.
    """
    path = path.absolute()
    folder = (image_folder or (path if path.is_dir() else path.parent)).absolute()
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        return ParquetFiles(shards, folder) if shards else DatasetFolder(path, folder)
    if not path.is_file():
        raise ValueError(f"there are no questions {path}")
    if path.suffix == ".parquet":
        return ParquetFiles([path], folder)
    if path.suffix == ".jsonl":
        return JsonLines(path, folder)
    raise ValueError(
        f"questions are JSON lines (.jsonl), Parquet (.parquet) or a folder of datasets, got {path}"
    )


def state_of(path: Path) -> list:
    """What tells whether questions changed: size and time of change of each file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = ((file.name, file.stat()) for file in files if file.is_file())
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _parquet(path: Path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is Parquet: pip install pyarrow to read it") from None
    try:
        return ParquetFile(path, buffer_size=BYTES_AT_ONCE, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _check_columns(path: Path, names: list[str]) -> None:
    if missing := [name for name in NEEDED if name not in names]:
        raise ValueError(
            f"{path} has no column {' and no column '.join(missing)}: its columns are "
            f"{', '.join(names)}"
        )
