"""Compare GlimpsePrune with the baselines and write one page about it.

    python -m benchmarks.report --output benchmarks/results/tiny

Writes `README.md`, its pictures and `figures.json` into the folder, and every answer into
`records.jsonl`, from which an interrupted run goes on.
"""

import argparse
from pathlib import Path

from glimpseprune.baselines.catalogue import compared_methods
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.loading import TINY_MODEL, load_model
from glimpseprune.metrics import exact_match

from .run import run_methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--model", default=str(TINY_MODEL), help="folder or Hub repository")
    parser.add_argument("--plus", help="a second repository, shown as GlimpsePrune+")
    parser.add_argument("--data", type=Path, help="JSON lines in the Visual-CoT schema")
    parser.add_argument("--image-folder", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the tiny world's pages")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    samples = read_samples(
        arguments.data, arguments.image_folder, arguments.questions, arguments.seed
    )
    model, processor = load_model(arguments.model)
    records = arguments.output / "records.jsonl"
    shape = (records, arguments.batch_size, arguments.max_new_tokens, exact_match)
    run_methods(model, processor, samples, compared_methods(), *shape)


if __name__ == "__main__":
    main()
