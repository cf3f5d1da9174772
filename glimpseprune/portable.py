"""Files saved by transformers 5, rewritten so that transformers 4.57 reads them as well.

transformers 5 still reads the older layout of all of them, so that is the layout of a repository.
"""

import json
from collections.abc import Callable
from pathlib import Path

from modeling_glimpseprune.configuration_glimpseprune import portable_text_config

from .tokenizer_files import TOKENIZERS_BACKEND, name_general_class

SUB_PROCESSORS = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
MACHINE_FIELDS = ("is_local", "local_files_only", "backend")  # they name a place, not a tokenizer


def read_json(path: Path) -> dict:
    """The object a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict], dict]) -> None:
    """Replace what a JSON file holds."""
    write_json(path, change(read_json(path)))


def portable_config(config: dict) -> dict:
    """A model configuration whose text model states rotary embeddings and tied weights as 4.57.

    The configuration of published bases, which is flat, comes back as it is.
    """
    if "text_config" not in config:
        return config
    return config | {"text_config": portable_text_config(**config)}


def make_processor_portable(folder: Path, tokenizer_as_filed: bool = False) -> None:
    """Split the processors' common file into one a processor, and rename tokenizer fields.

    Args:
        folder: with a saved processor.
        tokenizer_as_filed: have the tokenizer read as `tokenizer.json` says, whatever class is
            named. That happens too where the class is one of transformers 5 that does so.
    """
    common = folder / "processor_config.json"
    if common.exists():
        content = read_json(common)
        for name, file_name in SUB_PROCESSORS.items():
            if name in content:
                write_json(folder / file_name, content.pop(name))
        write_json(common, content)
    if (folder / "tokenizer_config.json").exists():
        edit_json(
            folder / "tokenizer_config.json",
            lambda config: _portable_tokenizer(config, tokenizer_as_filed),
        )


def _portable_tokenizer(config: dict, as_filed: bool) -> dict:
    if as_filed or config.get("tokenizer_class") == TOKENIZERS_BACKEND:
        config = name_general_class(config)
    config = {name: value for name, value in config.items() if name not in MACHINE_FIELDS}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
