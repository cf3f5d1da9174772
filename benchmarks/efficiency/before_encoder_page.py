"""The efficiency page's part on what is left out in front of the encoder."""

from glimpseprune.prefill_cost import (
    OFFICIAL_PREDICTOR_7B,
    QWEN2_5_VL_7B,
    QWEN2_5_VL_VISION,
    PrefillLaw,
    stock_prefill,
)

VISUAL, TEXT, RETENTION = 5074, 60, 0.0398  # the paper's workload
ENCODED = {
    "everything": 1.0,
    "photographs at 16": 0.911,
    "screenshots at 0": 0.375,
    "a denser page of text": 0.27,
    "PDF pages at 0": 0.212,
}
WAYS = ("stock decoder", "P = K = 18", "looked ahead from P = 5")


def counted() -> dict[str, tuple[float, float, float, float]]:
    """Encoder's operations and the whole prefill's in three `WAYS`, over stock's, by page; 7B."""
    law = PrefillLaw(QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18, encoder=QWEN2_5_VL_VISION)
    whole = QWEN2_5_VL_VISION.cost(VISUAL)
    stock = stock_prefill(QWEN2_5_VL_7B, TEXT + VISUAL) + whole
    rows = {}
    for name, share in ENCODED.items():
        encoded = round(share * VISUAL)
        encoder = QWEN2_5_VL_VISION.cost(encoded)
        alone = (encoder + stock_prefill(QWEN2_5_VL_7B, TEXT + encoded)) / stock
        shape = (TEXT, VISUAL, round(RETENTION * VISUAL), encoded)
        pruned = [law.share_with_encoder(layer, *shape) for layer in (18, 5)]
        rows[name] = (encoder / whole, alone, *pruned)
    return rows


def section(results: dict | None) -> str:
    """What a page says of it; measured times where there are any."""
    rows = [f"| page | encoded | encoder | {' | '.join(WAYS)} |", "|---" * 6 + "|"]
    for name, shares in counted().items():
        rows.append(f"| {name} | {ENCODED[name]:.3f} | {' | '.join(f'{x:.3f}' for x in shares)} |")
    prompt = f"{VISUAL} visual and {TEXT} other tokens, {RETENTION:.2%} of the visual ones kept"
    text = f"""Counted for Qwen2.5-VL-7B, {prompt} behind P:
operations of the encoder, and of encoder and decoder together, over the stock model's
(`benchmarks/efficiency/before_encoder.py`). Most shares are those measured on real images
([use](use.md#redundant-patches)); the decoder's lower layers too see only what was encoded.

{chr(10).join(rows)}"""
    return text if results is None else text + "\n\n" + _measured(results)


def _measured(results: dict) -> str:
    settings, rows = results["settings"], results["rows"]
    stock = rows["stock"]
    lines = [
        "| | tokens encoded | seconds, encoder | over stock | seconds, first token | over stock |"
    ]
    lines.append("|---" * 6 + "|")
    for name, row in rows.items():
        cells = (
            f"{row['encoded']}",
            f"{row['encoder']:.3f}",
            f"{row['encoder / stock']:.3f}",
            f"{row['first token']:.3f}",
            f"{row['first token / stock']:.3f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    described = ", ".join(f"{name}: {value}" for name, value in settings.items())
    page = f"a page of {stock['encoded']} tokens that is blank but for lines of ink"
    return f"""Measured on {page},
all ways in turns in one run, medians ({described}):

{chr(10).join(lines)}

A CPU attends to windows in a loop, which has a turn for every window that still holds a token."""
