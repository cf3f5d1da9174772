"""The range of figures over trainings that differ by their seed alone.

    python -m benchmarks.deep_base.seeds FILE FILE ...

prints one table of files that `python -m benchmarks.deep_base` wrote of the same questions.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .rows import ALL

SAME = ("kinds", "grids", "questions", "validation")


def table(reports: Sequence[dict]) -> str:
    """A Markdown table of what all have: mean, and range in brackets, of accuracy by kind, kept
    share and correlation.

    Raises:
        ValueError: when the files are of other questions.
    """
    if any(of_questions(report) != of_questions(reports[0]) for report in reports):
        raise ValueError("the files are not of the same questions")
    rows = [report["rows"] for report in reports]
    kinds = list(next(iter(rows[0].values()))["accuracy"])
    lines = [
        f"| {len(reports)} seeds | {' | '.join(kinds)} | kept | kept by evidence, r |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for name in rows[0]:
        if any(name not in of_seed for of_seed in rows):
            continue
        figures = [of_seed[name] for of_seed in rows]
        cells = [_range([each["accuracy"][kind]["mean"] for each in figures]) for kind in kinds]
        cells.append(_range([each["kept"][ALL]["mean"] for each in figures]))
        followed = [each["kept_with_evidence"] for each in figures]
        cells.append("" if None in followed else _range(followed))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_questions(report: dict) -> list:
    """The settings that decide which questions were asked."""
    return [report["settings"].get(name) for name in SAME]


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{sum(values) / len(values):.3f}"
    return mean if low == high else f"{mean} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files = parser.parse_args().files
    print(table([json.loads(path.read_text(encoding="utf-8")) for path in files]))
