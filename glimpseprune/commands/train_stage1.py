"""`glimpseprune train-stage1`: train the glimpse token and the visual importance predictor.

Several processes: `accelerate launch -m glimpseprune.cli train-stage1 --recipe ...`.
"""

import argparse
from pathlib import Path

FLAGS = ("base", "data", "validation_data", "image_folder", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, help="YAML file (see recipes/stage1_*.yaml)")
    parser.add_argument("--base", help="stock model or GlimpsePrune repository: folder or Hub id")
    parser.add_argument("--data", help="JSON lines in the Visual-CoT schema")
    parser.add_argument("--validation-data", help="the same, held out")
    parser.add_argument("--image-folder", help="image paths are relative to it (default: the data)")
    parser.add_argument("--output", help="folder of the repository to write; must not exist")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the recipe, such as training.learning_rate=1e-3",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..training.stage1 import train_stage1
    from ..training.stage1_config import load_recipe, parse_override

    overrides = dict(parse_override(text) for text in arguments.set)
    flags = {name: getattr(arguments, name) for name in FLAGS}
    overrides |= {name: value for name, value in flags.items() if value is not None}
    recipe = load_recipe(arguments.recipe, overrides)
    summary = train_stage1(recipe, resume=arguments.resume)
    if summary is not None:
        print(f"repository: {recipe.output}")
        for name, value in summary["metrics"].items():
            print(f"{name}: {value:.4g}")
    return 0
