"""What the publishing commands share: their arguments, and writing, verifying and uploading."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from conversion.model_card import HUB_ID, ModelCard
from conversion.processor_files import PROCESSOR_FILES
from conversion.repository import (
    BASE_FILES,
    Publication,
    fetched_commit,
    resolve_folder,
    write_repository,
)
from conversion.upload import push_folder
from conversion.verification import Source, verifier
from glimpseprune.families import Family
from glimpseprune.hub.redaction import quiet_logging, redact
from glimpseprune.hub.shards import ConversionError


def add_publishing_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that writes a repository."""
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--glimpse-only",
        action="store_true",
        help="leave the base's weights out: loading fetches them from where --base-name says",
    )
    group.add_argument(
        "--base-name", help="Hub id the base is known by (default: --base, where it is one)"
    )
    group.add_argument("--base-revision", help="branch, tag or commit of the base")
    group.add_argument("--title", default="GlimpsePrune", help="headline of the model card")
    group.add_argument("--licence", help="as the Hub names it (default: what the base's card says)")
    group.add_argument(
        "--measurements",
        type=Path,
        help="for the card, from `glimpseprune evaluate --output`",
    )
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="do not load the result and compare scores (the whole model must fit into memory)",
    )
    add_upload_arguments(parser)


def add_upload_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Arguments of every command that uploads. Tokens are none: `hf auth login` or HF_TOKEN."""
    group = parser.add_argument_group("upload (as logged in, or by HF_TOKEN)")
    group.add_argument(
        "--push-to-hub", metavar="ORG/NAME", required=required, help="upload, in one commit"
    )
    group.add_argument("--public", action="store_true", help="a new repository is public")
    group.add_argument("--revision", help="branch to commit to, created if need be (default: main)")


def publication_from(
    arguments: argparse.Namespace,
    base: Path,
    base_source: str | None,
    training: str,
    training_summary: Mapping[str, object] | None = None,
) -> Publication:
    """The publication that command-line arguments ask for.

    Args:
        arguments: with those of `add_publishing_arguments`.
        base: local folder of the base.
        base_source: what the caller named it: a Hub id or a path; None where it has no place.
        training: how the glimpse was trained, for the card.
        training_summary: a run's summary, for the card.

    Raises:
        ConversionError: for a glimpse-only repository whose base nobody could fetch.
    """
    name = arguments.base_name
    if name is None and base_source and not Path(base_source).is_dir():
        name = base_source
    if name is None and arguments.glimpse_only and base_source and not arguments.push_to_hub:
        name = str(base.resolve())
    lies_here = arguments.push_to_hub and name is not None and not _is_hub_id(name)
    if arguments.glimpse_only and (name is None or lies_here):
        raise ConversionError(
            "--glimpse-only needs a base that users can fetch: give its Hub id as --base-name"
        )
    repository = arguments.push_to_hub or ModelCard.repository
    return Publication(
        base_repository=name,
        base_revision=fetched_commit(base) or arguments.base_revision,
        glimpse_only=arguments.glimpse_only,
        card=ModelCard(
            title=arguments.title,
            repository=repository,
            licence=arguments.licence,
            measurements=arguments.measurements,
            training=training,
            training_summary=training_summary,
        ),
    )


def publish(
    arguments: argparse.Namespace,
    base: Path,
    family: Family,
    fields: Mapping[str, object],
    weights: Mapping[str, torch.Tensor],
    publication: Publication,
    source: Source,
) -> None:
    """Write a repository, verify it, and upload it where the arguments say so.

    Raises:
        ConversionError: when any of it fails; what failed before the upload left nothing.
    """
    if not arguments.no_verify:
        publication = replace(publication, verify=verifier(source, base))
    write_repository(arguments.output, base, family, fields, weights, publication)
    print(f"wrote {arguments.output}" + ("" if arguments.no_verify else ", verified"))
    upload(arguments, arguments.output)


def upload(arguments: argparse.Namespace, folder: Path) -> None:
    """Upload a finished folder where the arguments say so."""
    if arguments.push_to_hub:
        url = push_folder(folder, arguments.push_to_hub, arguments.revision, arguments.public)
        print(f"pushed to {url}")


def resolve_base(source: str, revision: str | None) -> Path:
    """A base's folder, fetched if it is a Hub id."""
    return resolve_folder(source, (*BASE_FILES, *PROCESSOR_FILES), revision)


def run_script(
    documentation: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """Run a file of this folder as a command of its own.

    Args:
        documentation: the file's; its first line is the summary.
        add_arguments, run: as those of the modules in `glimpseprune/commands`.
        argv: arguments; None for those of the process.

    Returns:
        0, or 1 after saying what is wrong.
    """
    parser = argparse.ArgumentParser(description=documentation.partition("\n")[0])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_logging()
    try:
        return run(arguments)
    except ValueError as error:  # ConversionErrors are
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).is_dir()
