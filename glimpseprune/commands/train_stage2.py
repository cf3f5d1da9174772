"""`glimpseprune train-stage2`: reinforcement learning of the language model on pruned sequences.

Several processes: `accelerate launch -m glimpseprune.cli train-stage2 --recipe ...`.
"""

import argparse
from pathlib import Path

FLAGS = ("base", "data", "image_folder", "output", "mask")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, help="YAML file (see recipes/stage2_*.yaml)")
    parser.add_argument("--base", help="GlimpsePrune repository or stock model: folder or Hub id")
    parser.add_argument("--data", help="JSON lines in the Visual-CoT schema")
    parser.add_argument("--image-folder", help="image paths are relative to it (default: the data)")
    parser.add_argument("--output", help="folder of the adapter to write; must not exist")
    parser.add_argument("--mask", help="what rollouts keep: model, evidence or all")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the recipe, such as rewards.anls=0.5",
    )


def run(arguments: argparse.Namespace) -> int:
    require_trl()
    from ..training.recipe import read_recipe
    from ..training.stage1_config import parse_override
    from ..training.stage2 import train_stage2
    from ..training.stage2_config import Stage2Recipe

    overrides = dict(parse_override(text) for text in arguments.set)
    flags = {name: getattr(arguments, name) for name in FLAGS}
    overrides |= {name: value for name, value in flags.items() if value is not None}
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
    except ImportError as error:
        raise ValueError(
            f"stage 2 needs trl, which could not be imported ({error}): pip install -e '.[train]'"
        ) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"stage 2 needs transformers 5, here is {transformers.__version__}: its adapters load "
            "on both"
        )
