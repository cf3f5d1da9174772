"""Measure questions about one image: whole prompts, a plain prefix cache, and a look.

    python -m benchmarks.look_once --output benchmarks/results/look_once.json

on the scaled-down geometry of `benchmarks.efficiency` with random weights and a forced kept share,
so nothing is downloaded. Points of other numbers of visual tokens that are in the file stay.
`--page FILE` writes a Markdown page from the results, the counted law and
what lies beside them: `second_questions.json` and `evaluate_by_image.json`, if they are there.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.efficiency.__main__ import describe_machine, measured_before
from benchmarks.efficiency.workload import REAL, SCALED, build_config, build_pair
from benchmarks.look_once.measurement import Workload, measure
from benchmarks.look_once.page import write_page
from glimpseprune.portable import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.look_once", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument(
        "--only-page", action="store_true", help="write the page from results that are there"
    )
    parser.add_argument("--geometry", choices=(*REAL, SCALED), default=SCALED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of both")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[1000])
    parser.add_argument("--text-tokens", type=int, default=44, help="of a question")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--retention", type=float, default=0.04)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--glimpse-layer", type=int, default=9)
    parser.add_argument("--prune-layers", type=int, nargs="+", default=[9, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and write results and page."""
    arguments = build_parser().parse_args(argv)
    if not arguments.only_page:
        device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        config = build_config(arguments.geometry, arguments.glimpse_layer)
        pair = build_pair(config, device, dtype, arguments.attention)
        settings = {name: getattr(arguments, name) for name in ("geometry", "dtype", "attention")}
        content = {"machine": describe_machine(arguments.device), "settings": settings}
        points: list[dict] = []
        if arguments.output.exists():
            points = measured_before(arguments.output, content)
        for visual in arguments.visual_tokens:
            workload = Workload(
                visual,
                arguments.text_tokens,
                arguments.questions,
                arguments.retention,
                arguments.new_tokens,
                tuple(arguments.prune_layers),
                arguments.repetitions,
            )
            point = measure(pair, workload)
            points = [each for each in points if each["visual"] != point["visual"]] + [point]
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.output, content | {"points": points})
    if arguments.page:
        write_page(arguments.output, arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
