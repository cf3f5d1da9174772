"""Learning curves of a base from its log, and a table of what it answered at each stage's end.

    python -m benchmarks.deep_base.curves --runs runs/deep --output FILE

Accuracies are of training questions, all answer tokens right, teacher forced, averaged over steps.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from glimpseprune.tiny_world.pages import KINDS
from glimpseprune.tiny_world.training import LOG_FILE

EVERY = 40
OF_KIND = "accuracy_of_"
OF_PARTS = {"left": "left_accuracy", "ahead": "ahead_accuracy"}
SHOWN = ("accuracy", "answer_loss", "link_loss", "ahead_loss", *OF_PARTS.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of bases")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    report = {}
    for run in arguments.runs:
        lines = (run / LOG_FILE).read_text(encoding="utf-8").splitlines()
        report[run.name] = curve([json.loads(line) for line in lines])
        print(f"{run.name}\n\n{table(report[run.name])}\n")
    settings = {"averaged over steps": EVERY}
    rows = ",\n".join(
        f'"{name}": [\n' + ",\n".join(map(json.dumps, points)) + "]"
        for name, points in report.items()
    )
    arguments.output.write_text(
        f'{{"settings": {json.dumps(settings)},\n"curves": {{{rows}}}}}\n', encoding="utf-8"
    )


def curve(steps: Sequence[dict]) -> list[dict]:
    """Means over `EVERY` steps of one stage, or what is left of it."""
    points, window = [], []
    for position, step in enumerate(steps):
        window.append(step)
        ends = position + 1 == len(steps) or steps[position + 1]["stage"] != step["stage"]
        if ends or len(window) == EVERY:
            points.append(
                {name: step[name] for name in ("step", "stage", "minutes")} | means(window)
            )
            window = []
    return points


def means(window: Iterable[dict]) -> dict[str, float]:
    """Of each figure, over the steps that have one: a kind is not asked in each."""
    found = defaultdict(list)
    for step in window:
        for name, value in step.items():
            if (name in SHOWN or name.startswith(OF_KIND)) and value == value:
                found[name].append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}


def table(points: Sequence[dict]) -> str:
    """A Markdown table: accuracies at each stage's end, by kind and of what states are to hold."""
    columns = {kind: OF_KIND + kind for kind in KINDS} | OF_PARTS
    columns = {
        title: name for title, name in columns.items() if any(name in point for point in points)
    }
    lines = ["| stage | up to step | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    last_of = {point["stage"]: point for point in points}
    for stage, point in last_of.items():
        cells = (f"{point[name]:.2f}" if name in point else "" for name in columns.values())
        lines.append(f"| {stage} | {point['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
