"""`glimpseprune answer`: many questions about many images, on one machine or a cluster."""

import argparse
from pathlib import Path

from .model_arguments import add_model_arguments

WINDOW = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", type=Path, help=".jsonl, .parquet or a folder of datasets")
    parser.add_argument("output", type=Path, help=".jsonl or .parquet to write")
    add_model_arguments(parser)
    parser.add_argument("--image-folder", type=Path, help="default: the questions' folder")
    parser.add_argument("--masks", action="store_true", help="write which tokens were kept, too")
    parser.add_argument("--no-prune", action="store_true", help="answer with all visual tokens")
    parser.add_argument("--prune-layer", type=int)
    parser.add_argument("--prune-threshold", type=float)
    parser.add_argument("--max-keep-ratio", type=float)
    parser.add_argument("--min-keep-tokens", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16, help="questions asked at once")
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        help=f"rows among which those of one image are brought together (default: {WINDOW})",
    )
    parser.add_argument("--max-pixels", type=int, help="larger images are errors")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--actors", type=int, help="of ray: models (default: one a GPU, or one)")
    parser.add_argument("--gpus-per-actor", type=float, help="of ray (default: 1 if there are any)")
    parser.add_argument("--cpus-per-actor", type=float, default=1, help="of ray")
    parser.add_argument("--ray-address", help="of a cluster (default: as ray.init finds it)")


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict
    from functools import partial

    from ..answering.answerer import Answerer
    from ..answering.job import Job
    from ..answering.questions import open_questions, state_of
    from ..answering.run import answer_questions

    for name in ("batch_size", "window", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(arguments, name)}")
    settings = _settings(arguments)
    questions = open_questions(arguments.questions, arguments.image_folder)
    make_answerer = partial(Answerer.load, settings)
    job = Job(questions, make_answerer, settings.batch_size, arguments.window, settings.masks)
    depends_on = asdict(settings) | {
        "window": arguments.window,
        "image_folder": str(questions.folder),
        "questions": state_of(arguments.questions),
        "rows": len(questions),
    }
    rows, errors = answer_questions(job, arguments.output, depends_on, _engine(arguments))
    said = "complete before" if errors is None else f"{errors} of them with errors"
    print(f"{arguments.output}: {rows} rows, {said}")
    return 0


def _settings(arguments: argparse.Namespace):
    from ..answering.answerer import AnswerSettings

    names = (
        *("model", "prune_threshold", "max_keep_ratio", "min_keep_tokens", "prune_layer"),
        *("batch_size", "max_new_tokens", "max_pixels", "masks", "dtype"),
    )
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return AnswerSettings(prune=not arguments.no_prune, **given)


def _engine(arguments: argparse.Namespace):
    if arguments.engine == "local":
        from ..answering.local_engine import answer_locally

        return answer_locally
    from ..answering.ray_engine import RayPool

    return RayPool(
        arguments.actors,
        arguments.gpus_per_actor,
        arguments.cpus_per_actor,
        arguments.ray_address,
    )
