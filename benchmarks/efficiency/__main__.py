"""Measure a pruned generation beside the stock model of the same weights.

    python -m benchmarks.efficiency --output benchmarks/results/efficiency

writes `efficiency.json`, and with `--page FILE` a Markdown page with plots. Every sweep changes one
setting of the centre. Weights are random and the kept share is forced, so nothing is downloaded.
Points that are in the file already are not measured again.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
import transformers

from benchmarks.efficiency.measurement import CLOCKS
from benchmarks.efficiency.page import write_page
from benchmarks.efficiency.points import Centre, measure_all
from benchmarks.efficiency.workload import REAL, SCALED
from glimpseprune.hub.shards import read_json
from glimpseprune.portable import write_json

RESULTS = "efficiency.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.efficiency", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument(
        "--only-page", action="store_true", help="write the page from results that are there"
    )
    parser.add_argument(
        "--early", type=Path, help="results whose points below P = K the page shows"
    )
    parser.add_argument(
        "--before-encoder",
        type=Path,
        help="what benchmarks.efficiency.before_encoder wrote, for the page",
    )
    parser.add_argument("--geometry", choices=(*REAL, SCALED), default=SCALED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of both")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor: seconds of this process alone, which other work on the machine disturbs "
        "less (for one thread and no GPU)",
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[2600, 500, 1000])
    parser.add_argument("--retention", type=float, nargs="+", default=[0.04, 0.1, 0.25, 0.5])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--glimpse-layer", type=int, nargs="+", default=[9, 5, 12])
    parser.add_argument("--prune-layer", type=int, nargs="+", default=[None], help="default: K")
    parser.add_argument("--text-tokens", type=int, default=58)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and write results and page; the first value of each sweep is the centre's."""
    arguments = build_parser().parse_args(argv)
    results = arguments.output / RESULTS
    if not arguments.only_page:
        content = {"machine": describe_machine(arguments.device), "settings": settings(arguments)}
        known = measured_before(results, content) if results.exists() else []
        arguments.output.mkdir(parents=True, exist_ok=True)
        for points in measure_all(
            Centre(
                arguments.geometry,
                torch.device(arguments.device),
                getattr(torch, arguments.dtype),
                arguments.attention,
                arguments.text_tokens,
                arguments.repetitions,
                arguments.clock,
            ),
            {
                "visual_tokens": arguments.visual_tokens,
                "retention": arguments.retention,
                "batch": arguments.batch,
                "new_tokens": arguments.new_tokens,
                "glimpse_layer": arguments.glimpse_layer,
                "prune_layer": arguments.prune_layer,
            },
            known,
        ):
            write_json(results, content | {"points": points})
    if arguments.page:
        others = (arguments.early, arguments.before_encoder)
        write_page(
            read_json(results), arguments.page, *(each and read_json(each) for each in others)
        )
    return 0


def measured_before(results: Path, content: dict) -> list[dict]:
    """The points of an earlier run, which need not be measured again.

    Raises:
        ValueError: when they are of another machine or of other settings.
    """
    earlier = read_json(results)
    for part in ("machine", "settings"):
        if earlier[part] != content[part]:
            raise ValueError(f"{results} was measured with {earlier[part]}, now {content[part]}")
    return earlier["points"]


def settings(arguments: argparse.Namespace) -> dict[str, object]:
    chosen = ("geometry", "dtype", "attention", "text_tokens", "clock")
    return {name: getattr(arguments, name) for name in chosen}


def describe_machine(device: str) -> dict[str, object]:
    machine = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.device(device).type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
    return machine


if __name__ == "__main__":
    sys.exit(main())
