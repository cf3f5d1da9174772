"""`glimpseprune train-stage1`: train the glimpse token and the visual importance predictor.

Several processes: `accelerate launch -m glimpseprune.cli train-stage1 --recipe ...`.
"""

import argparse
from pathlib import Path

from .recipe_arguments import (
    add_data_arguments,
    add_run_arguments,
    read_overrides,
    recipe_help,
)

FLAGS = ("base", "data", "validation_data", "image_folder", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, help=recipe_help("stage1_"))
    add_data_arguments(parser)
    parser.add_argument("--validation-data", help="questions held out")
    parser.add_argument("--output", help="folder of the repository to write; must not exist")
    add_run_arguments(parser, "training.learning_rate=1e-3")


def run(arguments: argparse.Namespace) -> int:
    from ..training.recipe import read_recipe
    from ..training.stage1 import train_stage1
    from ..training.stage1_config import Stage1Recipe

    overrides = read_overrides(arguments, FLAGS, arguments.set)
    recipe = read_recipe(Stage1Recipe, arguments.recipe, overrides)
    summary = train_stage1(recipe, resume=arguments.resume)
    if summary is not None:
        print(f"repository: {recipe.output}")
        for name, value in summary["metrics"].items():
            print(f"{name}: {value:.4g}")
    return 0
