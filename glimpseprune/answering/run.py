"""A run from questions to a file of answers, begun or gone on with."""

from pathlib import Path

from tqdm.auto import tqdm

from .job import Engine, Job
from .journal import Journal, begin, beside
from .results import check_format, write_answers


def answer_questions(
    job: Job, output: Path, settings: dict[str, object], engine: Engine
) -> tuple[int, int | None]:
    """Answer all questions, or those that a run before this one left.

    Args:
        output: `.jsonl` or `.parquet`; complete once it is there.
        settings: what answers depend on; a run is gone on with under the same ones only.

    Returns:
        How many rows there are, and how many of them have errors: None where the run was complete
        before.

    Raises:
        ValueError: when the output is another run's, or cannot be written.
    """
    rows = len(job.questions)
    check_format(output)
    if not rows:
        raise ValueError("there are no questions to answer")
    if not begin(output, settings):
        beside(output, "journal").unlink(missing_ok=True)
        return rows, None
    journal = Journal(output, rows, job.window_rows)
    with journal.opened(), tqdm(total=rows, unit="row") as bar:

        def report() -> None:
            bar.update(journal.answered - bar.n)
            bar.set_postfix(errors=journal.failed, refresh=False)

        report()
        if journal.answered < rows:
            engine(job, journal, report)
        if journal.answered != rows:
            raise ValueError(
                f"{rows - journal.answered} rows have no answer yet: start the same command again"
            )
        write_answers(output, journal.answers(), job.masks)
    journal.path.unlink()
    return rows, journal.failed
