"""The code that a repository carries: what its `auto_map` names, out of `modeling_glimpseprune`."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_glimpseprune

from ..portable import read_json
from .folders import vacant_sibling

CODE = Path(modeling_glimpseprune.__file__).parent


def code_files(config: Mapping[str, object]) -> list[Path]:
    """The files that the `auto_map` of a config.json names, and all that they import."""
    modules = {reference.rpartition(".")[0] for reference in config["auto_map"].values()}
    entries = [str(CODE / f"{module}.py") for module in modules]
    siblings = [file for entry in entries for file in get_relative_import_files(entry)]
    return [Path(file) for file in sorted({*entries, *siblings})]


def copy_code(folder: Path) -> None:
    """Write the code that the folder's config.json asks for into it."""
    for file in code_files(read_json(folder / "config.json")):
        shutil.copyfile(file, folder / file.name)


def with_code(folder: Path) -> Path:
    """A repository with its code: the folder, or a copy in the cache of Hugging Face's libraries.

    Where git makes plain files of symbolic links, the code files of a clone's `hub_configs/tiny`
    hold nothing but the place of the code.

    Args:
        folder: a repository without folders of its own.
    """
    code = code_files(read_json(folder / "config.json"))
    if all(_same_content(folder / file.name, file) for file in code):
        return folder
    content = [path for path in sorted(folder.glob("*.*")) if path.suffix != ".py"]
    copy = Path(HF_HOME) / "glimpseprune" / f"{folder.name}-{_digest([*code, *content])}"
    try:
        if not copy.exists():
            _write_copy(copy, [*code, *content])
    except (OSError, ValueError):
        if not copy.exists():  # by another process
            raise
    return copy


def _write_copy(copy: Path, files: list[Path]) -> None:
    with vacant_sibling(copy) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)


def _same_content(copy: Path, original: Path) -> bool:
    return copy.exists() and copy.read_bytes() == original.read_bytes()


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
