"""`glimpseprune merge`: merge the adapter of stage 2 into its base, and say what to run next."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, help="what train-stage2 wrote: folder or Hub id"
    )
    parser.add_argument(
        "--base",
        help="stock base or GlimpsePrune repository: folder or Hub id (default: what the adapter "
        "was trained on)",
    )
    parser.add_argument("--base-revision", help="revision of the base, where it is a Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")


def run(arguments: argparse.Namespace) -> int:
    from ..hub.folders import check_vacant
    from ..training.merging import merge_stage2, next_command

    check_vacant(arguments.output)
    adapter, base = merge_stage2(
        arguments.adapter, arguments.base, arguments.output, arguments.base_revision
    )
    print(f"merged {adapter} into {base}: {arguments.output}")
    print(f"next: {next_command(adapter, arguments.output)}")
    return 0
