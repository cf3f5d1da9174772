"""The Markdown page and plots of the efficiency benchmark."""

from pathlib import Path

from benchmarks.efficiency.before_encoder_page import section
from glimpseprune.prefill_cost import (
    OFFICIAL_PREDICTOR_7B,
    PREDICTOR_QWEN3_VL_8B,
    QWEN2_5_VL_7B,
    QWEN2_5_VL_VISION,
    QWEN3_VL_8B,
    Decoder,
    Predictor,
    look_ahead,
    pruned_prefill,
    stock_prefill,
)

RATIOS = {
    "first token": "time to first token",
    "first token without vision": "the same less the vision encoder",
    "unpruned first token": "`prune=False`, time to first token",
    "decode step": "decode step",
    "decode step, equal cache": "decode step, against stock over as short a cache",
    "peak memory": "peak memory above the weights",
    "peak memory, MLPs whole": "the same if MLPs ran whole",
    "decoder operations": "decoder operations of the prefill",
}
PLOTTED = ("first token", "decode step", "peak memory", "decoder operations")
ON_A_GPU = """None was at hand. The paper's workload on the 7B geometry, and the largest batch that
fits, would be measured by

```
python -m benchmarks.efficiency --geometry qwen2_5_vl_7b --device cuda --dtype bfloat16 \\
    --visual-tokens 5074 500 16000 --retention 0.0398 0.1 0.5 --batch 1 8 32 \\
    --new-tokens 128 1 1024 --glimpse-layer 18 9 --output FOLDER --page FOLDER/page.md
```"""
PRUNE_LAYERS = (18, 7, 6, 5, 4, 2, 0)
OTHER_MODELS = {
    "Qwen2.5-VL-3B (36 layers, K = 23)": (
        Decoder(36, 2048, 11008, 16, 2),
        Predictor(4, 256, 512, 1280, 16),
        23,
        (5000, 200),
        (23, 8, 6),
    ),
    "Qwen3-VL-8B (36 layers, K = 24)": (
        QWEN3_VL_8B,
        PREDICTOR_QWEN3_VL_8B,
        24,
        (5000, 200),
        (24, 8, 5),
    ),
    "LLaVA-1.5-7B (32 layers, K = 21, no grouped queries)": (
        Decoder(32, 4096, 11008, 32, 32),
        Predictor(4, 256, 512, 1024, 32),
        21,
        (576, 64),
        (21, 6, 4),
    ),
}
LAW_LAYERS, LAW_RETENTION = (9, 14, 18, 23), (0.03, 0.04, 0.1, 0.25, 0.5)
PAPER_PROMPT, PAPER_KEPT, TEXT = 5074, 202, 60


def write_page(
    results: dict, page: Path, early: dict | None = None, before_encoder: dict | None = None
) -> None:
    """Write the page, and a plot a sweep beside it.

    Args:
        results: content of a results file.
        early: of another one, whose points below P = K are shown in place of these.
        before_encoder: what `benchmarks.efficiency.before_encoder` wrote.
    """
    points = results["points"]
    centre = points[0]
    sections = [
        _introduction(results, early is not None),
        "## The centre\n\n" + _centre(centre),
        "## Sweeps\n\n" + _sweeps(points, page),
        "## Where the time goes\n\n" + _profiles(centre["profiles"]),
        "## The law of the prefill's cost\n\n" + _law(),
        "## Dropping early, looking ahead\n\n" + _early_law() + _early_times(early or results),
        "## Before the encoder\n\n" + section(before_encoder),
    ]
    if not str(results["machine"].get("device", "")).startswith("NVIDIA"):
        sections.append("## On a GPU\n\n" + ON_A_GPU)
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _introduction(results: dict, with_early: bool) -> str:
    repetitions = sorted({point["repetitions"] for point in results["points"]})
    unpruned = sorted(point["ratios"]["unpruned first token"] for point in results["points"])
    early = " and points below P = K out of another file (`--early FILE`)" if with_early else ""
    return f"""# Efficiency

Written by `python -m benchmarks.efficiency --output benchmarks/results --page docs/efficiency.md`
with the sweeps `{_flags(results["points"])}`{early}.
Pruned and stock model share weights (random) and attention implementation, run in turns in one
process, and compute the logits of the last position only. Ratios are pruned over stock, medians of
ratios of calls that followed one another. Retention is the kept share of the visual tokens after
layer P, and is forced. Peak memory on a CPU follows the tensors that operations return
(`LiveBytes`); what kernels need inside themselves is not in it.

{_described(results)}; repetitions: {" or ".join(map(str, repetitions))} (the JSON says which).

How far to trust a ratio of times: `prune=False` runs the stock computations (the same operations by
count), and its ratios range from {unpruned[0]:.2f} to {unpruned[-1]:.2f}."""


