"""Arguments of the commands that load a model."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how its weights are held."""
    parser.add_argument("--model", help="folder or Hub repository (default: the tiny model)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights in memory (default: as they are stored, and on a CPU float32)",
    )
