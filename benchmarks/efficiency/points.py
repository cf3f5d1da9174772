"""One point of the benchmark: a workload, measured on the stock and the pruned model in turns."""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.efficiency.measurement import (
    CLOCKS,
    StepClock,
    cache_bytes,
    clocked_module,
    flops_by_stage,
    in_turns,
    median_ratio,
    peak_bytes,
    synchronise,
)
from benchmarks.efficiency.workload import Pair, Prompt, build_config, build_pair, build_prompt
from modeling_glimpseprune import decoder_layers
from modeling_glimpseprune.stock import cache_of, given_cache

PROFILED = 8  # operations listed


@dataclass(frozen=True)
class Centre:
    """What all points share; `clock` is one of `CLOCKS`."""

    geometry: str
    device: torch.device
    dtype: torch.dtype
    attention: str
    text_tokens: int
    repetitions: int
    clock: str = "wall"


@dataclass(frozen=True)
class Point:
    """One workload.

    Attributes:
        sweep: the setting that differs from the centre's, or "centre".
        visual_tokens: of each prompt.
        retention: kept share of them, forced.
        batch: prompts.
        new_tokens: of each answer.
        glimpse_layer: K.
        prune_layer: P, at most K; None is K.
    """

    sweep: str
    visual_tokens: int
    retention: float
    batch: int
    new_tokens: int
    glimpse_layer: int
    prune_layer: int | None = None


def points_of(sweeps: dict[str, list]) -> list[Point]:
    """The centre (the first value of each sweep), and every other value beside it.

    Prune layers are swept at every prompt length, as what they spare hangs on it. None is above K.
    """
    centre = Point("centre", **{name: values[0] for name, values in sweeps.items()})
    points = [centre]
    for name, values in sweeps.items():
        points += [replace(centre, sweep=name, **{name: value}) for value in values[1:]]
    early = [point for point in points if point.sweep == "prune_layer"]
    for visual in sweeps["visual_tokens"][1:]:
        points += [replace(point, visual_tokens=visual) for point in early]
    return [_within_depth(point) for point in points]


def _within_depth(point: Point) -> Point:
    layer = point.glimpse_layer
    prune_layer = layer if point.prune_layer is None else min(point.prune_layer, layer)
    return replace(point, prune_layer=prune_layer)


def measure_all(
    centre: Centre, sweeps: dict[str, list], measured: Sequence[dict] = ()
) -> Iterator[list[dict]]:
    """Measure every point that is not among the measured ones; one line each is printed.

    Yields:
        All results so far, the centre's first.
    """
    results, pair, layer = list(measured), None, None
    known = [each["point"] for each in measured]
    missing = [point for point in points_of(sweeps) if asdict(point) not in known]
    for point in sorted(missing, key=lambda each: each.glimpse_layer):
        if point.glimpse_layer != layer:
            layer = point.glimpse_layer
            pair = None  # frees the weights of the last
            config = build_config(centre.geometry, layer)
            pair = build_pair(config, centre.device, centre.dtype, centre.attention)
        results.append(measure(centre, point, pair))
        ratios = {name: round(value, 3) for name, value in results[-1]["ratios"].items()}
        print(asdict(point), ratios, file=sys.stderr, flush=True)
        results.sort(key=lambda each: each["point"]["sweep"] != "centre")
        yield results


