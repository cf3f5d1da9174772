"""Count the floating-point operations of a prefill, stock against pruned.

    python benchmarks/prefill_flops.py

The formulas follow torch's counter (two operations a multiply-add, attention counted without its
causal half, norms and activations not counted); `tests/test_cost.py` holds them to that counter on
small models.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Geometry of a decoder with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int

    def attention(self, queries: int, keys: int) -> int:
        """One layer's attention block for `queries` tokens over `keys` tokens."""
        head_size = self.hidden // self.heads
        projections = 2 * self.hidden * self.hidden
        projections += 2 * self.hidden * self.key_value_heads * head_size
        return 2 * queries * projections + 4 * queries * keys * self.hidden

    def mlp(self, tokens: int) -> int:
        """One layer's MLP."""
        return 2 * tokens * 3 * self.hidden * self.intermediate

    def layer(self, tokens: int) -> int:
        """One whole layer of a prefill."""
        return self.attention(tokens, tokens) + self.mlp(tokens)


@dataclass(frozen=True)
class Predictor:
    """Geometry of the visual importance predictor; `columns` is its attention input's width."""

    layers: int
    hidden: int
    condition: int
    vision: int
    columns: int

    def cost(self, tokens: int, padded: bool = True) -> int:
        """Scoring one image of `tokens` visual tokens.

        Args:
            padded: values padded to the width of queries, as ours are.
        """
        joint = self.hidden + self.condition
        linear = self.vision * self.condition + 2 * joint**2 + 2 * self.hidden**2
        linear += 6 * self.hidden**2
        value_width = joint if padded else self.hidden
        one_layer = 2 * tokens * linear + 2 * tokens**2 * (joint + value_width)
        return self.layers * one_layer + 2 * tokens * self.hidden * (self.columns + 1)


@dataclass(frozen=True)
class VisionEncoder:
    """Geometry of Qwen2.5-VL's vision encoder; `merge` patches a side make a visual token.

    Attributes:
        window: patches that attend to one another, `full` layers excepted.
        values: numbers of a patch.
        output: width of the decoder.
    """

    layers: int
    full: int
    hidden: int
    intermediate: int
    window: int
    merge: int
    values: int
    output: int

    def cost(self, tokens: int) -> int:
        """Encoding one image of `tokens` visual tokens whose windows are all full."""
        patches, merged = tokens * self.merge**2, self.hidden * self.merge**2
        linear = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        keys = (self.layers - self.full) * self.window + self.full * patches
        blocks = 2 * patches * linear * self.layers + 4 * patches * keys * self.hidden
        merger = 2 * tokens * merged * (merged + self.output)
        return blocks + merger + 2 * patches * self.values * self.hidden


def stock_prefill(decoder: Decoder, prompt: int) -> int:
    """The decoder's layers over a prompt of that many tokens."""
    return decoder.layers * decoder.layer(prompt)


def pruned_prefill(
    decoder: Decoder, predictor: Predictor, glimpse_layer: int, text: int, visual: int, kept: int
) -> int:
    """The same with one glimpse token, scoring, and pruning between layer K's attention and MLP.

    Args:
        glimpse_layer: K, 0-based.
        text, visual, kept: tokens of the prompt; `kept` of the `visual` ones stay.
    """
    full, short = text + visual + 1, text + kept
    cost = glimpse_layer * decoder.layer(full) + decoder.attention(full, full)
    cost += decoder.mlp(short) + (decoder.layers - glimpse_layer - 1) * decoder.layer(short)
    # The glimpse vectors of layers 0..K, and the query row read outside the attention kernel.
    cost += (glimpse_layer + 2) * 2 * decoder.hidden**2 + 2 * full * decoder.hidden
    return cost + predictor.cost(visual)


def pruned_after_layer(
    decoder: Decoder, predictor: Predictor, glimpse_layer: int, text: int, visual: int, kept: int
) -> int:
    """The official way: layer K runs to its end over all tokens, values are not padded."""
    full, short = text + visual + 1, text + kept
    cost = pruned_prefill(decoder, predictor, glimpse_layer, text, visual, kept)
    cost += decoder.mlp(full) - decoder.mlp(short)
    return cost - predictor.cost(visual) + predictor.cost(visual, padded=False)


QWEN2_5_VL_7B = Decoder(28, 3584, 18944, 28, 4)
OFFICIAL_PREDICTOR_7B = Predictor(4, 256, 512, 1280, 28)
QWEN2_5_VL_VISION = VisionEncoder(32, 4, 1280, 3420, 64, 2, 1176, 3584)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glimpse-layer", type=int, default=18)
    parser.add_argument("--text", type=int, default=60, help="text tokens of the prompt")
    parser.add_argument("--visual", type=int, default=5000)
    parser.add_argument("--kept", type=int, default=200)
    arguments = parser.parse_args()
    decoder, predictor = QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B
    prompt = arguments.text + arguments.visual
    stock = stock_prefill(decoder, prompt)
    shape = (arguments.glimpse_layer, arguments.text, arguments.visual, arguments.kept)
    ours = pruned_prefill(decoder, predictor, *shape)
    after = pruned_after_layer(decoder, predictor, *shape)
    print(f"Qwen2.5-VL-7B decoder, {vars(arguments)}")
    print(f"stock prefill            {stock / 1e12:8.2f} TFLOP")
    print(f"pruned inside layer K    {ours / 1e12:8.2f} TFLOP  {ours / stock:.4f} of stock")
    print(f"pruned after layer K     {after / 1e12:8.2f} TFLOP  {after / stock:.4f} of stock")
    print(f"  of which predictor     {predictor.cost(arguments.visual) / stock:.4f} of stock")
    vision = QWEN2_5_VL_VISION.cost(arguments.visual)
    print(f"vision encoder           {vision / 1e12:8.2f} TFLOP  {vision / stock:.4f} of stock")


if __name__ == "__main__":
    main()