def _described(results: dict) -> str:
    described = results["machine"] | results["settings"]
    return ", ".join(f"{name}: {value}" for name, value in described.items())


def _flags(points: list[dict]) -> str:
    """The arguments that name these points."""
    names = [name for name in points[0]["point"] if name != "sweep"]
    values = {name: dict.fromkeys(each["point"][name] for each in points) for name in names}
    flags = (f"--{name.replace('_', '-')} {' '.join(map(str, values[name]))}" for name in names)
    return " ".join(flags)


def _centre(centre: dict) -> str:
    point = centre["point"]
    rows = [
        f"{centre['visual']} visual and {centre['text']} other tokens, {centre['kept']} visual "
        f"tokens kept, K = {point['glimpse_layer']} of {centre['layers']}, P = "
        f"{point['prune_layer']}, batch "
        f"{point['batch']}, {point['new_tokens']} new tokens, {centre['repetitions']} repetitions; "
        "on average "
        f"{centre['average visual tokens a layer']:.0f} visual tokens a layer.",
        "",
        "| | stock | pruned | ratio | of the fastest |",
        "|---|---|---|---|---|",
    ]
    first, steps = centre["seconds to the first token"], centre["seconds a decode step"]
    less = centre["seconds to the first token without vision"]
    ratios, peaks = centre["ratios"], centre["peak bytes above the weights"]
    held, every = centre["cache bytes after the prefill"], centre["every time"]
    name = "first token"
    rows.append(_row("seconds to the first token", first, ratios[name], 1, _fastest(every[name])))
    name = "first token without vision"
    rows.append(_row("less the vision encoder", less, ratios[name], 1, _fastest(every[name])))
    unpruned = {"stock": first["stock"], "pruned": first["unpruned"]}
    fastest = _fastest(every["first token"], "unpruned")
    ratio = ratios["unpruned first token"]
    rows.append(_row("seconds to the first token, `prune=False`", unpruned, ratio, 1, fastest))
    if steps:
        every_step = every["decode step"]
        fastest = _fastest(every_step)
        rows.append(_row("milliseconds a decode step", steps, ratios["decode step"], 1e3, fastest))
        against = {"stock": steps["equal cache"], "pruned": steps["pruned"]}
        ratio = ratios["decode step, equal cache"]
        fastest = _fastest(every_step, "pruned", "equal cache")
        rows.append(_row("the same, stock over as short a cache", against, ratio, 1e3, fastest))
    rows.append(_row("peak MB above the weights", peaks, ratios["peak memory"], 1e-6))
    rows.append(_row("MB of keys and values", held, held["pruned"] / held["stock"], 1e-6))
    for stage in centre["operations"]["stock"]:
        counts = {name: of[stage] for name, of in centre["operations"].items()}
        ratio = counts["pruned"] / counts["stock"] if counts["stock"] else None
        rows.append(_row(f"GFLOP, {stage}", counts, ratio, 1e-9))
    rows.append(f"| decoder operations | | | {ratios['decoder operations']:.3f} | |")
    return "\n".join(rows)


def _row(
    name: str,
    values: dict,
    ratio: float | None,
    unit: float = 1.0,
    fastest: float | None = None,
) -> str:
    stock, pruned = (f"{values[each] * unit:.4g}" for each in ("stock", "pruned"))
    shown = ("" if each is None else f"{each:.3f}" for each in (ratio, fastest))
    return f"| {name} | {stock} | {pruned} | {' | '.join(shown)} |"


def _fastest(times: dict[str, list[float]], name: str = "pruned", other: str = "stock") -> float:
    """Ratio of the shortest times, which other work on the machine disturbs least."""
    return min(times[name]) / min(times[other])


