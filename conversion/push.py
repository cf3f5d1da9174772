"""Upload a finished repository, or go on with an upload that was interrupted.

python conversion/push.py --folder REPOSITORY --push-to-hub ORG/NAME
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.publishing import add_upload_arguments, run_command, upload


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="push.py", description="Upload a finished repository in one commit."
    )
    parser.add_argument("--folder", required=True, type=Path, help="the repository")
    add_upload_arguments(parser, required=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after saying what is wrong."""
    return run_command(build_parser(), argv, lambda given: upload(given, given.folder))


if __name__ == "__main__":
    sys.exit(main())
