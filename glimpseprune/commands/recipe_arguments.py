"""Arguments of the commands that train by a recipe."""

import argparse
from collections.abc import Iterable

from ..package_files import recipe_names


def recipe_help(start: str) -> str:
    """What to say of an argument that is a recipe, by its file or its name.

    Args:
        start: what the names that are listed begin with.
    """
    return f"YAML file, or the name of one that comes along: {', '.join(recipe_names(start))}"


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What to start from and what to learn from."""
    parser.add_argument("--base", help="stock model or GlimpsePrune repository: folder or Hub id")
    parser.add_argument("--data", help="questions in the Visual-CoT schema")
    parser.add_argument("--image-folder", help="image paths are relative to it (default: the data)")


def add_run_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """How to go on, and any field of the recipe."""
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    add_set_argument(parser, "--set", f"any field of the recipe, such as {example}")


def add_set_argument(parser: argparse.ArgumentParser, flag: str, summary: str) -> None:
    """A flag that sets a field of a recipe, any number of times."""
    parser.add_argument(flag, action="append", default=[], metavar="FIELD=VALUE", help=summary)


def read_overrides(
    arguments: argparse.Namespace, flags: Iterable[str], assignments: Iterable[str]
) -> dict[str, object]:
    """Fields of a recipe that the command line names.

    Args:
        arguments: the parsed command line.
        flags: arguments that are fields; those left out are not among the result.
        assignments: `FIELD=VALUE` texts.

    Raises:
        ValueError: for a text without `=`.
    """
    from ..training.recipe import parse_override

    overrides = dict(parse_override(text) for text in assignments)
    given = {name: getattr(arguments, name) for name in flags}
    return overrides | {name: value for name, value in given.items() if value is not None}
