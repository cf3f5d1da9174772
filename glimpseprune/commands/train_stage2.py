"""`glimpseprune train-stage2`: reinforcement learning of the language model on pruned sequences.

Several processes: `accelerate launch -m glimpseprune.cli train-stage2 --recipe ...`.
"""

import argparse
from pathlib import Path

from .recipe_arguments import (
    add_data_arguments,
    add_run_arguments,
    read_overrides,
    recipe_help,
)

FLAGS = ("base", "data", "image_folder", "output", "mask")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, help=recipe_help("stage2_"))
    add_data_arguments(parser)
    parser.add_argument("--output", help="folder of the adapter to write; must not exist")
    parser.add_argument("--mask", help="what rollouts keep: model, evidence or all")
    add_run_arguments(parser, "rewards.anls=0.5")


def run(arguments: argparse.Namespace) -> int:
    require_trl()
    from ..training.recipe import read_recipe
    from ..training.stage2 import train_stage2
    from ..training.stage2_config import Stage2Recipe

    overrides = read_overrides(arguments, FLAGS, arguments.set)
    recipe = read_recipe(Stage2Recipe, arguments.recipe, overrides)
    summary = train_stage2(recipe, resume=arguments.resume)
    if summary is not None:
        print(f"adapter: {recipe.output}")
        for name in ("reward", "retention", "kl"):
            if name in summary["metrics"]:
                print(f"{name}: {summary['metrics'][name]:.4g}")
        print(f"next: glimpseprune merge --adapter {recipe.output} --output MERGED")
    return 0


def require_trl() -> None:
    """Say what to install where stage 2's libraries are missing.

    Raises:
        ValueError: when trl or transformers are missing or too old.
    """
    try:
        import transformers
        from trl import GRPOConfig, GRPOTrainer  # noqa: F401

        from modeling_glimpseprune.stock import ENCODES_FIRST
    except ImportError as error:
        raise ValueError(
            f"stage 2 needs trl, which could not be imported ({error}): pip install -e '.[train]'"
        ) from None
    if not ENCODES_FIRST:
        raise ValueError(
            "stage 2 needs a transformers whose generate takes encoded images, as 5.23 does; here "
            f"is {transformers.__version__}, on which its adapters load"
        )
