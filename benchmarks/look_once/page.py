"""The Markdown page about several questions about one image."""

import statistics
import textwrap
from itertools import accumulate
from pathlib import Path

from benchmarks.prefill_flops import MODELS, many_questions
from glimpseprune.hub.shards import read_json
from glimpseprune.look_cost import ManyQuestions, look_numbers, stale_keys_and_values

MODEL, LATE, EARLY = "qwen2_5_vl_7b", 18, 5
VISUAL, KEPT, PREFIX_TEXT, QUESTION = 5074, 202, 16, 44
COUNTED, MEASURED = (1, 2, 4, 8, 16, 32), (1, 4, 8)
STALE = {  # P, visual tokens and those kept of models whose glimpse is read ahead
    "qwen2_5_vl_7b": (EARLY, VISUAL, KEPT),
    "qwen2_5_vl_3b": (6, VISUAL, KEPT),
    "qwen3_vl_8b": (5, VISUAL, KEPT),
    "llava_1_5_7b": (4, 576, 64),
}
OTHERS = {"evaluate": "evaluate_by_image.json", "second": "second_questions.json"}
RIVAL, FRESH = "stock, prefix cache", "stock fresh"
COLUMNS = (
    "stock fresh",
    RIVAL,
    "GlimpsePrune fresh",
    "**look once**",
    "of stock fresh",
    "of stock, prefix cache",
    "of GlimpsePrune fresh",
)
INTRODUCTION = """# Look once, ask often

```python
prefix = model.look(**inputs)  # vision encoder and layers 0..P, once
model.generate(**first, past_key_values=prefix)  # whole prompts, pixels may be left out
model.generate(**second, past_key_values=prefix)
```

"""
ABOUT = """Written by `python -m benchmarks.look_once --output benchmarks/results/look_once.json
--page docs/look_once.md`. The rival to beat is the stock model with a plain prefix cache,
transformers' own idiom for a common beginning: a `DynamicCache` of the prompt up to the image's
end, prefilled once and copied for each question. It shares everything but the question; a look
shares layers 0..P only, as each question chooses other tokens for the layers above."""


def write_page(results: Path, page: Path) -> None:
    """Write the page from a file of results and those that lie beside it, as far as there are any.

    Args:
        results: what `measure` found.
        page: Markdown file to write.
    """
    sections = [INTRODUCTION + ABOUT, "## Counted\n\n" + counted()]
    if results.exists():
        sections.append("## Measured\n\n" + _measured(read_json(results)))
    others = {name: results.with_name(file) for name, file in OTHERS.items()}
    if others["second"].exists():
        sections.append("## Second questions\n\n" + _second(read_json(others["second"])))
    if others["evaluate"].exists():
        text = _evaluated(read_json(others["evaluate"]))
        sections.append("## `evaluate`, grouped by image\n\n" + text)
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def counted() -> str:
    """Operations of 1 to 32 questions at P = K and at an early P."""
    command = "python benchmarks/prefill_flops.py --questions 1 2 4 8 16 32"
    introduction = f"""TFLOP of the prefills of n questions about one image, Qwen2.5-VL-7B (28
        layers, K = {LATE}), {VISUAL} visual tokens of which {KEPT} stay, {PREFIX_TEXT} text tokens
        up to the image's end, {QUESTION} behind it (`{command} --visual {VISUAL} --kept {KEPT}`;
        the formulas are held to torch's counter by `tests/test_look_cost.py`)."""
    parts = [_wrapped(introduction)]
    for layer in (LATE, EARLY):
        for with_vision in (True, False):
            law = _law(layer, with_vision)
            vision = "with the vision encoder" if with_vision else "without"
            rows = [f"| n, P = {layer}, {vision} | " + " | ".join(COLUMNS) + " |"]
            rows.append("|---" * (len(COLUMNS) + 1) + "|")
            rows += [_counted_row(law, n) for n in COUNTED]
            parts.append("\n".join(rows))
    laws = {layer: _law(layer, with_vision=False) for layer in (LATE, EARLY)}
    evens = " and ".join(
        f"{int(law.break_even)} questions at P = {layer}" for layer, law in laws.items()
    )
    late, early = laws.values()
    rows = ["| TFLOP | P = 18 | P = 5 |", "|---|---|---|"]
    vision = _law(LATE, True).vision / 1e12
    for name, values in {
        "vision encoder": (vision, vision),
        "look": (late.looking / 1e12, early.looking / 1e12),
        "a question over the look": (late.asking / 1e12, early.asking / 1e12),
        "stock, prefix": (late.caching / 1e12, early.caching / 1e12),
        "a question over that cache": (late.asking_stock / 1e12, early.asking_stock / 1e12),
    }.items():
        rows.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    rows.append(f"| MiB held by a look, bfloat16 | {_held(LATE):.1f} | {_held(EARLY):.1f} |")
    rows.append(f"| MiB held by the stock cache | {_held_stock():.1f} | {_held_stock():.1f} |")
    parts.append("\n".join(rows))
    dearer = [law.asking / law.asking_stock for law in laws.values()]
    even = f"""**Break-even.** A question over a look costs {dearer[0]:.1f} times one over the stock
        prefix cache at P = {LATE} and {dearer[1]:.1f} times at P = {EARLY}, where kept tokens and
        text run through more layers again and the look-ahead computes keys and values of every
        visual token for each question. So a look has cost fewer operations than the stock model
        with a prefix cache up to {evens}, and more from there on (with or without the vision
        encoder, which both pay once). Against whole prompts a look wins from the second question
        on."""
    parts.append(_wrapped(even))
    return "\n\n".join([*parts, _stale()])


