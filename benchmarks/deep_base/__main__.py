"""A glimpse on the deeper base, late and early, against baselines, by kind of question.

    python -m benchmarks.deep_base --late runs/deep_late --output FILE

Thresholds keep 11 % of the tokens of validation questions. The late glimpse is read ahead from
every layer given, without training; `--early` adds repositories trained to be read ahead.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from benchmarks.report.statistics import Bootstrap
from benchmarks.versions import versions
from glimpseprune.baselines.fastv import FastV
from glimpseprune.baselines.method import Method, OwnPruning, TextOnly
from glimpseprune.baselines.oracle_evidence import OracleEvidence
from glimpseprune.baselines.random_tokens import RandomTokens
from glimpseprune.baselines.raw_attention import RawLastToken
from glimpseprune.baselines.resized_image import ResizedImage
from glimpseprune.baselines.scorer import AtGlimpseLayer, BeforeDecoder
from glimpseprune.calibration import score_questions, threshold_for
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.commands.make_pages import parse_grid
from glimpseprune.evaluation import Answer, by_size, evaluate
from glimpseprune.loading import load_model
from glimpseprune.sample import Sample

from .rows import Row, evidence_share, of_kinds, tables

WANTED = 0.11
RATIOS = (0.111, 0.222, 0.333)
ENOUGH = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--late", required=True, help="repository whose glimpse is read late")
    parser.add_argument(
        "--early",
        nargs="+",
        default=[],
        help="repositories whose glimpse was trained to be read ahead",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--kinds", nargs="+", default=["value"])
    parser.add_argument("--grids", nargs="+", type=parse_grid, default=[], help="such as 8x8 24x32")
    parser.add_argument(
        "--prune-layers", type=int, nargs="*", default=[], help="to read ahead from"
    )
    parser.add_argument("--questions", type=int, default=1000, help="test questions, of all kinds")
    parser.add_argument("--validation", type=int, default=400, help="questions for thresholds")
    parser.add_argument("--no-baselines", action="store_true")
    arguments = parser.parse_args()
    report = compare(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(tables(report))


def compare(arguments: argparse.Namespace) -> dict:
    """Ask every method; the content of the JSON file."""
    validation, test = (
        by_size(
            read_samples(
                None, None, number, 0, tuple(arguments.kinds), split, grids=tuple(arguments.grids)
            )
        )
        for split, number in (
            ("validation", arguments.validation),
            ("test", arguments.questions),
        )
    )
    bootstrap = Bootstrap([sample.path.name for sample in test])
    rows: list[Row] = []
    model, processor = load_model(arguments.late)
    late = model.config.glimpse_layer
    if not arguments.no_baselines:
        rows += answered(model, processor, test, baselines())
    else:
        rows += answered(model, processor, test, [Method()])
    layers = sorted({late, *arguments.prune_layers}, reverse=True)
    rows += glimpsed("late, read at {}", model, processor, validation, test, layers)
    for repository in arguments.early:
        model, processor = load_model(repository)
        early = [model.config.prune_layer]
        rows += glimpsed(trained_early(model.config), model, processor, validation, test, early)
    base = rows[0]
    report = {
        "settings": describe(arguments, late),
        "evidence": of_kinds([evidence_share(sample) for sample in test], test, bootstrap),
        "rows": {row.name: row.figures(base, bootstrap) for row in rows},
    }
    for figures in report["rows"].values():
        figures["kinds below 99 % of the base"] = [
            kind
            for kind, accuracy in figures["accuracy"].items()
            if accuracy["mean"] < ENOUGH * report["rows"][base.name]["accuracy"][kind]["mean"]
        ]
    return report


def trained_early(config: PretrainedConfig) -> str:
    """How rows of a glimpse that was trained to be read ahead are called, `{}` being P."""
    corrected = config.stale_rank or config.glimpse_lora_rank
    return f"trained early{'' if corrected else ' without corrections'}, read at {{}}"


def baselines() -> list[Method]:
    """All tokens, then what needs no training."""
    methods = [Method(), TextOnly(), OracleEvidence()]
    for ratio in RATIOS:
        methods += [
            RawLastToken(ratio=ratio),
            FastV(ratio=ratio),
            ResizedImage(ratio=ratio),
            AtGlimpseLayer("random, at layer K", ratio, 0, RandomTokens(0)),
            BeforeDecoder("random, before the decoder", ratio, 0, RandomTokens(0)),
        ]
    return methods


def answered(model, processor, test: Sequence[Sample], methods: Sequence[Method]) -> list[Row]:
    """A row for each method, without a word on which tokens it keeps."""
    answers = evaluate(model, processor, test, methods).answers
    return [Row.of(method, given) for method, given in zip(methods, answers, strict=True)]


def glimpsed(
    name: str,
    model,
    processor,
    validation: Sequence[Sample],
    test: Sequence[Sample],
    layers: Sequence[int],
) -> list[Row]:
    """The model's own glimpse read at layers: by a threshold for each, and within each ratio."""
    chosen, _ = score_questions(model, processor, validation, layers, 16)
    importance, evidence = score_questions(model, processor, test, layers, 16)
    methods, kept = [], []
    for layer in layers:
        threshold = threshold_for(chosen[layer], WANTED)
        at_layer = {"prune_layer": layer, "name": name.format(layer)}
        methods.append(OwnPruning(prune_threshold=threshold, **at_layer))
        kept.append([logits.sigmoid() > threshold for logits in importance[layer]])
        for ratio in RATIOS:
            methods.append(OwnPruning(prune_threshold=0.0, ratio=ratio, **at_layer))
            kept.append([highest(logits, ratio) for logits in importance[layer]])
    answers: list[list[Answer]] = evaluate(model, processor, test, methods).answers
    return [
        Row.of(method, given, keep, evidence)
        for method, given, keep in zip(methods, answers, kept, strict=True)
    ]


def highest(logits: torch.Tensor, ratio: float) -> torch.Tensor:
    """`(n,)` bool, True at the best-scored share."""
    keep = torch.zeros_like(logits, dtype=torch.bool)
    keep[logits.topk(max(1, int(ratio * len(logits)))).indices] = True
    return keep


def describe(arguments: argparse.Namespace, late: int) -> dict[str, object]:
    """What all rows share, and versions."""
    return {
        **{name: str(value) for name, value in vars(arguments).items()},
        "glimpse layer K": late,
        "threshold keeps": WANTED,
        **versions(),
    }


if __name__ == "__main__":
    main()
