"""The page: tables, plots and pictures as Markdown."""

from collections.abc import Callable, Sequence

import numpy as np

from glimpseprune.baselines.catalogue import label
from glimpseprune.baselines.method import OwnPruning
from glimpseprune.baselines.resized_image import ResizedImage
from glimpseprune.sample import Sample

from .figures import Figures, Line
from .records import Record
from .statistics import LEVEL, RESAMPLES, Estimate

NOTES = f"""\
How to read it

- **Kept** is the share of a prompt's visual tokens that the last layer and the answer work on;
  **over layers** is the share that a decoder layer works on, averaged over layers: a method that
  prunes at layer K has worked on every token up to there.
- **Prefill** is the counted operations of decoder and scoring as a share of those with all tokens
  (`benchmarks/report/costs.py`), not a measured time; **with encoder** the same with the vision
  encoder's, which all methods share but for text only, the resized image and *redundant patches
  left out* (those that neighbours predict within so many grey levels; see `docs/use.md`).
- Brackets are {LEVEL:.0%} bootstrap intervals ({RESAMPLES:,} resamples of pages, since questions
  about one page are not independent). **Gain** is the difference from all tokens, question by
  question.
- Methods called *-like* follow a paper's rule with the simplifications that `docs/evaluate.md` and
  their files in `glimpseprune/baselines/` state. FastV-like and PyramidDrop-like forbid attention
  to dropped tokens, which gives the answers of shorter sequences and saves no time here.
- *Read ahead from P* is the same glimpse with `prune_layer` P and threshold 0, untrained for it;
  *trained early* is another repository, whose glimpse was trained so. Looking ahead and low-rank
  additions are counted in the prefill.
- Kept tokens keep their positions everywhere. No method but GlimpsePrune was trained, and the
  oracle is told where the evidence is.
"""


def write_page(
    title: str,
    command: str,
    settings: dict[str, object],
    figures: Figures,
    plots: dict[str, str],
    kinds: Sequence[Record],
    pictures: Sequence[tuple[str, Record, Sample]],
) -> str:
    """The page's text."""
    return "\n".join(
        [
            f"# {title}",
            "",
            f"Written by `{command}`.",
            "",
            _table(["setting", "value"], [[name, str(value)] for name, value in settings.items()]),
            "## Accuracy and cost",
            "",
            *_main_tables(figures),
            NOTES,
            *(f"![{text}]({file})\n" for file, text in plots.items()),
            *_difficulty(figures),
            *_adaptation(figures, kinds),
            *_gallery(pictures),
        ]
    )


def _main_tables(figures: Figures) -> list[str]:
    ratios = sorted({line.ratio for line in figures.lines.values() if line.ratio is not None})
    parts = ["Without a bound:", "", _lines(figures, None)]
    for ratio in ratios:
        parts += [f"At most {ratio:.1%} of the visual tokens kept:", "", _lines(figures, ratio)]
    return parts


def _lines(figures: Figures, ratio: float | None) -> str:
    lines = [line for line in figures.lines.values() if line.ratio == ratio]
    if ratio is not None:
        lines.sort(key=lambda line: -line.accuracy.mean)
    head = ["method", "accuracy", "gain", "kept", "over layers", "tokens a layer"]
    head += ["prefill", "with encoder"]
    return _table(head, [_cells(line) for line in lines])


def _cells(line: Line) -> list[str]:
    return [
        line.name + (f" ({line.seeds} seeds)" if line.seeds > 1 else ""),
        _interval(line.accuracy),
        _interval(line.gain, "+.3f"),
        f"{line.kept:.1%}",
        f"{line.over_layers:.1%}",
        f"{line.tokens_a_layer:.1f}",
        f"{line.flops:.1%}",
        "–" if line.with_encoder is None else f"{line.with_encoder:.1%}",
    ]


