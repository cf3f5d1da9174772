"""Upload a finished repository, or go on with an upload that was interrupted.

glimpseprune push --folder REPOSITORY --push-to-hub ORG/NAME
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.publishing import add_upload_arguments, run_script, upload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--folder", required=True, type=Path, help="the repository")
    add_upload_arguments(parser, required=True)


def run(arguments: argparse.Namespace) -> int:
    """Upload what the arguments name."""
    upload(arguments, arguments.folder)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_script(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
