"""What was answered so far, in a file that a killed process leaves readable.

Beside an output `answers.parquet` stand, while it is made, `answers.parquet.run.json` with the
settings and `answers.parquet.journal` with a line a unit: `{"window", "index", "answers"}`. A line
counts once its end is there; what a killed process left behind the last end is cut off.
"""

import json
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two runs from one output
    fcntl = None


class Journal:
    """The answers of a run, by window.

    Args:
        output: the file that is made in the end.
        num_rows: of the questions.
        window_rows: rows of a window.
    """

    def __init__(self, output: Path, num_rows: int, window_rows: int):
        self.path = beside(output, "journal")
        self.num_rows, self.window_rows = num_rows, window_rows
        self.answered = self.failed = 0
        self._places: dict[int, array] = defaultdict(partial(array, "Q"))  # of a window's lines
        self._done: dict[int, set[int]] = defaultdict(set)  # of windows that are not complete
        self._rows_done: dict[int, int] = defaultdict(int)
        self._file = None

    @contextmanager
    def opened(self) -> Iterator["Journal"]:
        """Read what is there, and write behind it.

        Raises:
            ValueError: when another process writes it.
        """
        with open(self.path, "a+b") as file:
            self._lock(file)
            self._file = file
            file.seek(0)
            end = 0
            for line in file:
                unit = _parsed(line)
                if unit is None:
                    break
                self._note(unit, end)
                end += len(line)
            file.truncate(end)
            yield self
            file.flush()
            os.fsync(file.fileno())
        self._file = None

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return -(-self.num_rows // self.window_rows)

    def open_windows(self) -> Iterator[int]:
        """Windows that lack answers."""
        for window in range(self.windows):
            if not self._is_complete(window):
                yield window

    def rows_of(self, window: int) -> int:
        """Rows of a window."""
        return min(self.window_rows, self.num_rows - window * self.window_rows)

    def done(self, window: int) -> frozenset[int]:
        """Units of a window that are answered."""
        return frozenset(self._done.get(window, ()))

    def add(self, window: int, index: int, answers: list[dict]) -> None:
        """Write down a unit's answers, all or none; those that are there already are left out."""
        if self._is_complete(window) or index in self._done.get(window, ()):
            return
        unit = {"window": window, "index": index, "answers": answers}
        line = json.dumps(unit, ensure_ascii=False).encode() + b"\n"
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        self._note(unit, place)

    def answers(self) -> Iterator[dict]:
        """All answers in the order of the questions; one window is held at a time."""
        with open(self.path, "rb") as file:
            for window in range(self.windows):
                found = []
                for place in self._places[window]:
                    file.seek(place)
                    found += json.loads(file.readline())["answers"]
                yield from sorted(found, key=lambda answer: answer["row"])

    def _is_complete(self, window: int) -> bool:
        return self._rows_done.get(window, 0) >= self.rows_of(window)

    def _note(self, unit: dict, place: int) -> None:
        window, answers = unit["window"], unit["answers"]
        self._places[window].append(place)
        self._rows_done[window] += len(answers)
        if self._is_complete(window):
            self._done.pop(window, None)
        else:
            self._done[window].add(unit["index"])
        self.answered += len(answers)
        self.failed += sum(answer["error"] is not None for answer in answers)

    def _lock(self, file) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process writes {self.path}: wait for it, or end it"
            ) from None


def begin(output: Path, settings: dict[str, object]) -> bool:
    """Begin a run, or go on with the one that was begun.

    Args:
        settings: what answers depend on.

    Returns:
        Whether there is anything to do: False where the run was completed.

    Raises:
        ValueError: when the output is another run's.
    """
    run, settings = beside(output, "run.json"), json.loads(json.dumps(settings))
    if not run.exists():
        if output.exists():
            raise ValueError(f"there is an output {output} already: remove it or name another")
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = beside(output, "run.json.partial")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(run)
        return True
    begun = json.loads(run.read_text(encoding="utf-8"))
    names = sorted(begun.keys() | settings.keys())
    changed = [name for name in names if begun.get(name) != settings.get(name)]
    if changed:
        said = [f"{name} was {begun.get(name)!r}, now {settings.get(name)!r}" for name in changed]
        raise ValueError(
            f"{output} was begun with other settings ({'; '.join(said)}): go on with the same, "
            f"name another output, or remove {output.name} and {output.name}.*"
        )
    return not output.exists()


def beside(output: Path, name: str) -> Path:
    """A file that stands beside an output while it is made."""
    return output.with_name(f"{output.name}.{name}")


def _parsed(line: bytes) -> dict | None:
    """A unit, or None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
