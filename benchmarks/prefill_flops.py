"""Count the floating-point operations of a prefill, stock against pruned, over prune layers.

    python benchmarks/prefill_flops.py
    python benchmarks/prefill_flops.py --questions 1 2 4 8 16 32 --visual 5074 --kept 202

With `--questions` it counts so many questions about one image: whole prompts, the stock model with
a plain prefix cache, and a look. The formulas are those of `glimpseprune.prefill_cost` and
`glimpseprune.look_cost`.
"""

import argparse

from glimpseprune.look_cost import ManyQuestions
from glimpseprune.prefill_cost import (
    OFFICIAL_PREDICTOR_7B,
    PREDICTOR_QWEN3_VL_8B,
    QWEN2_5_VL_7B,
    QWEN2_5_VL_VISION,
    QWEN3_VL_8B,
    Additions,
    Decoder,
    Predictor,
    look_ahead,
    pruned_after_layer,
    pruned_prefill,
    stock_prefill,
)

MODELS = {
    "qwen2_5_vl_3b": (Decoder(36, 2048, 11008, 16, 2), Predictor(4, 256, 512, 1280, 16), 23),
    "qwen2_5_vl_7b": (QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18),
    "qwen3_vl_8b": (QWEN3_VL_8B, PREDICTOR_QWEN3_VL_8B, 24),
    "llava_1_5_7b": (Decoder(32, 4096, 11008, 32, 32), Predictor(4, 256, 512, 1024, 32), 21),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen2_5_vl_7b")
    parser.add_argument("--prune-layers", type=int, nargs="*", default=[7, 6, 5, 4, 2, 0])
    parser.add_argument("--text", type=int, default=60, help="text tokens of the prompt")
    parser.add_argument("--visual", type=int, default=5000)
    parser.add_argument("--kept", type=int, nargs="+", default=[200, 550])
    parser.add_argument("--rank", type=int, default=0, help="of both low-rank additions")
    parser.add_argument(
        "--questions", type=int, nargs="*", help="count so many about one image, by what they share"
    )
    parser.add_argument(
        "--prefix-text", type=int, default=16, help="of the text, tokens up to the image's end"
    )
    arguments = parser.parse_args()
    if arguments.questions:
        _print_questions(arguments)
        return
    decoder, predictor, glimpse_layer = MODELS[arguments.model]
    text, visual = arguments.text, arguments.visual
    additions = Additions(arguments.rank, arguments.rank)
    stock = stock_prefill(decoder, text + visual)
    print(f"{arguments.model}, K = {glimpse_layer}, {text} text and {visual} visual tokens")
    print(f"stock prefill {stock / 1e12:.2f} TFLOP; shares of it:")
    print("kept".ljust(28), *(f"{kept:>8}" for kept in arguments.kept))
    shape = (decoder, predictor, glimpse_layer, text, visual)
    after = [pruned_after_layer(*shape, kept) / stock for kept in arguments.kept]
    print("after layer K (official)".ljust(28), *(f"{share:8.4f}" for share in after))
    for layer in [glimpse_layer, *arguments.prune_layers]:
        shares = [pruned_prefill(*shape, kept, layer, additions) / stock for kept in arguments.kept]
        ahead = ""
        if layer < glimpse_layer:
            cost = look_ahead(decoder, glimpse_layer, layer, text, visual, additions)
            ahead = f"  of which looking ahead {cost / stock:.4f}"
        print(f"P = {layer}".ljust(28), *(f"{share:8.4f}" for share in shares), ahead)
    print(f"predictor {predictor.cost(visual) / stock:.4f} of stock")
    if arguments.model == "qwen2_5_vl_7b":
        vision = QWEN2_5_VL_VISION.cost(visual)
        print(f"vision encoder {vision / 1e12:.2f} TFLOP, {vision / stock:.4f} of stock")


def many_questions(
    model: str,
    prune_layer: int,
    prefix_text: int,
    question: int,
    visual: int,
    kept: int,
    with_vision: bool = True,
) -> ManyQuestions:
    """Questions about one image to a model of `MODELS`.

    Args:
        prune_layer: P, at most the model's K.
        prefix_text: text tokens up to the image's end.
        question: tokens behind it.
        with_vision: count the vision encoder, which is known of Qwen2.5-VL-7B alone.
    """
    decoder, predictor, glimpse_layer = MODELS[model]
    vision = QWEN2_5_VL_VISION.cost(visual) if with_vision and model == "qwen2_5_vl_7b" else 0
    tokens = (prefix_text + visual, question, visual, kept)
    return ManyQuestions(decoder, predictor, glimpse_layer, prune_layer, *tokens, vision)


def _print_questions(arguments: argparse.Namespace) -> None:
    glimpse_layer = MODELS[arguments.model][2]
    question = arguments.text - arguments.prefix_text
    for layer in [glimpse_layer, *arguments.prune_layers]:
        for with_vision in (True, False) if arguments.model == "qwen2_5_vl_7b" else (False,):
            shape = (arguments.prefix_text, question, arguments.visual, arguments.kept[0])
            law = many_questions(arguments.model, layer, *shape, with_vision)
            print(f"P = {layer}, vision encoder {'counted' if with_vision else 'left out'}")
            print(f"{'TFLOP after n questions':26}", *(f"{n:>9}" for n in arguments.questions))
            for name, count in (
                ("stock fresh", law.stock_fresh),
                ("stock, prefix cache", law.stock_cached),
                ("GlimpsePrune fresh", law.pruned_fresh),
                ("GlimpsePrune over a look", law.looked),
            ):
                print(f"{name:26}", *(f"{count(n) / 1e12:9.2f}" for n in arguments.questions))
            even = "never" if law.break_even is None else f"{law.break_even:.1f} questions"
            print(f"a look has cost as much as stock with a prefix cache after: {even}\n")


if __name__ == "__main__":
    main()
