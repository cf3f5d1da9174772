"""Publish what `glimpseprune train-stage1` wrote.

    glimpseprune convert-stage1 --run runs/stage1 --base BASE --output REPOSITORY

With --base, the stock model that the run started from, its files are taken as they are. Without it,
the base's weights are taken from the run, which holds a copy of them.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.publishing import (
    add_publishing_arguments,
    publication_from,
    publish,
    resolve_base,
    run_script,
)
from conversion.trained_glimpse import read_trained_glimpse
from conversion.verification import Source
from glimpseprune.hub.folders import check_vacant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--run", required=True, type=Path, help="output folder of the run")
    parser.add_argument(
        "--base", help="the model it started from: folder or Hub id (default: the run's own copy)"
    )
    add_publishing_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Publish what the arguments name."""
    check_vacant(arguments.output)
    base = arguments.run
    if arguments.base:
        base = resolve_base(arguments.base, arguments.base_revision)
    glimpse = read_trained_glimpse(arguments.run)
    publication = publication_from(
        arguments, base, arguments.base, "Stage 1 of this code base:", glimpse.summary
    )
    source = Source(arguments.run)
    publish(arguments, base, glimpse.family, glimpse.fields, glimpse.weights, publication, source)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_script(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
