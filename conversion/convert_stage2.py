"""Publish a GlimpsePrune+ model: a base fine-tuned by stage 2 and the stage 1 trained on it.

    glimpseprune merge --base BASE --adapter ADAPTER --output MERGED
    glimpseprune train-stage1 --base MERGED --output STAGE1 ...
    glimpseprune convert-stage2 --merged MERGED --stage1 STAGE1 --output REPOSITORY

MERGED is stage 2's adapter in its base, a stock model folder or Hub id.
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
    parser.add_argument(
        "--merged", required=True, help="what `glimpseprune merge` wrote: folder or Hub id"
    )
    parser.add_argument(
        "--stage1", required=True, type=Path, help="output folder of the stage 1 run on it"
    )
    add_publishing_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Publish what the arguments name.

    The scores are compared with those of the stage 1 output, which shows that the glimpse was
    trained on this merged model and no other.
    """
    check_vacant(arguments.output)
    merged = resolve_base(arguments.merged, arguments.base_revision)
    glimpse = read_trained_glimpse(arguments.stage1)
    training = "Stage 2 (reinforcement learning on pruned sequences), merged, then stage 1 again:"
    publication = publication_from(arguments, merged, arguments.merged, training, glimpse.summary)
    source = Source(arguments.stage1)
    publish(arguments, merged, glimpse.family, glimpse.fields, glimpse.weights, publication, source)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_script(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
