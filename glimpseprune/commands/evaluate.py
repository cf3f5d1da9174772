"""`glimpseprune evaluate`: accuracy and retention with all tokens, pruned, capped and at random."""

import argparse
from pathlib import Path

from .model_arguments import add_model_arguments

CAP = 0.111  # the paper's upper bound, one visual token in nine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        type=Path,
        help="JSON lines in the Visual-CoT schema (default: test pages of the tiny world)",
    )
    parser.add_argument("--image-folder", type=Path, help="default: the data file's folder")
    parser.add_argument("--questions", type=int, default=1000, help="at most so many")
    parser.add_argument(
        "--kinds", nargs="+", default=["value"], help="of the tiny world's questions"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pages and the random masks")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="ask by whole prompts, instead of looking at each image of a batch once",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the results to")


def run(arguments: argparse.Namespace) -> int:
    import json

    from ..evaluation import evaluate, summarise
    from ..loading import load_model

    model, processor = load_model(arguments.model, dtype=arguments.dtype)
    samples = read_samples(
        arguments.data,
        arguments.image_folder,
        arguments.questions,
        arguments.seed,
        tuple(arguments.kinds),
    )
    methods = evaluated_methods(arguments.seed)
    evaluation = evaluate(
        model,
        processor,
        samples,
        list(methods.values()),
        arguments.batch_size,
        arguments.max_new_tokens,
        fresh=arguments.fresh,
    )
    results = {}
    for name, answers in zip(methods, evaluation.answers, strict=True):
        results[name] = summarise(answers)
        _print_row(name, results[name]["all"])
        for kind in sorted({sample.kind for sample in samples if sample.kind}):
            if kind in results[name]:
                _print_row(f"  {kind}", results[name][kind])
    print(f"time in the model: {evaluation.seconds_in_model / evaluation.seconds:.1%}")
    report = {"settings": _describe(arguments, model, len(samples)), "results": results}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def evaluated_methods(seed: int) -> dict:
    """The methods by their names; `seed` is of the random mask."""
    from ..baselines.method import Method, OwnPruning
    from ..baselines.random_tokens import RandomTokens
    from ..baselines.scorer import AtGlimpseLayer

    return {
        "all tokens": Method(),
        "pruned": OwnPruning(),
        f"pruned, max_keep_ratio {CAP}": OwnPruning(ratio=CAP),
        f"random, keep ratio {CAP}": AtGlimpseLayer("random", CAP, seed, RandomTokens(seed)),
    }


def read_samples(
    data: Path | None,
    image_folder: Path | None,
    questions: int,
    seed: int,
    kinds: tuple[str, ...] = ("value",),
    split: str = "test",
    need_references: bool = True,
    grids: tuple[tuple[int, int], ...] = (),
) -> list:
    """Questions with their images in memory, in groups by data set, or by image size.

    Args:
        data: a file of Visual-CoT, or None for pages of the tiny world, which are grouped by their
            size.
        questions: at most so many.
        seed, kinds, split: of the tiny world's pages and questions.
        need_references: False takes questions without answers or boxes.
        grids: sizes of the tiny world's pages, (rows, columns) in tokens; none takes the usual.
    """
    import tempfile

    from ..data.visual_cot import read_visual_cot
    from ..images import open_image
    from ..sample import Sample

    tiny_world = data is None
    with tempfile.TemporaryDirectory() as folder:
        if tiny_world:
            data = _write_pages(Path(folder), questions, seed, kinds, split, grids)
        needs = {
            "need_boxes": need_references and not tiny_world,
            "need_answers": need_references,
        }
        rows = read_visual_cot(data, image_folder, **needs)[:questions]
        images = {path: open_image(path) for path in dict.fromkeys(row.image for row in rows)}
    return [
        Sample(
            images[row.image],
            row.question,
            row.answer,
            "{}x{}".format(*images[row.image].size) if tiny_world else row.dataset,
            row.boxes,
            (row.width, row.height),
            row.image,
            number,
            row.kind,
        )
        for number, row in enumerate(rows)
    ]


def _write_pages(
    folder: Path,
    questions: int,
    seed: int,
    kinds: tuple[str, ...],
    split: str,
    grids: tuple[tuple[int, int], ...],
) -> Path:
    from ..tiny_world.dataset import write_pages
    from ..tiny_world.pages import PageSettings

    questions_a_page = 4
    pages = range(-(-questions // (questions_a_page * len(kinds))) + questions // 20 + 1)
    settings = PageSettings(kinds=kinds, **({"grids": grids} if grids else {}))
    return write_pages(folder, split, pages, seed, settings, questions_a_page)


def _print_row(name: str, figures: dict[str, float]) -> None:
    print(
        f"{name:32} accuracy {figures['accuracy']:.4f}  retention {figures['retention']:.4f}  "
        f"questions {figures['questions']}",
        flush=True,
    )


def _describe(arguments: argparse.Namespace, model, questions: int) -> dict[str, object]:
    import torch
    import transformers

    return {
        "model": str(arguments.model or "hub_configs/tiny"),
        "data": str(arguments.data or "tiny world, test pages"),
        "questions": questions,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "dtype": str(model.dtype),
        "glimpse_layer": model.config.glimpse_layer,
        "prune_threshold": model.config.prune_threshold,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
