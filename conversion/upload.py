"""Uploading a finished repository in one commit.

Large files go up first and stay invisible; the commit that names them all comes last. So an upload
that was interrupted shows nothing, and run again it sends only what is not there yet.
"""

from pathlib import Path

from huggingface_hub import HfApi

from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.hub.redaction import reasons
from glimpseprune.hub.shards import ConversionError

COMMIT_MESSAGE = "Publish GlimpsePrune weights, configuration and code"


def push_folder(folder: Path, repository: str, revision: str | None, public: bool = False) -> str:
    """Make a Hub repository's revision hold exactly the files of a folder, by one commit.

    Args:
        folder: a sound repository.
        repository: Hub id; created, private unless `public`, if there is none.
        revision: branch to commit to, created if there is none; default: main.
        public: of a new repository.

    Returns:
        Address of the commit.

    Raises:
        ConversionError: when the folder is unsound, names a base that only lies here, or the
            upload fails; pushing again goes on with it.
    """
    report = inspect_repository(folder)
    if report.base and not report.base_included and Path(report.base).is_absolute():
        raise ConversionError(
            f"{folder} takes its base from {report.base}, a folder here: name its Hub id instead"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            delete_patterns="*",
            commit_message=COMMIT_MESSAGE,
        )
    except Exception as error:  # of several libraries, and with addresses and headers in them
        raise ConversionError(
            f"uploading {folder} to {repository} failed, run `glimpseprune push` on it to go on: "
            f"{reasons(error)}"
        ) from None
    return str(commit.commit_url)
