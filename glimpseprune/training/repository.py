"""Writing a trained model as a complete repository, which both generations of transformers load."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from modeling_glimpseprune.stock import TRANSFORMERS_5

from ..families import family_of
from ..hub.folders import vacant_sibling
from ..portable import edit_json, make_processor_portable, portable_config, write_json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
SUMMARY_FILE = "training_summary.json"
SHARD_SIZE = "2GB"  # what maps or reads one file at a time needs no more
# transformers 5 would write a base read under other names back under those.
UNDER_OWN_NAMES = {"save_original_format": False} if TRANSFORMERS_5 else {}


def write_repository(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    output: str | Path,
    dtype: torch.dtype,
    summary: dict,
) -> None:
    """Write weights, configurations, processor and code, or nothing.

    Args:
        model: a GlimpsePrune model; it is cast to `dtype`.
        processor: its processor.
        output: folder to create; it may exist if it is empty.
        dtype: of the written weights.
        summary: what `training_summary.json` is to hold.

    Raises:
        ValueError: when `output` exists and is not an empty folder.
    """
    model.to(dtype)
    family = family_of(model.config.to_dict(), "the model")
    auto_map = family.auto_map
    type(model.config).register_for_auto_class("AutoConfig")
    type(model).register_for_auto_class("AutoModelForImageTextToText")
    type(processor).register_for_auto_class("AutoProcessor")
    with vacant_sibling(output) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE, **UNDER_OWN_NAMES)
        processor.save_pretrained(folder)
        make_processor_portable(folder, family.tokenizer_as_filed)
        edit_json(folder / "config.json", portable_config)
        _with_auto_map(folder / "config.json", auto_map)
        for name in PROCESSOR_FILES:
            _with_auto_map(folder / name, {"AutoProcessor": auto_map["AutoProcessor"]})
        write_json(folder / SUMMARY_FILE, summary)


def _with_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    if path.exists():
        edit_json(path, lambda content: content | {"auto_map": auto_map})
