"""`glimpseprune evaluate`: accuracy and retention with all tokens, pruned, capped and at random."""

import argparse
from pathlib import Path

CAP = 0.111  # the paper's upper bound, one visual token in nine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub repository (default: the tiny model)")
    parser.add_argument(
        "--data",
        type=Path,
        help="JSON lines in the Visual-CoT schema (default: test pages of the tiny world)",
    )
    parser.add_argument("--image-folder", type=Path, help="default: the data file's folder")
    parser.add_argument("--questions", type=int, default=1000, help="at most so many")
    parser.add_argument("--seed", type=int, default=0, help="of the pages and the random masks")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file to write the results to")


def run(arguments: argparse.Namespace) -> int:
    import json
    import tempfile

    from ..evaluation import evaluate
    from ..loading import TINY_MODEL, load_model

    model, processor = load_model(arguments.model or TINY_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        samples = _samples(arguments, Path(folder))
        results = {}
        for name, options in _settings(arguments.seed).items():
            result = evaluate(
                model, processor, samples, options, arguments.batch_size, arguments.max_new_tokens
            )
            results[name] = result.summary()
            _print_row(name, results[name]["all"])
    report = {"settings": _describe(arguments, model, len(samples)), "results": results}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _settings(seed: int) -> dict:
    from ..evaluation import all_tokens, pruned, random_tokens

    return {
        "all tokens": all_tokens,
        "pruned": pruned(),
        f"pruned, max_keep_ratio {CAP}": pruned(max_keep_ratio=CAP),
        f"random, keep ratio {CAP}": random_tokens(CAP, seed),
    }


def _samples(arguments: argparse.Namespace, folder: Path) -> list:
    """The questions asked, images in memory; results are grouped by image size."""
    from ..data.visual_cot import read_visual_cot
    from ..evaluation import Sample
    from .ask import open_image

    data = arguments.data
    if data is None:
        data = _write_test_pages(folder, arguments.questions, arguments.seed)
    rows = read_visual_cot(data, arguments.image_folder)[: arguments.questions]
    samples = []
    for row in rows:
        image = open_image(row.image)
        group = f"{image.width}x{image.height}"
        samples.append(Sample(image, row.question, row.answer, group))
    return samples


def _write_test_pages(folder: Path, questions: int, seed: int) -> Path:
    from ..tiny_world.dataset import write_pages

    questions_a_page = 4
    pages = range(-(-questions // questions_a_page) + questions // 20 + 1)
    return write_pages(folder, "test", pages, seed, questions_a_kind=questions_a_page)


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
