"""Dropping early on the tiny base: the late glimpse, the same read ahead, and what training adds.

    python -m benchmarks.look_ahead_tiny --output benchmarks/results/look_ahead_tiny.json

Every variant is trained on the frozen tiny base from the same start with the same budget, but for
"zero-shot", which reads the late one's weights ahead, and "early, both", which starts from the late
one and learns from it, too. The threshold of each keeps 11 % of the tokens of validation pages;
accuracy and recall are those of test pages. Finished variants are not trained again.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.stage1_objectives import RECIPE, stock_base
from benchmarks.versions import versions
from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.calibration import evidence_recall, score_questions, threshold_for
from glimpseprune.commands.evaluate import CAP, read_samples
from glimpseprune.evaluation import Answer, by_size, evaluate
from glimpseprune.loading import REPOSITORY, TINY_MODEL
from glimpseprune.sample import Sample
from glimpseprune.tiny_world.dataset import write_pages
from glimpseprune.training.base import load_for_training
from glimpseprune.training.checkpoints import last_checkpoint
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe

EARLY = {"glimpse.prune_layer": 0}
LORA, STALE = {"glimpse.glimpse_lora_rank": 16}, {"glimpse.stale_rank": 16}
TRAINED = {
    "late": {},
    "early": EARLY,
    "early, both": EARLY | LORA | STALE | {"training.late_weight": 0.5},
    "early, LoRA": EARLY | LORA,
    "early, stale": EARLY | STALE,
    "late, LoRA": LORA,
}
ZERO_SHOT = "zero-shot"
QUESTIONS_A_PAGE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs/look_ahead_tiny"))
    parser.add_argument("--variants", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pages", type=int, default=1600, help="pages to train on")
    parser.add_argument("--images", type=int, default=4, help="pages a step, 8 questions each")
    parser.add_argument("--validation", type=int, default=1024, help="questions")
    parser.add_argument("--test", type=int, default=1024, help="questions")
    arguments = parser.parse_args()
    report = compare(arguments)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report["results"]))


def compare(arguments: argparse.Namespace) -> dict:
    """Train, choose, measure; the content of the JSON file."""
    base = stock_base(arguments.work / "base")
    data = training_pages(arguments.work / "train", arguments.pages)
    validation, test = (
        by_size(read_samples(None, None, getattr(arguments, split), 0, split=split))
        for split in ("validation", "test")
    )
    results: dict[str, dict[str, dict]] = defaultdict(dict)
    base_answers = None
    for seed in arguments.seeds:
        for name in arguments.variants:
            folder = train(name, seed, base, data, arguments)
            model, processor, _ = load_for_training(str(folder))
            model.eval()
            if base_answers is None:
                unpruned = evaluate(model, processor, test, [Method()])
                base_answers = unpruned.answers[0]
            layer = model.config.prune_layer
            layer = model.config.glimpse_layer if layer is None else layer
            rows = [(name, layer)] + ([(ZERO_SHOT, 0)] if name == "late" else [])
            for row, prune_layer in rows:
                figures = measure(model, processor, validation, test, prune_layer, base_answers)
                results[row][str(seed)] = figures
                print(row, seed, json.dumps(figures), flush=True)
    accuracy = sum(answer.score for answer in base_answers) / len(base_answers)
    return {"settings": describe(arguments, accuracy), "results": results}


def training_pages(folder: Path, pages: int) -> Path:
    """The data file, written unless it is there."""
    path = folder / "train.jsonl"
    if not path.exists():
        numbers = tqdm(range(pages), unit="page")
        write_pages(folder, "train", numbers, 0, questions_a_kind=QUESTIONS_A_PAGE)
    return path


def train(name: str, seed: int, base: Path, data: Path, arguments: argparse.Namespace) -> Path:
    """The repository of a variant, trained unless it was before."""
    folder = arguments.work / f"{name.replace(', ', '_')}_{seed}"
    fields = {
        "base": str(base),
        "data": str(data),
        "output": str(folder),
        "training.answer_weight": 0.0,
        "training.max_steps": arguments.steps,
        "training.per_device_train_batch_size": arguments.images,
        "training.seed": seed,
    } | TRAINED[name]
    if "training.late_weight" in fields:
        fields["late_glimpse"] = str(arguments.work / f"late_{seed}")
    recipe = read_recipe(Stage1Recipe, RECIPE, fields)
    if not (folder / "training_summary.json").exists():
        train_stage1(recipe, resume=last_checkpoint(recipe.checkpoint_folder) is not None)
    return folder


def measure(
    model,
    processor,
    validation: Sequence[Sample],
    test: Sequence[Sample],
    prune_layer: int,
    base_answers: Sequence[Answer],
) -> dict[str, float]:
    """Figures of test pages at a threshold from validation pages, and at the cap."""
    importance, _ = score_questions(model, processor, validation, [prune_layer], 16)
    threshold = threshold_for(importance[prune_layer], 0.11)
    importance, evidence = score_questions(model, processor, test, [prune_layer], 16)
    methods = [
        OwnPruning(prune_threshold=threshold, prune_layer=prune_layer),
        OwnPruning(prune_threshold=0.0, ratio=CAP, prune_layer=prune_layer),
    ]
    by_threshold, by_cap = evaluate(model, processor, test, methods).answers
    figures = {
        "prune_layer": prune_layer,
        "threshold": threshold,
        "recall": evidence_recall(importance[prune_layer], threshold, evidence),
    }
    for name, answers in (("", by_threshold), ("capped_", by_cap)):
        difference, error = paired_difference(answers, base_answers)
        figures |= {
            f"{name}retention": sum(answer.kept for answer in answers) / len(answers),
            f"{name}accuracy": sum(answer.score for answer in answers) / len(answers),
            f"{name}over_base": difference,
            f"{name}standard_error": error,
        }
    return figures


def paired_difference(answers: Sequence[Answer], others: Sequence[Answer]) -> tuple[float, float]:
    """Mean difference of scores, and its standard error with pages drawn as a whole."""
    pages: dict[Path, list[float]] = defaultdict(list)
    for answer, other in zip(answers, others, strict=True):
        assert answer.sample is other.sample
        pages[answer.sample.path].append(answer.score - other.score)
    count = len(answers)
    mean = sum(map(sum, pages.values())) / count
    spread = sum((sum(each) - mean * len(each)) ** 2 for each in pages.values())
    return mean, math.sqrt(spread) / count


def table(results: dict[str, dict[str, dict]]) -> str:
    """A Markdown table, a row a variant, seeds side by side."""
    lines = [
        "| variant | P | retention | evidence kept | accuracy | over base | capped | over base |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in results.items():
        rows = list(seeds.values())

        def cells(key: str, form: str = "{:.3f}", rows=rows) -> str:
            return ", ".join(form.format(row[key]) for row in rows)

        def over(prefix: str, rows=rows) -> str:
            return ", ".join(
                f"{row[prefix + 'over_base']:+.3f} ± {row[prefix + 'standard_error']:.3f}"
                for row in rows
            )

        lines.append(
            f"| {name} | {rows[0]['prune_layer']} | {cells('retention')} | {cells('recall')} | "
            f"{cells('accuracy')} | {over('')} | {cells('capped_accuracy')} | {over('capped_')} |"
        )
    return "\n".join(lines)


def describe(arguments: argparse.Namespace, base_accuracy: float) -> dict[str, object]:
    """What all variants share, and versions."""
    names = ("seeds", "steps", "pages", "images", "validation", "test")
    return {
        **{name: getattr(arguments, name) for name in names},
        "base_accuracy": base_accuracy,
        "questions_a_page": QUESTIONS_A_PAGE,
        "recipe": str(RECIPE.relative_to(REPOSITORY)),
        "base": str(TINY_MODEL.relative_to(REPOSITORY)),
        "variants": TRAINED,
        "cap": CAP,
        **versions(),
    }


if __name__ == "__main__":
    main()
