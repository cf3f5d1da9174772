"""`glimpseprune train-base`: train the tiny base from nothing and measure it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .recipe_arguments import recipe_help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("tiny_base"),
        help=f"{recipe_help('tiny_base')} (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--start", type=Path, help="model folder to go on from, not from nothing")
    parser.add_argument(
        "--start-vision", type=Path, help="model folder to take the vision encoder from, no more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="time between savings")
    parser.add_argument("--no-resume", action="store_true", help="ignore a state in the folder")


def run(arguments: argparse.Namespace) -> int:
    import json

    import torch

    from glimpseprune.tiny_world.recipe import load_recipe
    from glimpseprune.tiny_world.training import BaseTrainer, write_summary
    from glimpseprune.tiny_world.vocabulary import build_processor

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    trainer = BaseTrainer(recipe, build_processor(), arguments.output, arguments.seed)
    if not arguments.no_resume and trainer.resume():
        print(f"resuming after step {trainer.step} of {recipe.total_steps}")
    elif arguments.start:
        trainer.start_from(arguments.start)
    elif arguments.start_vision:
        trainer.start_vision_from(arguments.start_vision)
    trainer.train(save_minutes=arguments.save_minutes)
    print(json.dumps(write_summary(trainer), indent=2))
    return 0
