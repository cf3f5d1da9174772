"""Time and memory of several questions about one image, all ways of asking in turns."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from benchmarks.efficiency.measurement import StepClock, cache_bytes, peak_bytes, synchronise
from benchmarks.efficiency.workload import Pair, Prompt, build_prompt
from modeling_glimpseprune.stock import cache_of, given_cache

PIXELS = "pixel_values"


@dataclass
class Way:
    """One way of asking.

    Attributes:
        begin: what is done before the first question; returns what questions go over, or None.
        ask: answers one question, given its number, what `begin` returned and a clock or nothing;
            returns what `generate` does.
        seconds_to_begin: of each repetition.
        first, whole, steps: seconds to the first token, of the whole answer and of a decode step,
            a list of questions a repetition.
    """

    begin: Callable
    ask: Callable
    seconds_to_begin: list[float] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    whole: list[list[float]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """What is asked.

    Attributes:
        visual_tokens: of the image, wanted.
        text_tokens: of each question.
        questions: different ones.
        retention: kept share of the visual tokens, forced.
        new_tokens: of each answer.
        prune_layers: P, K among them.
        repetitions: of the whole.
    """

    visual_tokens: int
    text_tokens: int
    questions: int
    retention: float
    new_tokens: int
    prune_layers: tuple[int, ...]
    repetitions: int


@torch.no_grad()
def measure(pair: Pair, workload: Workload) -> dict:
    """Every figure of one workload.

    Ways are taken in turns, question by question, so what else goes on on the machine meets all of
    them alike, after one question by each as a warm-up.
    """
    pruned, device = pair.pruned, pair.pruned.device
    prompts = _questions(pair, workload)
    ways = _ways(pair, workload, prompts)
    answers: dict[str, list] = {}
    for way in ways.values():
        way.ask(0, way.begin())
    for _ in range(workload.repetitions):
        held = {}
        for name, way in ways.items():
            synchronise(device)
            start = time.perf_counter()
            held[name] = way.begin()
            synchronise(device)
            way.seconds_to_begin.append(time.perf_counter() - start)
            for of_repetition in (way.first, way.whole, way.steps):
                of_repetition.append([])
        answers = {name: [] for name in ways}
        for number in range(workload.questions):
            for name, way in ways.items():
                clock = StepClock(device)
                output = way.ask(number, held[name], stopping_criteria=[clock])
                way.first[-1].append(clock.seconds[0])
                way.whole[-1].append(sum(clock.seconds))
                way.steps[-1].append(statistics.median(clock.seconds[1:]))
                answers[name].append(output.sequences[0, -workload.new_tokens :].tolist())
    described = {}
    for name, way in ways.items():
        described[name] = {
            "seconds to begin": way.seconds_to_begin,
            "seconds to the first token": way.first,
            "seconds of the answer": way.whole,
            "seconds a decode step": way.steps,
            "answers": answers[name],
        }
        described[name] |= bytes_of(way, pruned)
    return {
        "visual": prompts[0].visual,
        "kept": int(workload.retention * prompts[0].visual),
        "text": prompts[0].text,
        "questions": workload.questions,
        "new tokens": workload.new_tokens,
        "repetitions": workload.repetitions,
        "layers": len(pruned.model.language_model.layers),
        "glimpse layer": pruned.config.glimpse_layer,
        "prune layers": list(workload.prune_layers),
        "ways": described,
        "equal answers": _equal_answers(answers, workload),
    }


def bytes_of(way: Way, model: PreTrainedModel) -> dict[str, int]:
    """What one way of asking holds, and takes at its most; the same at every run on a CPU."""
    held = way.begin()
    return {
        "bytes held": 0 if held is None else _held_bytes(held),
        "peak bytes to begin": peak_bytes(way.begin, model),
        "peak bytes of a question": peak_bytes(_bound(way.ask, held), model),
        "bytes of a question's keys and values": cache_bytes(cache_of(way.ask(0, held))),
    }


def _ways(pair: Pair, workload: Workload, prompts: list[Prompt]) -> dict[str, Way]:
    stock, pruned = pair
    tokens = {"max_new_tokens": workload.new_tokens, "min_new_tokens": workload.new_tokens}
    tokens |= {"do_sample": False, "return_dict_in_generate": True}
    end = prompts[0].visual + prompts[0].text - workload.text_tokens
    whole = [prompt.inputs for prompt in prompts]
    texts = [{n: each for n, each in inputs.items() if n != PIXELS} for inputs in whole]

    def stock_prefix() -> DynamicCache:
        cache, begun = DynamicCache(), dict(whole[0])
        for name in begun.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
            begun[name] = begun[name][:, :end]
        stock(**begun, use_cache=True, logits_to_keep=1, **given_cache(cache))
        return cache

    def ask_over_cache(number: int, cache: DynamicCache, **more):
        cache = given_cache(copy.deepcopy(cache))
        return stock.generate(**texts[number], **cache, **tokens, **more)

    def ask_fresh(number: int, _, **more):
        return stock.generate(**whole[number], **tokens, **more)

    ways = {
        "stock fresh": Way(lambda: None, ask_fresh),
        "stock, prefix cache": Way(stock_prefix, ask_over_cache),
    }
    for layer in workload.prune_layers:
        settings = {"prune_threshold": 0.0, "max_keep_ratio": workload.retention}
        ways |= _own_ways(pruned, whole, texts, layer, settings | {"prune_layer": layer} | tokens)
    return ways


def _own_ways(pruned, whole: list[dict], texts: list[dict], layer: int, settings: dict) -> dict:
    def ask_fresh(number: int, _, **more):
        return pruned.generate(**whole[number], **settings, **more)

    def ask_over(number: int, prefix, **more):
        inputs = {name: texts[number][name] for name in ("input_ids", "attention_mask")}
        return pruned.generate(**inputs, **given_cache(prefix), **settings, **more)

    return {
        f"fresh, P = {layer}": Way(lambda: None, ask_fresh),
        f"look, P = {layer}": Way(lambda: pruned.look(**whole[0], prune_layer=layer), ask_over),
    }


def _questions(pair: Pair, workload: Workload) -> list[Prompt]:
    """Prompts that begin with one image and end in different words."""
    first = build_prompt(
        pair.pruned, 1, workload.visual_tokens, workload.text_tokens, pair.pruned.dtype
    )
    generator = torch.Generator().manual_seed(1)
    prompts = [first]
    for _ in range(workload.questions - 1):
        ids = first.inputs["input_ids"].clone()
        words = torch.randint(10, 100, (1, workload.text_tokens), generator=generator)
        ids[:, -workload.text_tokens :] = words
        prompts.append(Prompt(first.inputs | {"input_ids": ids}, first.visual, first.text))
    return prompts


def _held_bytes(held) -> int:
    """Of a prefix with its states, or of a cache."""
    return held.nbytes if hasattr(held, "nbytes") else cache_bytes(held)


def _bound(ask: Callable, held) -> Callable:
    return lambda: ask(0, held)


def _equal_answers(answers: dict[str, list], workload: Workload) -> dict[str, int]:
    """Questions whose answers over what is shared are those of whole prompts."""
    pairs = {"stock, prefix cache": "stock fresh"}
    pairs |= {f"look, P = {layer}": f"fresh, P = {layer}" for layer in workload.prune_layers}
    return {
        name: sum(map(list.__eq__, answers[name], answers[fresh])) for name, fresh in pairs.items()
    }