def _stale() -> str:
    """Why a look at an early P does not hold what the look-ahead makes of stale states."""
    saved, _ = stale_keys_and_values(MODELS[MODEL][0], LATE, EARLY, VISUAL)
    eight = 1 - 7 * saved / _law(EARLY, with_vision=False).looked(8)
    why = f"""**Not held: keys and values of stale states.** With an early P the look-ahead makes
        them of the same states for each question. A look could hold them, and does not: at 7B and
        P = {EARLY} each question but the first would save {saved / 1e12:.3f} TFLOP, eight questions
        {1 - eight:.0%} of what they cost without the vision encoder, for more than twice the bytes,
        nearly those of a look at P = K. Where a token has more keys and values (Qwen3-VL-8B: 8
        heads; LLaVA-1.5: all 32) the share is a quarter, and the bytes three to four times as
        many:"""
    rows = ["| | P of K | a question, TFLOP | of it saved | MiB held | more | MiB held at P = K |"]
    rows.append("|---" * 7 + "|")
    for model, (layer, visual, kept) in STALE.items():
        decoder, predictor, glimpse_layer = MODELS[model]
        shape = (layer, PREFIX_TEXT, QUESTION, visual, kept)
        asking = many_questions(model, *shape, with_vision=False).asking
        saved, numbers = stale_keys_and_values(decoder, glimpse_layer, layer, visual)
        held, late = (
            look_numbers(decoder, predictor, PREFIX_TEXT + visual, visual, each)
            for each in (layer, glimpse_layer)
        )
        mebibytes = [f"{2 * each / 2**20:.1f}" for each in (held, numbers, late)]
        rows.append(
            f"| {model} | {layer} of {glimpse_layer} | {asking / 1e12:.3f} | "
            f"{saved / asking:.0%} | {mebibytes[0]} | {mebibytes[1]} | {mebibytes[2]} |"
        )
    return _wrapped(why) + "\n\n" + "\n".join(rows)


def _law(layer: int, with_vision: bool) -> ManyQuestions:
    return many_questions(MODEL, layer, PREFIX_TEXT, QUESTION, VISUAL, KEPT, with_vision)


def _counted_row(law: ManyQuestions, questions: int) -> str:
    costs = [count(questions) for count in (law.stock_fresh, law.stock_cached, law.pruned_fresh)]
    looked = law.looked(questions)
    shown = [f"{cost / 1e12:.1f}" for cost in (*costs, looked)]
    shown += [f"{looked / cost:.3f}" for cost in costs]
    return f"| {questions} | " + " | ".join(shown) + " |"


def _held(layer: int) -> float:
    decoder, predictor, _ = MODELS[MODEL]
    return 2 * look_numbers(decoder, predictor, PREFIX_TEXT + VISUAL, VISUAL, layer) / 2**20


def _held_stock() -> float:
    decoder = MODELS[MODEL][0]
    return 4 * decoder.layers * (PREFIX_TEXT + VISUAL) * decoder.key_value_width / 2**20


def _measured(results: dict) -> str:
    introduction = """Stock and pruned model share weights (random), the kept share is forced, and
        all ways are taken in turns, question by question, in one process. Seconds are medians over
        repetitions; those of n questions include the look or the prefix. Bytes follow the tensors
        that operations make (`LiveBytes`), the same at every run: what is held between questions,
        the peak of one question above that, and the peak while looking. Other work ran on the
        machine, so seconds are longer than on an idle one, and ratios of few repetitions rough."""
    described = _described(results["machine"] | results["settings"])
    points = [_point(point) for point in results["points"]]
    return "\n\n".join([_wrapped(introduction), described, *points])


