"""`glimpseprune train-plus`: stage 2, merge, and stage 1 again, in one go.

Writes the adapter to `OUTPUT.adapter`, the merged model to `OUTPUT.merged` and the repository to
`OUTPUT`; with --resume, what is there is not done again.
"""

import argparse
from pathlib import Path

from .recipe_arguments import (
    add_data_arguments,
    add_set_argument,
    read_overrides,
    recipe_help,
)
from .train_stage2 import require_trl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help=recipe_help("stage2_"))
    parser.add_argument("--stage1-recipe", type=Path, help="default: the one stage 2's names")
    add_data_arguments(parser)
    parser.add_argument("--merge-base", help="stock model to merge into (default: --base)")
    parser.add_argument("--output", required=True, help="folder of the repository to write")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    for stage in ("stage1", "stage2"):
        add_set_argument(parser, f"--set-{stage}", f"any field of {stage}'s recipe")


def run(arguments: argparse.Namespace) -> int:
    require_trl()
    from ..training.plus import train_plus
    from ..training.recipe import read_recipe
    from ..training.stage2_config import Stage2Recipe

    stage1 = read_overrides(arguments, (), arguments.set_stage1)
    stage2 = read_overrides(arguments, ("base", "data", "image_folder"), arguments.set_stage2)
    stage2["output"] = f"{arguments.output}.adapter"
    recipe = read_recipe(Stage2Recipe, arguments.recipe, stage2)
    stage1_recipe = arguments.stage1_recipe or recipe.stage1_recipe
    if stage1_recipe is None:
        raise ValueError("name the recipe of stage 1: --stage1-recipe")
    summary = train_plus(
        recipe, stage1_recipe, arguments.output, stage1, arguments.merge_base, arguments.resume
    )
    print(f"repository: {arguments.output}")
    for name, value in summary["metrics"].items():
        print(f"{name}: {value:.4g}")
    return 0
