"""One process that answers unit after unit, and reads the images of the next ones meanwhile."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .job import Job
from .journal import Journal
from .units import Unit

UNITS_AHEAD = 2


def answer_locally(job: Job, journal: Journal, report: Callable[[], None]) -> None:
    """Answer what the journal lacks; see `Engine`."""
    answerer = job.make_answerer()
    waiting: deque[tuple[Unit, Future]] = deque()

    def answer_first() -> None:
        unit, pictures = waiting.popleft()
        journal.add(unit.window, unit.index, answerer.answer(unit, pictures.result()))
        report()

    with ThreadPoolExecutor(1) as reader:
        for window in journal.open_windows():
            for unit in job.units(window, journal.done(window)):
                waiting.append((unit, reader.submit(answerer.pictures, unit)))
                if len(waiting) > UNITS_AHEAD:
                    answer_first()
        while waiting:
            answer_first()
