"""Tokenizer and processor files of a base, in a repository of ours."""

import logging
import shutil
from pathlib import Path

from glimpseprune.families import Family
from glimpseprune.hub.shards import ConversionError, read_json
from glimpseprune.portable import make_processor_portable, write_json

PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
PROCESSOR_FILES = (
    *PROCESSOR_CONFIGS,
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)

logger = logging.getLogger(__name__)


def copy_processor_files(folder: Path, base: Path) -> None:
    """Copy tokenizer and processor files as they are."""
    files = [base / name for name in PROCESSOR_FILES if (base / name).exists()]
    if not files:
        logger.info("%s holds no tokenizer or processor files: none are written", base)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def write_processor(folder: Path, base: Path, family: Family) -> None:
    """Copy the base's tokenizer and processor files, so that any release loads our processor.

    Raises:
        ConversionError: when the tokenizer's own file is needed and missing.
    """
    copy_processor_files(folder, base)
    if family.tokenizer_as_filed and _lacks_tokenizer_file(folder):
        raise ConversionError(
            f"{base} holds no tokenizer.json, which the repository's tokenizer is read from: write "
            f"one with AutoTokenizer.from_pretrained({str(base)!r}).save_pretrained(...)"
        )
    make_processor_portable(folder, family.tokenizer_as_filed)
    for name in PROCESSOR_CONFIGS:
        if (folder / name).exists():
            content = read_json(folder / name)
            content["processor_class"] = family.processor_class.__name__
            auto_map = content.get("auto_map", {})
            content["auto_map"] = auto_map | {"AutoProcessor": family.auto_map["AutoProcessor"]}
            write_json(folder / name, content)


def _lacks_tokenizer_file(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists()
