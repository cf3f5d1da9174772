"""Counted floating-point operations of a prefill, stock and pruned.

The formulas follow torch's counter (two operations a multiply-add, attention counted without its
causal half, norms and activations not counted); `tests/test_cost.py` holds them to that counter on
small models.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Decoder:
    """Geometry of a decoder with grouped-query attention and a gated MLP.

    Attributes:
        head: width of a head; None is its share of the model's.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head: int | None = None

    @property
    def query_width(self) -> int:
        """Width of a token's queries, over all heads."""
        return self.hidden if self.head is None else self.heads * self.head

    def attention(self, queries: int, keys: int) -> int:
        """One layer's attention block for `queries` tokens over `keys` tokens."""
        projections = 2 * self.hidden * (self.query_width + self.key_value_width)
        return 2 * queries * projections + 4 * queries * keys * self.query_width

    def keys_and_values(self, tokens: int) -> int:
        """One layer's keys and values of some tokens."""
        return 2 * 2 * tokens * self.hidden * self.key_value_width

    @property
    def key_value_width(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.key_value_heads * self.query_width // self.heads

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
        linear = 2 * joint**2 + 2 * self.hidden**2 + 6 * self.hidden**2
        value_width = joint if padded else self.hidden
        one_layer = 2 * tokens * linear + 2 * tokens**2 * (joint + value_width)
        scores = self.layers * one_layer + 2 * tokens * self.hidden * (self.columns + 1)
        return self.conditions(tokens) + scores

    def conditions(self, tokens: int) -> int:
        """Projecting an image's tapped features, which no question has a part in."""
        return self.layers * 2 * tokens * self.vision * self.condition


@dataclass(frozen=True)
class VisionEncoder:
    """Geometry of Qwen2.5-VL's vision encoder; `merge` patches a side make a visual token.

    Where some tokens are left out it encodes the others as so many tokens of a whole image: their
    windows are counted as full, which at 7B adds less than a hundredth.

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

    @classmethod
    def of(cls, config: PretrainedConfig) -> "VisionEncoder | None":
        """Of a GlimpsePrune configuration; None where it is another encoder."""
        vision = config.vision_config
        if not hasattr(vision, "fullatt_block_indexes"):
            return None
        return cls(
            vision.depth,
            len(vision.fullatt_block_indexes),
            vision.hidden_size,
            vision.intermediate_size,
            (vision.window_size // vision.patch_size) ** 2,
            vision.spatial_merge_size,
            vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            vision.out_hidden_size,
        )

    def cost(self, tokens: int) -> int:
        """Encoding one image of `tokens` visual tokens whose windows are all full."""
        patches, merged = tokens * self.merge**2, self.hidden * self.merge**2
        linear = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        keys = (self.layers - self.full) * self.window + self.full * patches
        blocks = 2 * patches * linear * self.layers + 4 * patches * keys * self.hidden
        merger = 2 * tokens * merged * (merged + self.output)
        return blocks + merger + 2 * patches * self.values * self.hidden


@dataclass(frozen=True)
class AdditionCosts:
    """Operations of one glimpse token's low-rank additions to a layer, by their place."""

    query: int
    key: int
    attention: int
    mlp: int

    @property
    def whole(self) -> int:
        """Of the whole layer."""
        return self.attention + self.mlp


@dataclass(frozen=True)
class Additions:
    """Ranks of the low-rank additions: the glimpse token's, and those of stale states."""

    glimpse: int = 0
    stale: int = 0

    def of_a_layer(self, decoder: Decoder) -> AdditionCosts:
        """What one glimpse token's additions cost in a layer."""
        hidden, narrow = decoder.hidden, decoder.key_value_width
        query = 2 * self.glimpse * (hidden + decoder.query_width)
        key = 2 * self.glimpse * (hidden + narrow)
        mlp = 3 * 2 * self.glimpse * (hidden + decoder.intermediate)
        return AdditionCosts(query, key, 2 * query + 2 * key, mlp)


NO_ADDITIONS = Additions()


def stock_prefill(decoder: Decoder, prompt: int) -> int:
    """The decoder's layers over a prompt of that many tokens."""
    return decoder.layers * decoder.layer(prompt)


def pruned_prefill(
    decoder: Decoder,
    predictor: Predictor,
    glimpse_layer: int,
    text: int,
    visual: int,
    kept: int,
    prune_layer: int | None = None,
    additions: Additions = NO_ADDITIONS,
) -> int:
    """The same with one glimpse token, scoring, and pruning between layer P's attention and MLP.

    Args:
        glimpse_layer: K, 0-based.
        text, visual, kept: tokens of the prompt; `kept` of the `visual` ones stay.
        prune_layer: P; None is K. Below K the look-ahead is counted, too.
        additions: ranks of the glimpse's low-rank additions.
    """
    prune_layer = glimpse_layer if prune_layer is None else prune_layer
    prompt, short = text + visual, text + kept
    beside = prune_layer < glimpse_layer or additions.glimpse > 0
    full = prompt if beside else prompt + 1
    cost = prune_layer * decoder.layer(full) + decoder.attention(full, full)
    cost += decoder.mlp(short) + (decoder.layers - prune_layer - 1) * decoder.layer(short)
    # The glimpse vectors of layers 0..K, and the query row read outside the attention kernel.
    cost += (glimpse_layer + 1) * 2 * decoder.hidden**2
    cost += 2 * decoder.query_width * (decoder.hidden + prompt + 1)
    if beside:
        cost += glimpse_beside(decoder, glimpse_layer, prune_layer, prompt, additions)
    if prune_layer < glimpse_layer:
        cost += look_ahead(decoder, glimpse_layer, prune_layer, text, visual, additions)
    return cost + predictor.cost(visual)


def glimpse_beside(
    decoder: Decoder, glimpse_layer: int, prune_layer: int, prompt: int, additions: Additions
) -> int:
    """One glimpse token beside the prompt in layers 0..P, reading layer P = K excepted.

    Where it is read ahead it runs layer P's attention, and its MLP with the text.
    """
    own = additions.of_a_layer(decoder)
    cost = prune_layer * (decoder.attention(1, prompt + 1) + decoder.mlp(1) + own.whole)
    if prune_layer < glimpse_layer:
        return cost + decoder.attention(1, prompt + 1) + own.attention
    # Layer K gives its key and its query, which is counted with the reading.
    return cost + 2 * decoder.hidden * decoder.key_value_width + own.query + own.key


def look_ahead(
    decoder: Decoder,
    glimpse_layer: int,
    prune_layer: int,
    text: int,
    visual: int,
    additions: Additions = NO_ADDITIONS,
) -> int:
    """Text and one glimpse token from layer P's MLP to the query of layer K."""
    runners, own = text + 1, additions.of_a_layer(decoder)
    keys = 2 * decoder.hidden * decoder.key_value_width
    stale = 2 * additions.stale * (decoder.hidden + decoder.key_value_width)
    layers_between = glimpse_layer - prune_layer - 1
    cost = decoder.mlp(runners) + own.mlp
    between = decoder.attention(runners, visual + runners) + decoder.mlp(runners) + own.whole
    cost += layers_between * (between + decoder.keys_and_values(visual) + 2 * visual * stale)
    return cost + (visual + runners) * keys + visual * stale + own.query + own.key


def pruned_after_layer(
    decoder: Decoder, predictor: Predictor, glimpse_layer: int, text: int, visual: int, kept: int
) -> int:
    """The official way: layer K runs to its end over all tokens, values are not padded."""
    full, short = text + visual + 1, text + kept
    cost = pruned_prefill(decoder, predictor, glimpse_layer, text, visual, kept)
    cost += decoder.mlp(full) - decoder.mlp(short)
    return cost - predictor.cost(visual) + predictor.cost(visual, padded=False)


QWEN2_5_VL_7B = Decoder(28, 3584, 18944, 28, 4)
QWEN3_VL_8B = Decoder(36, 4096, 12288, 32, 8, 128)
PREDICTOR_QWEN3_VL_8B = Predictor(4, 256, 512, 1152, 32)
OFFICIAL_PREDICTOR_7B = Predictor(4, 256, 512, 1280, 28)
QWEN2_5_VL_VISION = VisionEncoder(32, 4, 1280, 3420, 64, 2, 1176, 3584)


@dataclass(frozen=True)
class PrefillLaw:
    """The prefill of one model, from its configuration."""

    decoder: Decoder
    predictor: Predictor
    glimpse_layer: int
    additions: Additions = NO_ADDITIONS
    encoder: VisionEncoder | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "PrefillLaw":
        """Of a GlimpsePrune configuration."""
        text = config.get_text_config()
        decoder = Decoder(
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            getattr(text, "head_dim", None),
        )
        predictor = Predictor(
            len(config.vision_layers),
            config.predictor_hidden_size,
            config.predictor_condition_size,
            config.vision_config.hidden_size,
            text.num_attention_heads * len(config.attention_layers),
        )
        additions = Additions(config.glimpse_lora_rank, config.stale_rank)
        encoder = VisionEncoder.of(config)
        return cls(decoder, predictor, config.glimpse_layer, additions, encoder)

    def pruned(
        self, prune_layer: int | None, text: int, visual: int, kept: int, encoded: int | None = None
    ) -> int:
        """Operations of a pruned prefill; arguments as for `pruned_prefill`, and:

        Args:
            encoded: of the visual tokens, those that were encoded; None for all. The decoder sees
                no others; the predictor's conditions are made of all.
        """
        encoded = visual if encoded is None else encoded
        shape = (self.glimpse_layer, text, encoded, kept, prune_layer, self.additions)
        conditions = self.predictor.conditions(visual - encoded)
        return pruned_prefill(self.decoder, self.predictor, *shape) + conditions

    def share(
        self, prune_layer: int | None, text: int, visual: int, kept: int, encoded: int | None = None
    ) -> float:
        """The same over the stock model's."""
        pruned = self.pruned(prune_layer, text, visual, kept, encoded)
        return pruned / stock_prefill(self.decoder, text + visual)

    def share_with_encoder(
        self, prune_layer: int | None, text: int, visual: int, kept: int, encoded: int | None = None
    ) -> float | None:
        """The same with the vision encoder's operations on both sides; None where not known."""
        if self.encoder is None:
            return None
        stock = stock_prefill(self.decoder, text + visual) + self.encoder.cost(visual)
        pruned = self.pruned(prune_layer, text, visual, kept, encoded)
        return (pruned + self.encoder.cost(visual if encoded is None else encoded)) / stock
