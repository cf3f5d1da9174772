"""Recipe files: YAML mappings that fill a dataclass."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..package_files import find_recipe

EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 takes 1e-4 for a string

AnyRecipe = TypeVar("AnyRecipe", bound="TrainingRecipe")


@dataclass
class TrainingRecipe:
    """What every run reads and writes.

    Args:
        base: model to start from, folder or Hub id.
        data: questions, see `read_visual_cot`.
        image_folder: folder that image paths are relative to; default: each file's own.
        output: folder to be written.
        max_questions: use the first so many questions of `data`.
        skip_rows_without_boxes: leave such rows out instead of refusing them.
        learn_rows_without_boxes: take them for questions of which nothing is to be seen.
        min_pixels, max_pixels: bounds on a training image's area; default: the processor's.
        attn_implementation: as `from_pretrained` takes it.
    """

    base: str | None = None
    data: str | None = None
    image_folder: str | None = None
    output: str | None = None
    max_questions: int | None = None
    skip_rows_without_boxes: bool = False
    learn_rows_without_boxes: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    attn_implementation: str | None = None

    def __post_init__(self):
        for name in ("base", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: name it in the recipe or by --{name}")

    @property
    def checkpoint_folder(self) -> Path:
        """Where a run keeps what it needs to be resumed: beside the output."""
        output = Path(self.output).absolute()
        return output.with_name(f"{output.name}.checkpoints")


def read_recipe(
    recipe_class: type[AnyRecipe], path: str | Path | None, overrides: Mapping[str, object]
) -> AnyRecipe:
    """Read a recipe and put other values in the place of some of its own.

    Args:
        recipe_class: a dataclass; fields whose default is a dictionary are sections.
        path: a YAML file, the name of a recipe that comes along, or None for the defaults alone.
        overrides: values by field; a dot reaches into a section.

    Raises:
        FileNotFoundError: when there is no such recipe.
        ValueError: naming the field that is unknown, missing or of a wrong type.
    """
    content = {} if path is None else _read_yaml(find_recipe(path))
    for name, value in overrides.items():
        section, dot, key = name.partition(".")
        if dot:
            content[section] = {**(content.get(section) or {}), key: value}
        else:
            content[section] = value
    known = {each.name: each.default_factory is not MISSING for each in fields(recipe_class)}
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"recipe: unknown field {name}")
        if known[name] and not isinstance(value, dict):
            raise ValueError(f"recipe: {name} must be a mapping of fields, got {value!r}")
    return recipe_class(**_with_numbers(content))


def parse_override(text: str) -> tuple[str, object]:
    """`"training.learning_rate=1e-3"` to its field and value, which is read as YAML.

    Raises:
        ValueError: when there is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set takes field=value, got {text!r}")
    return name, yaml.safe_load(value)


def check_known(section: str, content: Mapping[str, object], known: Iterable[str]) -> None:
    """Raise a ValueError that names a section's field that is not known."""
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ValueError(f"recipe: unknown field {section}.{unknown[0]}")


def refuse_sharded_weights(arguments: TrainingArguments) -> None:
    """Raise a ValueError for FSDP and DeepSpeed's ZeRO-3.

    They gather a layer's weights when the layer is called, but a prompt is pruned inside of one,
    between its attention and its MLP, which are called by themselves.
    """
    fsdp = arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{'FSDP' if fsdp else 'ZeRO-3'} shards weights by decoder layer, and tokens are "
            "dropped inside of a layer: use DDP (accelerate launch --multi_gpu) or ZeRO-1 or 2"
        )


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of fields, got {content!r}")
    return content


def _with_numbers(value: object) -> object:
    """The same with numbers such as `1e-4`, which YAML leaves as strings, as numbers."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        return float(value)
    return value
