"""Publish what `glimpseprune train-stage1` wrote.

    python conversion/convert_stage1.py --run runs/stage1 --base BASE --output REPOSITORY

With --base, the stock model that the run started from, its files are taken as they are. Without it,
the base's weights are taken from the run, which holds a copy of them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.publishing import (
    add_publishing_arguments,
    publication_from,
    publish,
    resolve_base,
    run_command,
)
from conversion.trained_glimpse import read_trained_glimpse
from conversion.verification import Source


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert_stage1.py", description="Publish what `glimpseprune train-stage1` wrote."
    )
    parser.add_argument("--run", required=True, type=Path, help="output folder of the run")
    parser.add_argument(
        "--base", help="the model it started from: folder or Hub id (default: the run's own copy)"
    )
    add_publishing_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Publish what the arguments name."""
    base = arguments.run
    if arguments.base:
        base = resolve_base(arguments.base, arguments.base_revision)
    glimpse = read_trained_glimpse(arguments.run)
    publication = publication_from(
        arguments, base, arguments.base, "Stage 1 of this code base:", glimpse.summary
    )
    source = Source(arguments.run)
    publish(arguments, base, glimpse.family, glimpse.fields, glimpse.weights, publication, source)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_command(build_parser(), argv, run)


if __name__ == "__main__":
    sys.exit(main())
