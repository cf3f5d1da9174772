"""From stage 2 to the stage 1 that follows it: the adapter merged, and the recipe to run on it."""

from pathlib import Path

from conversion.merge_adapter import ADAPTER_CONFIG, ADAPTER_FILES, merge
from conversion.publishing import resolve_base
from conversion.repository import resolve_folder

from ..hub.shards import read_json
from .repository import SUMMARY_FILE


def merge_stage2(
    adapter: str, base: str | None, output: Path, base_revision: str | None = None
) -> tuple[Path, str]:
    """Write what stage 2 was trained on with its adapter merged in.

    Args:
        adapter: what stage 2 wrote; folder or Hub id.
        base: a stock model or a GlimpsePrune repository; None for what the adapter names.
        output: folder to create.
        base_revision: of a base on the Hub.

    Returns:
        The adapter's folder, and the base.

    Raises:
        ValueError: when something is missing or does not fit.
    """
    folder = resolve_folder(adapter, (*ADAPTER_FILES, SUMMARY_FILE))
    base = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder} does not name its base: give it by --base")
    merge(resolve_base(base, base_revision), folder, output)
    return folder, base


def next_command(adapter: Path, merged: Path) -> str:
    """The stage 1 command to run on a merged model.

    Args:
        adapter: whose summary names the recipe.
        merged: what `merge_stage2` wrote.
    """
    summary = read_json(adapter / SUMMARY_FILE) if (adapter / SUMMARY_FILE).exists() else {}
    recipe = summary.get("recipe", {}).get("stage1_recipe") or "RECIPE"
    return (
        f"glimpseprune train-stage1 --recipe {recipe} --base {merged} --data DATA --output OUTPUT"
    )
