"""One method's answers, and its figures by kind of question.

    python -m benchmarks.deep_base.rows FILE

prints the tables of a file that `python -m benchmarks.deep_base` wrote.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.report.statistics import Bootstrap
from glimpseprune.baselines.catalogue import label
from glimpseprune.baselines.method import Method
from glimpseprune.evaluation import Answer
from glimpseprune.sample import Sample
from glimpseprune.tiny_world.pages import TOKEN

ALL = "all"


@dataclass(frozen=True)
class Row:
    """A method's answers to all questions, in one order for all methods.

    Attributes:
        recall: part of each question's evidence tokens that were kept, nan where it has none;
            empty for methods of which it is not known.
    """

    name: str
    answers: list[Answer]
    recall: list[float]

    @classmethod
    def of(
        cls,
        method: Method,
        answers: list[Answer],
        kept: Sequence[torch.Tensor] = (),
        evidence: Sequence[torch.Tensor] = (),
    ) -> "Row":
        """`kept` and `evidence` hold one `(n,)` bool a question."""
        pairs = zip(kept, evidence, strict=True)
        recall = [float(keep[shown].float().mean()) for keep, shown in pairs]
        return cls(label(method), answers, recall)

    def figures(self, base: "Row", bootstrap: Bootstrap) -> dict[str, object]:
        """Figures by kind; gains are over the base's answers, question by question."""
        samples = [answer.sample for answer in self.answers]
        scores = [answer.score for answer in self.answers]
        gains = [
            answer.score - other.score
            for answer, other in zip(self.answers, base.answers, strict=True)
        ]
        kept = [answer.kept for answer in self.answers]
        shares = [evidence_share(sample) for sample in samples]
        figures = {
            "accuracy": of_kinds(scores, samples, bootstrap),
            "over_base": of_kinds(gains, samples, bootstrap),
            "kept": of_kinds(kept, samples, bootstrap),
            "kept_with_evidence": _correlation(kept, shares),
        }
        figures["by_size"] = {
            size: {
                "accuracy": of_kinds(scores, samples, bootstrap, size),
                "kept": of_kinds(kept, samples, bootstrap, size),
            }
            for size in sorted(set(map(size_of, samples)), key=_area)
        }
        if self.recall:
            figures["evidence_kept"] = of_kinds(self.recall, samples, bootstrap)
        return figures


def evidence_share(sample: Sample) -> float:
    """Share of the page's area that evidence boxes cover."""
    area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in sample.boxes)
    return area / (sample.size[0] * sample.size[1])


def size_of(sample: Sample) -> str:
    """Rows and columns of the page in tokens, such as 8x12."""
    width, height = sample.size
    return f"{height // TOKEN}x{width // TOKEN}"


def _area(size: str) -> int:
    rows, columns = map(int, size.split("x"))
    return rows * columns


def of_kinds(
    values: Sequence[float],
    samples: Sequence[Sample],
    bootstrap: Bootstrap,
    size: str | None = None,
) -> dict[str, dict[str, float]]:
    """Over all questions, or those about pages of a size, and by kind: mean with its interval, and
    how many questions."""
    values = np.asarray(values, dtype=np.float64)
    kinds = np.asarray([sample.kind for sample in samples])
    among = np.asarray([size in (None, size_of(sample)) for sample in samples])
    chosen = {ALL: among} | {kind: among & (kinds == kind) for kind in sorted(set(kinds))}
    figures = {}
    for name, of_kind in chosen.items():
        of_kind = of_kind & ~np.isnan(values)
        if of_kind.any():
            figures[name] = asdict(bootstrap.estimate_where(values, of_kind))
            figures[name]["questions"] = int(of_kind.sum())
    return figures


def _correlation(kept: Sequence[float], shares: Sequence[float]) -> float | None:
    """Pearson's, over questions; None where one of the two never varies."""
    if np.ptp(kept) == 0 or np.ptp(shares) == 0:
        return None
    return float(np.corrcoef(kept, shares)[0, 1])


def table(report: dict) -> str:
    """A Markdown table by kind: accuracy, evidence kept in brackets, and the share kept."""
    rows = report["rows"]
    kinds = list(next(iter(rows.values()))["accuracy"])
    lines = [
        "| | "
        + " | ".join([*kinds, *(f"kept, {kind}" for kind in kinds)])
        + " | kept by evidence, r |",
        "|---" * (2 * len(kinds) + 2) + "|",
    ]
    for name, figures in rows.items():
        cells = [_cell(figures, kind) for kind in kinds]
        correlation = figures["kept_with_evidence"]
        followed = "" if correlation is None else f"{correlation:.2f}"
        kept = [f"{figures['kept'][kind]['mean']:.3f}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join([*cells, *kept, followed]) + " |")
    return "\n".join(lines)


def table_of_sizes(report: dict) -> str:
    """A Markdown table by size of page: accuracy and, in brackets, the share kept."""
    rows = report["rows"]
    sizes = list(next(iter(rows.values()))["by_size"])
    lines = ["| | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name, figures in rows.items():
        cells = (
            "{:.3f} ({:.3f})".format(*(of_size[part][ALL]["mean"] for part in ("accuracy", "kept")))
            for of_size in figures["by_size"].values()
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(report: dict) -> str:
    """By kind, and by size."""
    return f"{table(report)}\n\n{table_of_sizes(report)}"


def _cell(figures: dict, kind: str) -> str:
    accuracy = f"{figures['accuracy'][kind]['mean']:.3f}"
    found = figures.get("evidence_kept", {}).get(kind)
    return accuracy if found is None else f"{accuracy} ({found['mean']:.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    print(tables(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))
