"""Runs of `answer` without a model: what stands in for it, and a process that can be killed."""

import argparse
import hashlib
import os
import random
import signal
import subprocess
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from glimpseprune.answering.job import Job
from glimpseprune.answering.journal import beside
from glimpseprune.answering.local_engine import answer_locally
from glimpseprune.answering.pictures import read_picture
from glimpseprune.answering.questions import open_questions
from glimpseprune.answering.ray_engine import RayPool
from glimpseprune.answering.results import answered, failed, sentence_of
from glimpseprune.answering.run import answer_questions

STAND_IN = __file__
TESTS = Path(__file__).parent


class PixelTeller:
    """Answers every question with a hash of its image's pixels, the same however it is given.

    Args:
        seconds: that a unit takes.
        reads: False takes bytes as they are.
        ends_over: rows over which the process ends, by their question; each once, where a folder is
            given in which that is noted.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        reads: bool = True,
        ends_over: tuple[str, ...] = (),
        notes: Path | None = None,
    ):
        self.seconds, self.reads, self.ends_over, self.notes = seconds, reads, ends_over, notes

    def pictures(self, unit) -> list[bytes | str]:
        return [self._picture(group) for group in unit.groups]

    def answer(self, unit, pictures) -> list[dict]:
        sleep(self.seconds)
        for row in unit.rows:
            if row.question in self.ends_over and self._is_first(row.number):
                os.kill(os.getpid(), signal.SIGKILL)
        return [
            answered(row, hashlib.sha256(picture).hexdigest()[:8], [True, False], [], 0.5, False)
            if isinstance(picture, bytes)
            else failed(row, picture, False)
            for group, picture in zip(unit.groups, pictures, strict=True)
            for row in group.rows
        ]

    def _is_first(self, number: int) -> bool:
        if self.notes is None:
            return True
        note = self.notes / str(number)
        if note.exists():
            return False
        note.touch()
        return True

    def _picture(self, group) -> bytes | str:
        if group.image is None:
            return group.rows[0].error
        if not self.reads:
            return group.image if isinstance(group.image, bytes) else group.image.encode()
        try:
            return read_picture(group.image, 10_000).tobytes()
        except Exception as error:
            return sentence_of(error)


def can_run_stand_ins(monkeypatch) -> None:
    """Let processes that a test starts find the package and this file."""
    path = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))


def run_until_done(command: list[str], output: Path, kills: int, within: float, seed: int) -> int:
    """Kill a command at random points, then let it end; returns how often it was cut short.

    Args:
        within: seconds that it works, at most, before it is killed.
    """
    generator, cut, journal = random.Random(seed), 0, beside(output, "journal")
    for kill in range(kills):
        size = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = monotonic()
        while process.poll() is None and monotonic() - begun < 120:
            if kill % 5 == 4 or (journal.exists() and journal.stat().st_size > size):
                break  # most are cut at work, some while they begin
            sleep(0.005)
        sleep(generator.uniform(0, within))
        process.send_signal(signal.SIGKILL)
        cut += process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    return cut


class NodeTeller(PixelTeller):
    """Answers with the node of Ray's that it is on."""

    def answer(self, unit, pictures) -> list[dict]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        return [answer | {"answer": node} for answer in super().answer(unit, pictures)]


def run_stand_in(
    questions: Path,
    output: Path,
    make_answerer=PixelTeller,
    batch_size: int = 4,
    window_rows: int = 16,
    engine=answer_locally,
) -> tuple[int, int | None]:
    """Answer questions without a model."""
    job = Job(open_questions(questions), make_answerer, batch_size, window_rows)
    settings = {"batch_size": batch_size, "window": window_rows}
    return answer_questions(job, output, settings, engine)


def peak_of_memory() -> int:
    """KiB that this process held at most; `getrusage` counts what its parent held, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("questions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--reads", action="store_true")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--ray", metavar="ADDRESS")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--tell-nodes", action="store_true")
    arguments = parser.parse_args()
    teller = NodeTeller if arguments.tell_nodes else PixelTeller
    make_answerer = partial(teller, arguments.seconds, arguments.reads)
    options = {"window_rows": arguments.window}
    if arguments.ray:
        options["engine"] = RayPool(arguments.actors, address=arguments.ray)
    run_stand_in(arguments.questions, arguments.output, make_answerer, **options)
    print("peak of memory in KiB:", peak_of_memory())
