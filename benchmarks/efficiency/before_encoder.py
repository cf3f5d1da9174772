"""Time to the first token of a document-like page, with and without its redundant patches.

    python -m benchmarks.efficiency.before_encoder \
        --output benchmarks/results/efficiency_before_encoder.json --clock processor

The page is blank but for lines of ink, so nothing has to be downloaded. Stock and ours share their
(random) weights and are called in turns in one process; the encoder, and in ours the look for
redundant patches, are in the time. `benchmarks.efficiency --before-encoder FILE` puts the result on
the page, beside what is counted for Qwen2.5-VL-7B.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.efficiency.__main__ import describe_machine
from benchmarks.efficiency.measurement import (
    CLOCKS,
    StepClock,
    clocked_module,
    in_turns,
    median_ratio,
)
from benchmarks.efficiency.workload import (
    SCALED,
    Pair,
    Prompt,
    build_config,
    build_pair,
    build_prompt,
)
from glimpseprune.portable import write_json
from modeling_glimpseprune.stock import cache_of

MARGIN, LINE = 4, 3  # tokens: around the ink, and from one line of ink to the next
EARLY = {SCALED: 2, "qwen2_5_vl_7b": 5}  # P below K
RETENTION = 0.04


def document(prompt: Prompt, merge: int) -> Prompt:
    """The prompt with its image blank but for lines of ink.

    Args:
        prompt: of one image whose pixels are noise.
        merge: patches of a token on a side.
    """
    _, height, width = (
        prompt.inputs["image_grid_thw"][0] // torch.tensor([1, merge, merge])
    ).tolist()
    ink = torch.zeros(height, width, dtype=torch.bool)
    ink[MARGIN : height - MARGIN : LINE, MARGIN : width - MARGIN] = True
    patches = ink.flatten().repeat_interleave(merge**2)[:, None]
    pixels = prompt.inputs["pixel_values"]
    pixels = torch.where(patches.to(pixels.device), pixels, torch.ones_like(pixels))
    return Prompt(prompt.inputs | {"pixel_values": pixels}, prompt.visual, prompt.text)


def ways(prune_layer: int, early: int, visual: int) -> dict[str, dict]:
    """Arguments of `generate` by name; None is the stock model.

    Args:
        prune_layer: K.
        early: P below it.
        visual: tokens of the page.
    """
    settings = {"prune_threshold": 0.0, "max_keep_ratio": RETENTION}
    late, ahead = settings | {"prune_layer": prune_layer}, settings | {"prune_layer": early}
    left_out = {"redundant_patches": 0}
    everything = {"visual_keep_mask": torch.ones(visual, dtype=torch.bool)}
    return {
        "stock": None,
        "redundant patches left out": left_out | everything,
        "redundant patches left out, P = K": left_out | late,
        f"redundant patches left out, P = {early}": left_out | ahead,
    }


@torch.no_grad()
def measure(
    pair: Pair, prompt: Prompt, named: dict[str, dict], clock: str, repetitions: int
) -> dict:
    """Seconds to the first token, those of them in the encoder, and tokens encoded, by way."""
    device, seconds = pair.pruned.device, CLOCKS[clock]
    encoded = dict.fromkeys(named, prompt.visual)

    def call(name: str, settings: dict | None):
        model = pair.stock if settings is None else pair.pruned

        def run() -> tuple[float, float]:
            with clocked_module(model.model.visual, device, seconds) as vision:
                steps = StepClock(device, seconds)
                output = generate(model, prompt, settings or {}, stopping_criteria=[steps])
            record = getattr(cache_of(output), "glimpse", None)
            if record is not None and record.encoded is not None:
                encoded[name] = int(record.encoded.sum())
            return steps.seconds[0], sum(vision)

        return run

    calls = {name: call(name, settings) for name, settings in named.items()}
    times = in_turns(calls, repetitions)
    stock, stock_vision = zip(*times["stock"], strict=True)
    rows = {}
    for name in named:
        first, vision = zip(*times[name], strict=True)
        rows[name] = {
            "encoded": encoded[name],
            "first token": statistics.median(first),
            "encoder": statistics.median(vision),
            "first token / stock": median_ratio(first, stock),
            "encoder / stock": median_ratio(vision, stock_vision),
            "every first token": first,
        }
    return rows


def generate(model, prompt: Prompt, settings: dict, **more):
    return model.generate(
        **prompt.inputs,
        **settings,
        **more,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--geometry", choices=EARLY, default=SCALED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of both")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--visual-tokens", type=int, default=2600)
    parser.add_argument("--text-tokens", type=int, default=58)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    pair = build_pair(build_config(arguments.geometry, None), device, dtype, arguments.attention)
    prompt = build_prompt(pair.pruned, 1, arguments.visual_tokens, arguments.text_tokens, dtype)
    prompt = document(prompt, pair.pruned.model.visual.spatial_merge_size)
    layer = pair.pruned.config.glimpse_layer
    named = ways(layer, EARLY[arguments.geometry], prompt.visual)
    names = ("geometry", "dtype", "attention", "text_tokens", "clock", "repetitions")
    settings = describe_machine(arguments.device)
    settings |= {name.replace("_", " "): getattr(arguments, name) for name in names}
    settings["K"] = layer
    rows = measure(pair, prompt, named, arguments.clock, arguments.repetitions)
    for name, row in rows.items():
        print(
            name, {key: row[key] for key in ("encoded", "encoder / stock", "first token / stock")}
        )
    write_json(arguments.output, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
