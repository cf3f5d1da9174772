"""Ray Data answers: units flow from tasks that read questions to a pool of actors, a model each.

The process that starts the job alone writes the journal, as answers come. An actor that dies is
started again and asks its unit again. A unit over which several ended is asked row by row, and a
row over which several ended becomes a row with an error.
"""

import os
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .job import Job
from .journal import Journal
from .results import failed, sentence_of
from .units import Unit

TRIES = 3  # of a unit, before its rows are asked alone, and of a row then
ROWS_TO_GIVE_UP = 8  # with no answer among them, which is no row's fault
READERS = 4  # of windows at once
MOST_BLOCKS = 1000  # that windows are handed out in
CONTEXT = {
    "enable_progress_bars": False,
    "target_max_block_size": 1,  # so that every unit is a block, and a task of an actor
}


@dataclass(frozen=True)
class RayPool:
    """An engine: actors of a Ray cluster, or of this machine.

    Attributes:
        actors: how many; None for one a GPU, or one where there are none.
        gpus: of each actor; None for 1 where there are GPUs.
        cpus: of each actor.
        address: of the cluster, as `ray.init` takes it.
    """

    actors: int | None = None
    gpus: float | None = None
    cpus: float = 1
    address: str | None = None

    def __call__(self, job: Job, journal: Journal, report: Callable[[], None]) -> None:
        """Answer what the journal lacks; see `Engine`.

        Raises:
            ValueError: when Ray is missing, no node can read the questions, or no actor lives.
        """
        try:
            import ray
        except ImportError:
            raise ValueError(
                "--engine ray needs Ray: pip install 'glimpseprune[ray]', or leave it out to "
                "answer in one process"
            ) from None
        started = not ray.is_initialized()
        if started:
            ray.init(self.address, log_to_driver=False, include_dashboard=False)
        try:
            for answered in self._answers(job, journal):
                if isinstance(answered, str):
                    raise ValueError(answered)
                journal.add(*answered)
                report()
        except ray.exceptions.RayError as error:
            last_line = str(error).strip().splitlines()[-1]
            raise ValueError(f"Ray could not go on: {last_line}") from error
        finally:
            if started:
                ray.shutdown()

    def _answers(self, job: Job, journal: Journal) -> Iterator[tuple[int, int, list[dict]] | str]:
        """Arguments of `Journal.add`, or why the job cannot go on."""
        import ray

        windows = [
            {"window": window, "done": pickle.dumps(journal.done(window))}
            for window in journal.open_windows()
        ]
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
        blocks, resources = min(len(windows), MOST_BLOCKS), self._resources()
        context = ray.data.DataContext.get_current()
        before = {name: getattr(context, name) for name in CONTEXT}
        for name, value in CONTEXT.items():
            setattr(context, name, value)
        try:
            answers = (
                ray.data.from_items(windows, override_num_blocks=blocks)
                .map_batches(
                    read_units,
                    fn_kwargs={"job": job},
                    batch_size=1,
                    num_cpus=0,  # actors may hold all processors
                    concurrency=min(READERS, blocks),
                )
                .map_batches(
                    UnitAnswerer,
                    fn_constructor_args=(job, attempts, "num_gpus" in resources),
                    batch_size=1,
                    **resources,
                )
            )
        finally:
            for name, value in before.items():
                setattr(context, name, value)
        # Nothing is fetched ahead, as what waits here is lost with this process.
        for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(pickle.loads, batch["answers"])

    def _resources(self) -> dict[str, object]:
        """What the pool is made of, as `map_batches` takes it."""
        import ray

        there = ray.cluster_resources().get("GPU", 0)
        gpus = float(there >= 1) if self.gpus is None else self.gpus
        actors = self.actors or max(1, int(there / gpus) if gpus else 1)
        resources = {"compute": ray.data.ActorPoolStrategy(size=actors), "num_cpus": self.cpus}
        return resources | ({"num_gpus": gpus} if gpus else {})


def read_units(batch: dict, job: Job) -> Iterator[dict]:
    """What is to be asked of a window, a unit a row; or why it cannot be read."""
    for window, done in zip(batch["window"], batch["done"], strict=True):
        try:
            for unit in job.units(int(window), pickle.loads(done)):
                yield {"unit": [pickle.dumps(unit)]}
        except Exception as error:
            sentence = f"a node cannot read the questions: {sentence_of(error)}"
            yield {"unit": [pickle.dumps(sentence)]}


class UnitAnswerer:
    """What an actor of the pool does.

    Args:
        job: what it works on.
        attempts: the actor that counts.
        sees_gpus: False hides those of the machine, which are others'.
    """

    def __init__(self, job: Job, attempts, sees_gpus: bool):
        if not sees_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.answerer, self.attempts, self.masks = job.make_answerer(), attempts, job.masks

    def __call__(self, batch: dict) -> dict:
        units = [pickle.loads(each) for each in batch["unit"]]
        return {"answers": [pickle.dumps(self._answers(unit)) for unit in units]}

    def _answers(self, unit: Unit | str) -> tuple[int, int, list[dict]] | str:
        if isinstance(unit, str):
            return unit
        try:
            answers = self._tried(unit, f"unit {unit.window} {unit.index}")
            if answers is None:
                answers = []
                for row in unit.of_rows:
                    number = row.rows[0].number
                    answers += self._tried(row, f"row {number}") or self._given_up(row)
        except NoActorLives as error:
            return str(error)
        except Exception:  # an accelerator that is lost, say: another process may do better
            traceback.print_exc()
            os._exit(1)
        return unit.window, unit.index, answers

    def _tried(self, unit: Unit, name: str) -> list[dict] | None:
        """A unit's answers, or None where it was tried often enough."""
        import ray

        if ray.get(self.attempts.begin.remote(name)) > TRIES:
            return None
        answers = self.answerer.answer(unit, self.answerer.pictures(unit))
        self.attempts.end.remote(name)
        return answers

    def _given_up(self, unit: Unit) -> list[dict]:
        import ray

        if ray.get(self.attempts.give_up.remote(unit.rows[0].number)):
            raise NoActorLives(
                f"actors end over every question, over {ROWS_TO_GIVE_UP} now without an answer: "
                "see the logs of Ray for why"
            )
        return [failed(unit.rows[0], f"{TRIES} actors in turn ended over this row", self.masks)]


class NoActorLives(Exception):
    """Nothing is answered, whatever is asked."""


class Attempts:
    """Counts how often units and rows were begun that did not end."""

    def __init__(self):
        self.begun: Counter[str] = Counter()
        self.given_up: set[int] = set()
        self.any_answered = False

    def begin(self, name: str) -> int:
        """How often it was begun, this time included."""
        self.begun[name] += 1
        return self.begun[name]

    def end(self, name: str) -> None:
        """It is answered."""
        del self.begun[name]
        self.any_answered = True

    def give_up(self, row: int) -> bool:
        """Whether to give up everything, and not just one more row."""
        self.given_up.add(row)
        return not self.any_answered and len(self.given_up) >= ROWS_TO_GIVE_UP
