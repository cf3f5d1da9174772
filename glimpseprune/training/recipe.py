"""Recipe files: YAML mappings that fill a dataclass."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

import yaml

from .stage1_config import _with_numbers as with_numbers

Recipe = TypeVar("Recipe")


def read_recipe(
    recipe_class: type[Recipe], path: str | Path | None, overrides: Mapping[str, object]
) -> Recipe:
    """Read a recipe and put other values in the place of some of its own.

    Args:
        recipe_class: a dataclass; fields whose default is a dictionary are sections.
        path: a YAML file, or None for the defaults alone.
        overrides: values by field; a dot reaches into a section.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the field that is unknown, missing or of a wrong type.
    """
    content = {} if path is None else _read_yaml(Path(path))
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
    return recipe_class(**with_numbers(content))


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe is a mapping of fields, got {content!r}")
    return content