def _sweeps(points: list[dict], page: Path) -> str:
    centre, parts = points[0], []
    sweeps = dict.fromkeys(each["point"]["sweep"] for each in points[1:])
    for sweep in [name for name in sweeps if name != "prune_layer"]:
        swept = [each for each in points if each["point"]["sweep"] in (sweep, "centre")]
        swept.sort(key=lambda each: each["point"][sweep])
        rows = [f"| {sweep} | " + " | ".join(RATIOS.values()) + " |"]
        rows.append("|---" * (len(RATIOS) + 1) + "|")
        for each in swept:
            values = [each["ratios"].get(name) for name in RATIOS]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            rows.append(f"| {each['point'][sweep]} | " + " | ".join(cells) + " |")
        plot = _plot(sweep, swept, page)
        parts.append("\n".join(rows) + f"\n\n![ratios over {sweep}]({plot})")
    others = {name: value for name, value in centre["point"].items() if name != "sweep"}
    described = ", ".join(f"{name} {value}" for name, value in others.items())
    return f"One setting at a time differs from the centre ({described}).\n\n" + "\n\n".join(parts)


def _plot(sweep: str, swept: list[dict], page: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3))
    for name in PLOTTED:
        found = [each for each in swept if name in each["ratios"]]
        where = [each["point"][sweep] for each in found]
        axes.plot(where, [each["ratios"][name] for each in found], marker="o", label=RATIOS[name])
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.set(xlabel=sweep.replace("_", " "), ylabel="pruned / stock", ylim=(0, None))
    axes.legend(fontsize=7)
    figure.tight_layout()
    name = f"{page.stem}_{sweep}.png"
    figure.savefig(page.with_name(name), dpi=100)
    pyplot.close(figure)
    return name


def _profiles(profiles: dict[str, list]) -> str:
    parts = [
        "Shares of a call's time by operation (torch's profiler, time in the operation itself)."
    ]
    for name, operations in profiles.items():
        title = name if name.endswith("step") else f"{name} prefill"
        rows = [f"| {title} | share |", "|---|---|"]
        rows += [f"| `{operation}` | {share:.3f} |" for operation, share in operations]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _law() -> str:
    stock = stock_prefill(QWEN2_5_VL_7B, TEXT + PAPER_PROMPT)
    vision = QWEN2_5_VL_VISION.cost(PAPER_PROMPT)
    rows = ["| K | " + " | ".join(f"{share:.0%} kept" for share in LAW_RETENTION) + " |"]
    rows.append("|---" * (len(LAW_RETENTION) + 1) + "|")
    for layer in LAW_LAYERS:
        costs = [
            pruned_prefill(
                QWEN2_5_VL_7B,
                OFFICIAL_PREDICTOR_7B,
                layer,
                TEXT,
                PAPER_PROMPT,
                round(share * PAPER_PROMPT),
            )
            for share in LAW_RETENTION
        ]
        rows.append(f"| {layer} | " + " | ".join(f"{cost / stock:.3f}" for cost in costs) + " |")
    paper = pruned_prefill(QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18, TEXT, PAPER_PROMPT, PAPER_KEPT)
    return f"""Counted operations of the decoder's prefill over stock, Qwen2.5-VL-7B (28 layers),
{PAPER_PROMPT} visual and {TEXT} other tokens, glimpse and predictor included
(`benchmarks/prefill_flops.py`; the formulas are held to torch's counter by `tests/test_cost.py`):

{chr(10).join(rows)}

Everything up to layer K's attention is paid in full, everything behind it almost only for what is
kept: the ratio is about (K + the attention's share of a layer) / layers + retention x the rest. At
the paper's workload ({PAPER_PROMPT} visual tokens, {PAPER_KEPT} kept, K = 18) it is
{paper / stock:.4f}.

The vision encoder costs {vision / 1e12:.1f} TFLOP for that image, {vision / stock:.2f} of the stock
decoder's prefill, and pruning in the decoder cannot touch it: with it, the prefill's ratio is
{(paper + vision) / (stock + vision):.4f}."""


