"""Compare GlimpsePrune with the baselines and write one page about it.

    python -m benchmarks.report --output benchmarks/results/tiny

Writes `README.md`, its pictures and `figures.json` into the folder, and every answer into
`records.jsonl`, from which an interrupted run goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.versions import versions
from glimpseprune.baselines.catalogue import (
    RATIOS,
    compared_methods,
    label,
    own_pruning,
    read_ahead,
    without_redundant_patches,
)
from glimpseprune.baselines.method import OwnPruning
from glimpseprune.commands.evaluate import CAP, read_samples
from glimpseprune.loading import TINY_MODEL, load_model
from glimpseprune.metrics import anls, exact_match, relaxed_accuracy

from .costs import PrefillCosts
from .figures import Figures
from .gallery import draw_gallery
from .page import write_page
from .plots import plot_all
from .records import Record, read_records
from .run import run_methods

KINDS = ("value", "colour", "compare", "count")  # what the page shows of the tiny world
METRICS = {"exact-match": exact_match, "anls": anls, "relaxed": relaxed_accuracy}


def main() -> None:
    arguments = _parse()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    samples = read_samples(
        arguments.data, arguments.image_folder, arguments.questions, arguments.seed
    )
    methods = compared_methods()
    if arguments.prune_layer is not None:
        methods += read_ahead(arguments.prune_layer)
    if arguments.redundant_patches is not None:
        methods += without_redundant_patches(arguments.redundant_patches, (CAP,))
    path = folder / "records.jsonl"
    shape = (arguments.batch_size, arguments.max_new_tokens, METRICS[arguments.metric])
    model, processor = load_model(arguments.model)
    run_methods(model, processor, samples, methods, path, *shape)
    of_others = {}
    for name, repository, ratios in (
        ("GlimpsePrune+", arguments.plus, (CAP,)),
        ("GlimpsePrune, trained early", arguments.early, RATIOS),
    ):
        if repository:
            other, own = load_model(repository), own_pruning(name, ratios)
            run_methods(*other, samples, own, path, *shape)
            methods += own
            of_others |= dict.fromkeys((each.name for each in own), PrefillCosts(other[0].config))
    asked = {sample.number: sample for sample in samples}
    records = [record for record in read_records(path) if record.number in asked]
    figures = Figures(records, methods, PrefillCosts(model.config), of_others)
    settings = _settings(arguments, model, len(asked), figures)
    _write_figures(folder / "figures.json", settings, figures)
    pictures = draw_gallery(
        model, processor, figures.records_of(label(OwnPruning())), asked, folder
    )
    plots = plot_all(figures, folder)
    kinds = [] if arguments.data else _run_kinds(arguments, model, processor, shape)
    command = f"python -m benchmarks.report {arguments.command}"
    title = f"{settings['model']}: GlimpsePrune and baselines"
    page = write_page(title, command, settings, figures, plots, kinds, pictures)
    (folder / "README.md").write_text(page, encoding="utf-8")
    print(folder / "README.md")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub repository")
    parser.add_argument("--plus", help="a second repository, shown as GlimpsePrune+")
    parser.add_argument("--early", help="a repository whose glimpse was trained to be read ahead")
    parser.add_argument(
        "--prune-layer", type=int, help="read the model's own glimpse ahead from this layer, too"
    )
    parser.add_argument(
        "--redundant-patches",
        type=float,
        metavar="GREY_LEVELS",
        help="also without patches that their neighbours predict within so many grey levels",
    )
    parser.add_argument(
        "--data", type=Path, help="questions in a form of Visual-CoT (default: the tiny world)"
    )
    parser.add_argument("--image-folder", type=Path)
    parser.add_argument("--metric", choices=METRICS, default="exact-match")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument(
        "--kind-questions", type=int, default=100, help="of each kind of the tiny world's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tiny world's pages")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    given = {
        name.replace("_", "-"): value
        for name, value in vars(arguments).items()
        if value != parser.get_default(name)
    }
    arguments.command = " ".join(f"--{name} {value}" for name, value in given.items())
    return arguments


def _run_kinds(arguments, model, processor, shape: tuple) -> list[Record]:
    """Every kind of question of the tiny world, by GlimpsePrune without a bound."""
    path = arguments.output / "kinds.jsonl"
    samples = []
    for kind in KINDS:
        of_kind = read_samples(None, None, arguments.kind_questions, arguments.seed, (kind,))
        for sample in of_kind:
            samples.append(replace(sample, group=kind, number=len(samples)))
    run_methods(model, processor, samples, [OwnPruning()], path, *shape)
    return read_records(path)


def _settings(arguments, model, questions: int, figures: Figures) -> dict[str, object]:
    tiny = arguments.model == str(TINY_MODEL)
    return {
        "model": "hub_configs/tiny" if tiny else arguments.model,
        "data": arguments.data or f"tiny world, test pages of seed {arguments.seed}",
        "questions": questions,
        "pages": len({record.page for record in figures.stock}),
        "metric": arguments.metric,
        "decoding": f"greedy, at most {arguments.max_new_tokens} tokens",
        "dtype": str(model.dtype),
        "decoder layers": figures.costs.sizes.layers,
        "glimpse layer K": model.config.glimpse_layer,
        "threshold": model.config.prune_threshold,
        **versions(),
    }


def _write_figures(path: Path, settings: dict[str, object], figures: Figures) -> None:
    """Lines of the tables, and under `scores` one digit a question, nine times its score."""
    content = {
        "settings": {name: str(value) for name, value in settings.items()},
        "lines": {name: line.to_dict() for name, line in figures.lines.items()},
        "scores": {
            name: [
                "".join(str(round(9 * record.score)) for record in of_seed) for _, of_seed in runs
            ]
            for name, runs in figures.by_method.items()
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _digits(records: list[Record]) -> str:
    return "".join(str(round(9 * record.score)) for record in records)


if __name__ == "__main__":
    main()
