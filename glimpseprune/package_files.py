"""Files that the package brings along: recipes, and the tiny repositories.

In a clone they lie at its top; a wheel holds them inside the package (see `pyproject.toml`).
"""

from pathlib import Path

PACKAGE = Path(__file__).parent


def _lies_at(name: str) -> Path:
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


RECIPES = _lies_at("recipes")
TINY_MODEL = _lies_at("hub_configs") / "tiny"
TINY_EARLY = TINY_MODEL.with_name("tiny_early")  # glimpse weights for the base of `TINY_MODEL`
SAMPLE_PAGE = TINY_MODEL / "page.png"


def recipe_names(start: str = "") -> list[str]:
    """Names of the recipes that come along and start so."""
    return sorted(path.stem for path in RECIPES.glob(f"{start}*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name: a path, or the name of one that comes along, such as "stage1_tiny".

    Raises:
        FileNotFoundError: when it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if str(name) in recipe_names():
        return RECIPES / f"{name}.yaml"
    raise FileNotFoundError(
        f"{name} is no recipe: give a YAML file, or one of {', '.join(recipe_names())}"
    )
