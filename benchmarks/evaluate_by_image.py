"""Measure `glimpseprune evaluate` grouped by image beside whole prompts, batch by batch in turns.

    python -m benchmarks.evaluate_by_image --output benchmarks/results/evaluate_by_image.json

asks every question by the four methods of the command both ways, on the tiny model and pages of its
world, and says whether the answers are equal. Processor time is what counts: other work on the
machine does not enter it.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.efficiency.__main__ import describe_machine
from glimpseprune.baselines.method import Method
from glimpseprune.commands.evaluate import evaluated_methods, read_samples
from glimpseprune.evaluation import batches, evaluate
from glimpseprune.loading import load_model
from glimpseprune.portable import write_json
from glimpseprune.sample import Sample

WAYS = {"whole prompts": True, "by image": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", help="folder or Hub repository (default: the tiny model)")
    parser.add_argument("--pages", type=int, default=60, help="with four questions each")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, processor = load_model(arguments.model)
    samples = read_samples(None, None, 4 * arguments.pages, arguments.seed)
    methods = evaluated_methods(arguments.seed)
    result = compare(model, processor, samples, list(methods.values()), arguments.batch_size)
    settings = {
        "model": arguments.model or "hub_configs/tiny",
        "pages": len({sample.path for sample in samples}),
        "questions": len(samples),
        "methods": list(methods),
        "batch_size": arguments.batch_size,
        "dtype": str(model.dtype),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(str(model.device))
    write_json(arguments.output, {"machine": machine, "settings": settings} | result)
    print(
        f"{result['seconds']['by image']:.2f} of {result['seconds']['whole prompts']:.2f} seconds, "
        f"{result['ratio']:.3f}; {result['equal answers']} of {result['answers']} answers equal"
    )


def compare(
    model, processor, samples: Sequence[Sample], methods: Sequence[Method], batch_size: int
) -> dict:
    """Processor seconds of both ways and how many answers are equal."""
    every_batch = list(batches(samples, batch_size))
    seconds = {name: [] for name in WAYS}
    equal = total = 0
    for turn, batch in enumerate([every_batch[0], *every_batch]):
        answers = {}
        for name in sorted(WAYS, reverse=bool(turn % 2)):
            start = time.process_time()
            evaluation = evaluate(model, processor, batch, methods, batch_size, fresh=WAYS[name])
            seconds[name].append(time.process_time() - start)
            answers[name] = [answer.text for given in evaluation.answers for answer in given]
        if turn:  # the first is a warm-up
            pairs = list(zip(*answers.values(), strict=True))
            equal += sum(first == second for first, second in pairs)
            total += len(pairs)
    sums = {name: sum(each[1:]) for name, each in seconds.items()}
    return {
        "seconds": sums,
        "ratio": sums["by image"] / sums["whole prompts"],
        "equal answers": equal,
        "answers": total,
        "threads": torch.get_num_threads(),
        "seconds by batch": {name: each[1:] for name, each in seconds.items()},
    }


if __name__ == "__main__":
    main()