@torch.no_grad()
def measure(centre: Centre, point: Point, pair: Pair) -> dict:
    """Everything about one point.

    Ratios are pruned over stock; `equal cache` is the stock model on a prompt with as many visual
    tokens as the pruned one keeps, `unpruned` ours with `prune=False`. Where P is below K, `at K`
    is ours with P = K, taken in turns with the others.
    """
    prompt = _prompt(centre, point, pair, point.visual_tokens)
    short = _prompt(centre, point, pair, max(1, round(point.retention * prompt.visual)))
    prune_layer = point.glimpse_layer if point.prune_layer is None else point.prune_layer
    settings = {
        "prune_threshold": 0.0,
        "max_keep_ratio": point.retention,
        "prune_layer": prune_layer,
    }
    runs = {
        "stock": lambda tokens, **more: _generate(pair.stock, prompt, tokens, **more),
        "pruned": lambda tokens, **more: _generate(pair.pruned, prompt, tokens, **settings, **more),
        "unpruned": lambda tokens, **more: _generate(
            pair.pruned, prompt, tokens, prune=False, **more
        ),
        "equal cache": lambda tokens, **more: _generate(pair.stock, short, tokens, **more),
    }
    compared = ["stock", "pruned"]
    if prune_layer < point.glimpse_layer:
        late = settings | {"prune_layer": point.glimpse_layer}
        runs["at K"] = lambda tokens, **more: _generate(pair.pruned, prompt, tokens, **late, **more)
        compared.append("at K")
    models = {
        name: pair.stock if name in ("stock", "equal cache") else pair.pruned for name in runs
    }
    clocked = in_turns(
        {
            name: _clocked(run, models[name], point.new_tokens, CLOCKS[centre.clock])
            for name, run in runs.items()
        },
        centre.repetitions,
    )
    first = {name: [steps[0] for _, steps in runs] for name, runs in clocked.items()}
    decoder_only = {
        name: [steps[0] - vision for vision, steps in runs] for name, runs in clocked.items()
    }
    steps = {
        name: [statistics.median(steps[1:]) for _, steps in runs if steps[1:]]
        for name, runs in clocked.items()
    }
    ratios = {
        "first token": median_ratio(first["pruned"], first["stock"]),
        "first token without vision": median_ratio(decoder_only["pruned"], decoder_only["stock"]),
        "unpruned first token": median_ratio(first["unpruned"], first["stock"]),
    }
    if point.new_tokens > 1:
        ratios["decode step"] = median_ratio(steps["pruned"], steps["stock"])
        ratios["decode step, equal cache"] = median_ratio(steps["pruned"], steps["equal cache"])
    peaks = {
        name: peak_bytes(_bound(runs[name], point.new_tokens), pair.pruned) for name in compared
    }
    with _whole_mlps():
        peaks["pruned, MLPs whole"] = peak_bytes(
            _bound(runs["pruned"], point.new_tokens), pair.pruned
        )
    ratios["peak memory"] = peaks["pruned"] / peaks["stock"]
    ratios["peak memory, MLPs whole"] = peaks["pruned, MLPs whole"] / peaks["stock"]
    caches = {name: cache_of(runs[name](1)) for name in ("stock", "pruned")}
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    flops = {name: flops_by_stage(_bound(runs[name], 1), prune_layer) for name in compared}
    decoder = {name: sum(of.values()) - of["vision"] for name, of in flops.items()}
    ratios["decoder operations"] = decoder["pruned"] / decoder["stock"]
    if "at K" in runs:
        ratios |= {
            "first token, P = K": median_ratio(first["at K"], first["stock"]),
            "first token without vision, P = K": median_ratio(
                decoder_only["at K"], decoder_only["stock"]
            ),
            "peak memory, P = K": peaks["at K"] / peaks["stock"],
            "decoder operations, P = K": decoder["at K"] / decoder["stock"],
        }
    kept = caches["pruned"].glimpse.kept // point.batch
    layers = len(pair.pruned.model.language_model.layers)
    below = prune_layer + 1
    result = {
        "point": asdict(point),
        "repetitions": centre.repetitions,
        "visual": prompt.visual,
        "kept": kept,
        "text": prompt.text,
        "layers": layers,
        "average visual tokens a layer": (below * prompt.visual + (layers - below) * kept) / layers,
        "seconds to the first token": _medians(first),
        "seconds to the first token without vision": _medians(decoder_only),
        "every time": {
            "first token": first,
            "first token without vision": decoder_only,
            "decode step": steps,
        },
        "seconds a decode step": _medians(steps),
        "peak bytes above the weights": peaks,
        "cache bytes after the prefill": held,
        "operations": flops,
        "ratios": ratios,
    }
    if point.sweep == "centre":
        result["profiles"] = {
            name: profile_of(_bound(runs[name], 1), centre.device) for name in ("stock", "pruned")
        }
        result["profiles"]["pruned decode step"] = profile_of(
            _decoding(pair, prompt, settings), centre.device
        )
    return result


def profile_of(call: Callable, device: torch.device) -> list[tuple[str, float]]:
    """The operations that take most of a call's time, with their shares."""
    activities = [ProfilerActivity.CPU]
    measure = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        measure = "self_device_time_total"
    call()
    with profile(activities=activities) as profiler:
        call()
        synchronise(device)
    events = profiler.key_averages()
    total = sum(getattr(event, measure) for event in events)
    events = sorted(events, key=lambda event: getattr(event, measure), reverse=True)
    return [(event.key, getattr(event, measure) / total) for event in events[:PROFILED]]


@contextmanager
def _whole_mlps() -> Iterator[None]:
    """What long prefills would take if they did not run their MLPs part by part."""
    chunk = decoder_layers.MLP_CHUNK
    decoder_layers.MLP_CHUNK = sys.maxsize
    try:
        yield
    finally:
        decoder_layers.MLP_CHUNK = chunk


def _prompt(centre: Centre, point: Point, pair: Pair, visual: int) -> Prompt:
    return build_prompt(pair.pruned, point.batch, visual, centre.text_tokens, centre.dtype)


def _generate(model, prompt: Prompt, tokens: int, **settings):
    return model.generate(
        **prompt.inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )


def _decoding(pair: Pair, prompt: Prompt, settings: dict) -> Callable:
    """One step over a cache that grows by a token a call."""
    output = _generate(pair.pruned, prompt, 1, **settings)
    cache, token = cache_of(output), output.sequences[:, -1:]
    return lambda: pair.pruned(input_ids=token, use_cache=True, **given_cache(cache))


def _clocked(
    run: Callable, model: PreTrainedModel, tokens: int, seconds: Callable[[], float]
) -> Callable[[], tuple[float, list[float]]]:
    """A generation that returns the seconds of its vision encoder, and those of each token."""
    backbone = model.model
    encoder = backbone.visual if hasattr(backbone, "visual") else backbone.vision_tower

    def call() -> tuple[float, list[float]]:
        with clocked_module(encoder, model.device, seconds) as vision:
            clock = StepClock(model.device, seconds)
            run(tokens, stopping_criteria=[clock])
        return sum(vision), clock.seconds

    return call


def _bound(run: Callable, tokens: int) -> Callable:
    return lambda: run(tokens)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in seconds.items() if each}
