"""`glimpseprune train-plus`: stage 2, merge, and stage 1 again, in one go.

Writes the adapter to `OUTPUT.adapter`, the merged model to `OUTPUT.merged` and the repository to
`OUTPUT`; with --resume, what is there is not done again.
"""

import argparse
from pathlib import Path

from .train_stage2 import require_trl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="of stage 2")
    parser.add_argument("--stage1-recipe", type=Path, help="default: the one stage 2's names")
    parser.add_argument("--base", help="GlimpsePrune repository or stock model: folder or Hub id")
    parser.add_argument("--merge-base", help="stock model to merge into (default: --base)")
    parser.add_argument("--data", help="JSON lines in the Visual-CoT schema, for both stages")
    parser.add_argument("--image-folder", help="image paths are relative to it (default: the data)")
    parser.add_argument("--output", required=True, help="folder of the repository to write")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    for stage in ("stage1", "stage2"):
        parser.add_argument(
            f"--set-{stage}",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help=f"any field of {stage}'s recipe",
        )


def run(arguments: argparse.Namespace) -> int:
    require_trl()
    from ..training.plus import train_plus
    from ..training.recipe import read_recipe
    from ..training.stage1_config import parse_override
    from ..training.stage2_config import Stage2Recipe

    stage1 = dict(parse_override(text) for text in arguments.set_stage1)
    stage2 = dict(parse_override(text) for text in arguments.set_stage2)
    flags = {name: getattr(arguments, name) for name in ("base", "data", "image_folder")}
    stage2 |= {name: value for name, value in flags.items() if value is not None}
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