def _point(point: dict) -> str:
    rows = [
        f"**{point['visual']} visual tokens**, {point['kept']} kept, {point['text']} other tokens, "
        f"K = {point['glimpse layer']} of {point['layers']}, {point['new tokens']} new tokens, "
        f"{point['repetitions']} repetitions of {point['questions']} questions. Answers equal to "
        "those of whole prompts: "
        + ", ".join(
            f"{name} {equal} of {point['questions']}"
            for name, equal in point["equal answers"].items()
        )
        + ".",
        "",
        "| | " + " | ".join(point["ways"]) + " |",
        "|---" * (len(point["ways"]) + 1) + "|",
    ]
    ways = point["ways"].values()
    for number in MEASURED:
        if number <= point["questions"]:
            values = [f"{_seconds_of(way, number):.2f}" for way in ways]
            rows.append(f"| seconds of {number} questions | " + " | ".join(values) + " |")
    for title, name, unit in (
        ("seconds to look, or of the prefix", "seconds to begin", 1),
        ("seconds to the first token of a question", "seconds to the first token", 1),
        ("milliseconds a decode step", "seconds a decode step", 1e3),
        ("MB held", "bytes held", 1e-6),
        ("peak MB while looking", "peak bytes to begin", 1e-6),
        ("peak MB of a question", "peak bytes of a question", 1e-6),
        ("MB of its keys and values", "bytes of a question's keys and values", 1e-6),
    ):
        medians = [_median(way[name]) * unit for way in ways]
        values = [f"{value:.3g}" if value > 1e-4 else "" for value in medians]
        rows.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(rows) + "\n\n" + _ratios(point)


def _ratios(point: dict) -> str:
    """Looks over each other way, medians of ratios of one repetition's sums."""
    rows = ["| | questions | of stock fresh | of stock, prefix cache | of the same fresh |"]
    rows.append("|---|---|---|---|---|")
    for layer in point["prune layers"]:
        look = point["ways"][f"look, P = {layer}"]
        others = [point["ways"][name] for name in (FRESH, RIVAL, f"fresh, P = {layer}")]
        for number in MEASURED:
            if number <= point["questions"]:
                ratios = [
                    statistics.median(
                        a / b
                        for a, b in zip(_sums(look, number), _sums(other, number), strict=True)
                    )
                    for other in others
                ]
                shown = " | ".join(f"{ratio:.3f}" for ratio in ratios)
                rows.append(f"| look, P = {layer} | {number} | {shown} |")
    return "\n".join(rows)


def _sums(way: dict, questions: int) -> list[float]:
    """Seconds of the first n questions in each repetition, what goes ahead of them included."""
    return [
        begin + list(accumulate(answers))[questions - 1]
        for begin, answers in zip(
            way["seconds to begin"], way["seconds of the answer"], strict=True
        )
    ]


def _seconds_of(way: dict, questions: int) -> float:
    return statistics.median(_sums(way, questions))


def _median(values) -> float:
    """Of a number, a list of them, or a list of lists."""
    if not isinstance(values, list):
        return values
    return statistics.median(_median(value) for value in values)


def _second(content: dict) -> str:
    found = content["results"]
    pairs = found["pairs"]

    def share(name: str) -> str:
        return f"{found[name]:.1%}"

    first, own = "the first one's mask", "its own mask"
    introduction = f"""A pruned cache that is kept for the next turn is pruned for the question it
        came with. {pairs} pairs of questions about one page of the tiny world (`python -m
        benchmarks.second_questions --output benchmarks/results/second_questions.json`):"""
    rows = ["| | under the first question's mask | over the prefix |", "|---|---|---|"]
    for name, values in {
        "evidence of the second question that is kept": (
            f"evidence in {first}",
            f"evidence in {own}",
        ),
        "the same as second turns of a conversation": (
            f"evidence in {first}",
            f"evidence in {own}, second turn",
        ),
        "visual tokens kept": (f"kept by {first}", f"kept by {own}"),
        "second questions answered right": (f"right under {first}", "right over the prefix"),
    }.items():
        rows.append(f"| {name} | " + " | ".join(map(share, values)) + " |")
    equal = f"""Over the prefix {found["answers equal to fresh prompts"]} of {pairs} answers and
        {found["masks equal to fresh prompts"]} of {pairs} masks equal those of whole prompts (right
        afresh: {share("right afresh")}), and as second turns
        {found["answers equal to fresh conversations"]} answers and
        {found["masks equal to fresh conversations"]} masks those of whole conversations; importance
        differs by at most {found["largest difference of importance"]:.1e}. Accuracies are of single
        turns, as the tiny model was trained on those."""
    described = _described(content["machine"] | content["settings"])
    parts = [_wrapped(introduction), "\n".join(rows), _wrapped(equal), described]
    return "\n\n".join(parts)


def _evaluated(content: dict) -> str:
    seconds, settings = content["seconds"], content["settings"]
    text = f"""`glimpseprune evaluate` looks at each different image of a batch once.
        {settings["questions"]} questions about {settings["pages"]} pages of the tiny world by its
        four methods, both ways batch by batch in turns (`python -m benchmarks.evaluate_by_image
        --output benchmarks/results/evaluate_by_image.json`): {seconds["by image"]:.2f} processor
        seconds against {seconds["whole prompts"]:.2f} by whole prompts (`--fresh`),
        **{content["ratio"]:.3f}**; {content["equal answers"]} of {content["answers"]} answers
        equal."""
    chosen = {name: settings[name] for name in ("model", "batch_size", "dtype")}
    return _wrapped(text) + "\n\n" + _described(content["machine"] | chosen)


def _wrapped(text: str) -> str:
    """A paragraph in lines of a page's width."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)


def _described(settings: dict) -> str:
    return ", ".join(f"{name}: {value}" for name, value in settings.items()) + "."
