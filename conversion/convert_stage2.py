"""Publish a GlimpsePrune+ model: a base fine-tuned by stage 2 and the stage 1 trained on it.

    python conversion/merge_adapter.py --base BASE --adapter ADAPTER --output MERGED
    glimpseprune train-stage1 --base MERGED --output STAGE1 ...
    python conversion/convert_stage2.py --merged MERGED --stage1 STAGE1 --output REPOSITORY

MERGED is stage 2's adapter in its base, a stock model folder or Hub id.
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
        prog="convert_stage2.py",
        description="Publish a base fine-tuned by stage 2 and the stage 1 trained on it.",
    )
    parser.add_argument(
        "--merged", required=True, help="what merge_adapter.py wrote: folder or Hub id"
    )
    parser.add_argument(
        "--stage1", required=True, type=Path, help="output folder of the stage 1 run on it"
    )
    add_publishing_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Publish what the arguments name.

    The scores are compared with those of the stage 1 output, which shows that the glimpse was
    trained on this merged model and no other.
    """
    merged = resolve_base(arguments.merged, arguments.base_revision)
    glimpse = read_trained_glimpse(arguments.stage1)
    training = "Stage 2 (reinforcement learning on pruned sequences), merged, then stage 1 again:"
    publication = publication_from(arguments, merged, arguments.merged, training, glimpse.summary)
    source = Source(arguments.stage1)
    publish(arguments, merged, glimpse.family, glimpse.fields, glimpse.weights, publication, source)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_command(build_parser(), argv, run)


if __name__ == "__main__":
    sys.exit(main())
