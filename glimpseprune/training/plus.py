"""The whole of GlimpsePrune+: stage 2, its adapter merged, and stage 1 again on the result."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from ..hub.folders import check_vacant
from .merging import merge_stage2
from .recipe import read_recipe
from .stage1 import read_questions, train_stage1
from .stage1_config import Stage1Recipe
from .stage2 import train_stage2
from .stage2_config import Stage2Recipe

logger = logging.getLogger(__name__)


def train_plus(
    stage2: Stage2Recipe,
    stage1: str | Path,
    output: str | Path,
    stage1_overrides: Mapping[str, object] | None = None,
    merge_base: str | None = None,
    resume: bool = False,
) -> dict:
    """Run the three steps, each into a folder of its own; finished ones are not run again.

    Args:
        stage2: recipe of stage 2; its output becomes `{output}.adapter`.
        stage1: recipe file of the stage 1 that follows; it trains on stage 2's data.
        output: folder of the repository to write; the merged model goes to `{output}.merged`.
        stage1_overrides: other values of that recipe, by field.
        merge_base: what to merge into; default: stage 2's base. A stock model gets a fresh glimpse,
            a GlimpsePrune repository goes on with its own.
        resume: go on with an interrupted run.

    Returns:
        The summary of the last step.

    Raises:
        ValueError, OSError: as the steps do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "train-plus runs in one process; with several, run train-stage2 and train-stage1 "
            "through accelerate launch, and merge between them"
        )
    output = Path(output)
    check_vacant(output)
    adapter, merged = (Path(f"{output}.{part}") for part in ("adapter", "merged"))
    if not resume:
        for folder in (adapter, merged):
            check_vacant(folder)
    stage2.output = str(adapter)
    overrides = {"data": stage2.data, "image_folder": stage2.image_folder}
    told = ("skip_rows_without_boxes", "learn_rows_without_boxes")
    overrides |= {name: True for name in told if getattr(stage2, name)}
    overrides |= dict(stage1_overrides or {})
    recipe = read_recipe(
        Stage1Recipe, stage1, overrides | {"base": str(merged), "output": str(output)}
    )
    if not adapter.exists():
        # What stage 1 would refuse is refused before anything is trained.
        read_questions(recipe, recipe.training_config(), recipe.data)
        logger.info("stage 2: %s", adapter)
        train_stage2(stage2, resume)
    if not merged.exists():
        logger.info("merge: %s", merged)
        merge_stage2(str(adapter), merge_base or stage2.base, merged)
    logger.info("stage 1: %s", output)
    return train_stage1(recipe, resume)
