"""`glimpseprune make-pages`: write generated pages with questions, answers and evidence boxes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--pages", type=int, default=100, help="number of pages")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first page")
    parser.add_argument(
        "--grids",
        type=parse_grid,
        nargs="+",
        metavar="ROWSxCOLUMNS",
        help="page sizes in tokens of 28 pixels, such as 12x12",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["value"],
        choices=("value", "colour", "compare", "count", "none", "neighbour", "list", "pair"),
        help="kinds of questions",
    )
    parser.add_argument("--questions", type=int, default=4, help="questions a page and kind")
    parser.add_argument("--text-size", type=int, nargs=2, metavar=("SMALLEST", "LARGEST"))
    parser.add_argument("--noise", type=float, help="strongest noise in grey levels")
    parser.add_argument(
        "--unaligned", action="store_true", help="harder: labels anywhere, not on the token grid"
    )


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from glimpseprune.tiny_world.dataset import write_pages

    numbers = range(arguments.first, arguments.first + arguments.pages)
    path = write_pages(
        arguments.output,
        arguments.split,
        tqdm(numbers, unit="page"),
        arguments.seed,
        _settings(arguments),
        arguments.questions,
    )
    print(path)
    return 0


def _settings(arguments: argparse.Namespace):
    from glimpseprune.tiny_world.pages import PageSettings

    given = {"kinds": tuple(arguments.kinds), "aligned": not arguments.unaligned}
    if arguments.grids:
        given["grids"] = tuple(arguments.grids)
    if arguments.text_size:
        given["smallest_text"], given["largest_text"] = arguments.text_size
    if arguments.noise is not None:
        given["noise"] = arguments.noise
    return PageSettings(**given)


def parse_grid(text: str) -> tuple[int, int]:
    """Rows and columns from "12x12"; an `argparse` error for anything else."""
    rows, _, columns = text.partition("x")
    try:
        return int(rows), int(columns)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 12x12") from None
