"""What engines work on: questions, what is answered of them, and how to make what answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .journal import Journal
from .questions import Questions
from .units import Unit, units_of_window


class AnswersUnits(Protocol):
    """What `Answerer` does, and stand-ins for it in tests and benchmarks."""

    def pictures(self, unit: Unit) -> Sequence:
        """What a unit's images are read to; another thread than the one that answers calls it."""

    def answer(self, unit: Unit, pictures: Sequence) -> list[dict]:
        """The answers of a unit's rows; never an exception that another row would not meet."""


@dataclass(frozen=True)
class Job:
    """A run's work.

    Attributes:
        questions: all of them.
        make_answerer: makes what answers; may be sent to other processes.
        batch_size: rows that make a unit full.
        window_rows: rows among which those of one image are brought together.
        masks: whether answers have masks.
    """

    questions: Questions
    make_answerer: Callable[[], AnswersUnits]
    batch_size: int
    window_rows: int
    masks: bool = False

    def units(self, window: int, done: frozenset[int]) -> Iterator[Unit]:
        """The units of a window whose numbers are not among those done."""
        for unit in units_of_window(self.questions, window, self.window_rows, self.batch_size):
            if unit.index not in done:
                yield unit


Engine = Callable[[Job, Journal, Callable[[], None]], None]
"""Adds to the journal what it lacks, and calls whenever it did."""