def _early_law() -> str:
    """Counted costs below P = K, and where looking ahead loses."""
    stock = stock_prefill(QWEN2_5_VL_7B, TEXT + 5000)
    shape = (QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18, TEXT, 5000)
    rows = ["| P | 200 kept | 550 kept | of which looking ahead |", "|---|---|---|---|"]
    for layer in PRUNE_LAYERS:
        costs = [pruned_prefill(*shape, kept, layer) / stock for kept in (200, 550)]
        ahead = look_ahead(QWEN2_5_VL_7B, 18, layer, TEXT, 5000) / stock if layer < 18 else 0
        rows.append(f"| {layer} | {costs[0]:.3f} | {costs[1]:.3f} | {ahead:.3f} |")
    vision = QWEN2_5_VL_VISION.cost(5000)
    with_vision = (pruned_prefill(*shape, 200, 5) + vision) / (stock + vision)
    others = "\n".join(_of_another_model(name, *of) for name, of in OTHER_MODELS.items())
    return f"""With `prune_layer` P below K tokens are dropped at P, the glimpse is read ahead: the
prompt's text and the glimpse run on to K over keys and values of visual tokens as they stand at P.
Counted, Qwen2.5-VL-7B, K = 18, 5000 visual and {TEXT} other tokens, over the stock decoder's
prefill (`python benchmarks/prefill_flops.py`):

{chr(10).join(rows)}

With the vision encoder, which stays, P = 5 and 200 kept come to {with_vision:.3f}. Elsewhere:

{others}

Where it loses:

- Short prompts. The look-ahead runs K - P layers once more over a few tokens. Their operations are
  next to nothing, but each layer's weights are read for them, which costs a share of the prefill
  that grows as prompts get shorter. On a CPU it still pays at 500 visual tokens (below); on a GPU,
  where so short a prefill waits for the weights, it may not, and was not measured.
- No grouped queries. Keys and values of a visual token then cost as much as its queries (a sixth of
  a layer for LLaVA-1.5 against a seventieth for Qwen2.5-VL-7B), so looking ahead over many layers
  costs more than it spares close to K.
- Batches wait for the device twice instead of once, as how many visual tokens each row has is not
  known on the host.
- Thresholds do not carry over from P = K, and how early a checkpoint can drop is its own affair:
  `glimpseprune calibrate` measures both."""


def _early_times(results: dict) -> str:
    """What was measured below P = K, a row a prompt length and prune layer."""
    early = [each for each in results["points"] if "first token, P = K" in each["ratios"]]
    if not early:
        return ""
    names = ("first token", "first token without vision", "peak memory", "decoder operations")
    rows = [
        "| visual tokens | P | " + " | ".join(RATIOS[name] for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    early.sort(key=lambda each: (-each["visual"], -each["point"]["prune_layer"]))
    for each in early:
        ratios = each["ratios"]
        cells = [f"{ratios[name]:.3f} ({ratios[f'{name}, P = K']:.3f})" for name in names]
        layer = each["point"]["prune_layer"]
        rows.append(f"| {each['visual']} | {layer} | " + " | ".join(cells) + " |")
    layers, point, repetitions = (early[0][name] for name in ("layers", "point", "repetitions"))
    clock = results["settings"].get("clock", "wall")
    flags = f"--clock {clock} --repetitions {repetitions} {_flags(results['points'])}"
    own = " Seconds are those of this process alone on the processor." if clock != "wall" else ""
    unpruned = sorted(each["ratios"]["unpruned first token"] for each in early)
    return f"""

Measured, K = {point["glimpse_layer"]} of {layers}, {point["retention"]:.0%} kept, \
{repetitions} repetitions. A cell is the ratio to stock, and in
brackets that with P = K, whose calls were taken in turns with the others:

{chr(10).join(rows)}

`prune=False` came to {unpruned[0]:.2f} to {unpruned[-1]:.2f} of stock there. Measured with
`python -m benchmarks.efficiency --output FOLDER {flags}`;
{_described(results)}.{own}"""


def _of_another_model(
    name: str,
    decoder: Decoder,
    predictor: Predictor,
    glimpse_layer: int,
    tokens: tuple[int, int],
    layers: tuple[int, ...],
) -> str:
    visual, kept = tokens
    stock = stock_prefill(decoder, TEXT + visual)
    shape = (decoder, predictor, glimpse_layer, TEXT, visual, kept)
    shares = [f"{pruned_prefill(*shape, layer) / stock:.3f} at P = {layer}" for layer in layers]
    return f"- {name}, {visual} visual tokens, {kept} kept: {', '.join(shares)}"