def _difficulty(figures: Figures) -> list[str]:
    """VTC-Bench's split (arXiv 2510.07143)."""
    parts = [
        "## Questions that a smaller image answers, and the others",
        "",
        "VTC-Bench (arXiv 2510.07143) divides questions by whether the resized image, at the same "
        "number of tokens, already answers them. Where it does not, something has to be found.",
        "",
    ]
    for ratio in sorted({line.ratio for line in figures.lines.values() if line.ratio is not None}):
        resized = figures.records_of(label(ResizedImage(ratio=ratio)))
        easy = [record.score == 1.0 for record in resized]
        hard = [not answered for answered in easy]
        rows = []
        for name, line in figures.lines.items():
            if line.ratio in (ratio, None):
                cells = [figures.accuracy_where(name, chosen)[0] for chosen in (easy, hard)]
                rows.append(
                    [line.name, *("–" if np.isnan(cell) else f"{cell:.3f}" for cell in cells)]
                )
        head = [f"at {ratio:.1%}", f"answered ({sum(easy)})", f"not answered ({sum(hard)})"]
        parts.append(_table(head, rows))
    return parts


def _adaptation(figures: Figures, kinds: Sequence[Record]) -> list[str]:
    """How the number of kept tokens follows the question."""
    records = figures.records_of(label(OwnPruning()))
    edges = np.quantile([record.evidence for record in records], [0.25, 0.5, 0.75])
    quarters = ["least evidence", "less evidence", "more evidence", "most evidence"]
    kept = [record.by_layer[-1] / record.visual for record in records]
    evidence = [record.evidence for record in records]
    alike = np.corrcoef(kept, evidence)[0, 1] if np.std(kept) and np.std(evidence) else np.nan
    parts = [
        "## How retention adapts",
        "",
        "GlimpsePrune without a bound, by group and by quarters of the share of the image that the "
        f"evidence boxes cover. That share and the kept share correlate with {alike:.2f}.",
        "",
        _groups(records, lambda record: record.group),
        _groups(records, lambda record: quarters[int(np.searchsorted(edges, record.evidence))]),
    ]
    if kinds:
        parts += [
            "By kind of question; the model card says what a repository was trained to answer, and "
            "retention can adapt where answers fail:",
            "",
            _groups(kinds, lambda record: record.group),
        ]
    return parts


def _groups(records: Sequence[Record], group_of: Callable[[Record], str]) -> str:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    head = ["", "questions", "evidence", "visual tokens", "kept tokens", "share", "accuracy"]
    by_kept = sorted(groups, key=lambda name: np.mean([r.by_layer[-1] for r in groups[name]]))
    return _table(head, [_group_cells(name, groups[name]) for name in by_kept])


def _group_cells(name: str, records: Sequence[Record]) -> list[str]:
    return [
        name,
        str(len(records)),
        f"{np.mean([record.evidence for record in records]):.1%}",
        f"{np.mean([record.visual for record in records]):.1f}",
        f"{np.mean([record.by_layer[-1] for record in records]):.1f}",
        f"{np.mean([record.by_layer[-1] / record.visual for record in records]):.1%}",
        f"{np.mean([record.score for record in records]):.3f}",
    ]


def _gallery(pictures: Sequence[tuple[str, Record, Sample]]) -> list[str]:
    parts = [
        "## Pages",
        "",
        "Left the page with dropped tokens dimmed, right the scores (GlimpsePrune, no bound). "
        "First a question of some groups that it answers, then the first that it does not.",
        "",
    ]
    for file, record, sample in pictures:
        parts += [
            f"*{sample.question}* Answer: {record.text or '(none)'} "
            f"({'right' if record.score == 1.0 else f'right is {sample.answer}'}). "
            f"Kept {record.by_layer[-1]} of {record.visual} tokens.",
            "",
            f"![{sample.question}]({file})",
            "",
        ]
    return parts


def _interval(estimate: Estimate, form: str = ".3f") -> str:
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
