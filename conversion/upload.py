"""Uploading a finished repository in one commit, and keeping secrets out of what is said.

Large files go up first and stay invisible; the commit that names them all comes last. So an upload
that was interrupted shows nothing, and run again it sends only what is not there yet.
"""

import logging
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub import logging as hub_logging

from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.hub.shards import ConversionError

COMMIT_MESSAGE = "Publish GlimpsePrune weights, configuration and code"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
TOKEN_PATTERN = re.compile(r"hf_\w{8,}|(?<=[Bb]earer )\S+")
QUERY_PATTERN = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*")
CHATTY_LOGGERS = ("httpx", "httpx2", "httpcore", "urllib3")  # they log addresses, signed ones too


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
        reasons = dict.fromkeys(redact(str(each)) for each in (error, error.__cause__) if each)
        raise ConversionError(
            f"uploading {folder} to {repository} failed, run conversion/push.py on it to go on: "
            + "; ".join(reasons)
        ) from None
    return str(commit.commit_url)


def redact(text: str) -> str:
    """A text without the tokens in use, anything that looks like one, and signed addresses."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return QUERY_PATTERN.sub(r"\1?***", TOKEN_PATTERN.sub("***", text))


def quiet_logging() -> None:
    """Let no log line of this process bear a token or a signed address."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    hub_logging.get_logger()  # it has a handler of its own
    for name in (None, "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_redact_record)


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def _secrets() -> list[str]:
    found = [os.environ.get(name) for name in TOKEN_VARIABLES] + [get_token()]
    return [secret for secret in found if secret]
