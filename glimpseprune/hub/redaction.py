"""Keeping secrets out of what is said: tokens, and addresses that are signed."""

import logging
import os
import re

from huggingface_hub import get_token
from huggingface_hub import logging as hub_logging

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
TOKEN_PATTERN = re.compile(r"hf_\w{8,}|(?<=[Bb]earer )\S+")
QUERY_PATTERN = re.compile(r"\?[\w.%-]+=[^\s'\")]*")
CHATTY_LOGGERS = ("httpx", "httpx2", "httpcore", "urllib3")  # they log addresses, signed ones too


def redact(text: str) -> str:
    """A text without the tokens in use, anything that looks like one, and queries of addresses."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return QUERY_PATTERN.sub("?***", TOKEN_PATTERN.sub("***", text))


def reasons(error: BaseException) -> str:
    """What an error and its cause say, without secrets."""
    said = [redact(str(each)) for each in (error, error.__cause__) if each is not None]
    return "; ".join(dict.fromkeys(said))


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
