"""Answers as JSON lines, one a method and question, so that a run can go on where it stopped."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from glimpseprune.baselines.method import Method
from glimpseprune.evaluation import Answer


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        name, ratio, seed: of the method.
        number: of the question in its data set.
        page: the image file's name; questions about one page are not independent.
        group: what results are broken down by.
        evidence: share of the image that the evidence boxes cover.
        score: the metric's, in [0, 1].
        visual: visual tokens of the image as given.
        prompt: text tokens of the prompt.
        by_layer: visual tokens that each decoder layer worked on.
        encoded: visual tokens that the vision encoder worked on.
    """

    name: str
    ratio: float | None
    seed: int
    number: int
    page: str
    group: str
    evidence: float
    text: str
    score: float
    visual: int
    prompt: int
    by_layer: tuple[int, ...]
    encoded: int

    @property
    def setting(self) -> tuple[str, float | None, int]:
        return self.name, self.ratio, self.seed

    @classmethod
    def of(cls, method: Method, answer: Answer) -> "Record":
        sample = answer.sample
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in sample.boxes)
        return cls(
            method.name,
            method.ratio,
            method.seed,
            sample.number,
            sample.path.name,
            sample.group,
            area / (sample.size[0] * sample.size[1]),
            answer.text,
            answer.score,
            answer.visual,
            answer.prompt,
            answer.by_layer,
            answer.encoded,
        )


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, which is made if there is none."""
    with open(path, "a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read_records(path: Path) -> list[Record]:
    """All records of a file; none if there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as lines:
        fields = map(json.loads, lines)
        return [Record(**each | {"by_layer": tuple(each["by_layer"])}) for each in fields]
