"""Where a base looks: evidence found by the raw attention of the prompt's end, layer by layer.

    python -m benchmarks.deep_base.looking --base runs/deep --output FILE

Nothing is trained. Of each layer's heads the one that finds most is taken, kind by kind, and their
mean beside it.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from benchmarks.versions import versions
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.commands.make_pages import parse_grid
from glimpseprune.data.visual_cot import evidence_mask
from glimpseprune.evaluation import batches
from glimpseprune.loading import load_processor, prepare
from glimpseprune.sample import Sample

SHARE = 0.111


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of a stock model")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--kinds", nargs="+", default=["value"])
    parser.add_argument("--grids", nargs="+", type=parse_grid, default=[], help="such as 8x8 24x32")
    parser.add_argument("--questions", type=int, default=200, help="validation questions a kind")
    arguments = parser.parse_args()
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        arguments.base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = load_processor(arguments.base)
    found = {}
    for kind in arguments.kinds:
        samples = read_samples(
            None, None, arguments.questions, 0, (kind,), "validation", grids=tuple(arguments.grids)
        )
        for name, asked in by_place(kind, samples).items():
            found[name] = evidence_by_layer(model, processor, asked)
            print(name, " ".join(f"{layer['best head']:.2f}" for layer in found[name]), flush=True)
    settings = {
        "base": str(arguments.base),
        "questions a kind": arguments.questions,
        "grids": arguments.grids,
        "split": "validation",
        "share": SHARE,
        **versions(),
    }
    report = {"settings": settings, "recall": found}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def by_place(kind: str, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The questions; of those that all have two places of evidence, each place by itself, too."""
    named = {kind: list(samples)}
    if all(len(sample.boxes) == 2 for sample in samples):
        for place in range(2):
            alone = [replace(sample, boxes=sample.boxes[place : place + 1]) for sample in samples]
            named[f"{kind}, place {place + 1}"] = alone
    return named


@torch.inference_mode()
def evidence_by_layer(model, processor, samples: Sequence[Sample]) -> list[dict[str, float]]:
    """A layer's part of the evidence in its best-attended `SHARE`, averaged over questions."""
    recalls: dict[int, list[torch.Tensor]] = defaultdict(list)
    for batch in batches([sample for sample in samples if sample.boxes], 16):
        images = [sample.image for sample in batch]
        inputs = prepare(processor, images, [sample.question for sample in batch])
        attentions = model(**inputs, output_attentions=True, logits_to_keep=1).attentions
        image = inputs["input_ids"] == model.config.image_token_id
        for row, sample in enumerate(batch):
            grid = tuple(int(side) // 2 for side in inputs["image_grid_thw"][row, 1:])
            evidence = evidence_mask(sample.boxes, *sample.size, grid)
            for layer, attention in enumerate(attentions):
                heads = attention[row, :, -1, image[row]]
                recalls[layer].append(_recall(torch.cat([heads.mean(0)[None], heads]), evidence))
    figures = [torch.stack(recalls[layer]).mean(0) for layer in sorted(recalls)]
    return [{"mean": float(each[0]), "best head": float(each[1:].max())} for each in figures]


def _recall(attention: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
    """`(heads,)` parts of `evidence` (`(n,)` bool) among the best of `attention` (`(heads, n)`)."""
    best = attention.topk(max(1, int(SHARE * len(evidence))), dim=-1).indices
    return evidence[best].sum(-1) / evidence.sum()


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table, a row a layer: the best head's recall and, in brackets, the mean's."""
    kinds = [kind for kind, layers in found.items() if layers]
    lines = ["| layer | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for layer in range(len(found[kinds[0]])):
        cells = (found[kind][layer] for kind in kinds)
        row = (f"{each['best head']:.2f} ({each['mean']:.2f})" for each in cells)
        lines.append(f"| {layer} | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
