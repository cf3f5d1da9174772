"""Counted operations of several questions about one image, by what is shared between them.

Counted as in `prefill_cost`; `tests/test_look_cost.py` holds `look` and a question over it to
torch's counter on small models.
"""

from dataclasses import dataclass

from .prefill_cost import (
    NO_ADDITIONS,
    Additions,
    Decoder,
    Predictor,
    glimpse_beside,
    look_ahead,
    pruned_prefill,
    stock_prefill,
)


def look(decoder: Decoder, predictor: Predictor, prefix: int, visual: int, prune_layer: int) -> int:
    """Layers 0..P up to layer P's attention over a prompt's beginning, and what scores need of it.

    Args:
        prefix: tokens of the beginning, `visual` of them visual.
    """
    layers = prune_layer * decoder.layer(prefix) + decoder.attention(prefix, prefix)
    return layers + predictor.conditions(visual)


def look_numbers(
    decoder: Decoder, predictor: Predictor, prefix: int, visual: int, prune_layer: int
) -> int:
    """Numbers that a look holds: keys and values of layers 0..P, states, the predictor's part."""
    keys_and_values = (prune_layer + 1) * 2 * prefix * decoder.key_value_width
    conditions = predictor.layers * visual * predictor.condition
    return keys_and_values + prefix * decoder.hidden + conditions


def stale_keys_and_values(
    decoder: Decoder, glimpse_layer: int, prune_layer: int, visual: int
) -> tuple[int, int]:
    """What a look-ahead makes of stale states, for each question anew: operations, and numbers.

    Keys of the layers above P up to K, and values of all of these but K.
    """
    maps = max(0, 2 * (glimpse_layer - prune_layer) - 1)
    numbers = maps * visual * decoder.key_value_width
    return 2 * numbers * decoder.hidden, numbers


def stock_question(decoder: Decoder, prefix: int, question: int) -> int:
    """A question's own tokens through the stock decoder, over a cache of the prompt's beginning."""
    one_layer = decoder.attention(question, prefix + question) + decoder.mlp(question)
    return decoder.layers * one_layer


def question_over_look(
    decoder: Decoder,
    predictor: Predictor,
    glimpse_layer: int,
    prefix: int,
    question: int,
    visual: int,
    kept: int,
    prune_layer: int | None = None,
    additions: Additions = NO_ADDITIONS,
) -> int:
    """A question and its glimpse over a look, scoring, and the kept tokens in the layers above P.

    Args:
        glimpse_layer: K, 0-based.
        prefix: tokens of the look, `visual` of them visual, of which `kept` stay.
        question: tokens behind it.
        prune_layer: P; None is K.
        additions: ranks of the glimpse's low-rank additions.
    """
    prune_layer = glimpse_layer if prune_layer is None else prune_layer
    prompt, text = prefix + question, prefix - visual + question
    short = text + kept
    beside = prune_layer < glimpse_layer or additions.glimpse > 0
    own = question if beside else question + 1
    attention = decoder.attention(own, prefix + own)
    cost = prune_layer * (attention + decoder.mlp(own)) + attention
    cost += decoder.mlp(short) + (decoder.layers - prune_layer - 1) * decoder.layer(short)
    cost += (glimpse_layer + 2) * 2 * decoder.hidden**2 + 2 * (prompt + 1) * decoder.hidden
    if beside:
        cost += glimpse_beside(decoder, glimpse_layer, prune_layer, prompt, additions)
    if prune_layer < glimpse_layer:
        cost += look_ahead(decoder, glimpse_layer, prune_layer, text, visual, additions)
    return cost + predictor.cost(visual) - predictor.conditions(visual)


@dataclass(frozen=True)
class ManyQuestions:
    """Prefills of n questions about one image, counted four ways.

    Attributes:
        decoder, predictor, glimpse_layer, prune_layer: of the model.
        prefix: tokens up to the image's end, `visual` of them visual, of which `kept` stay.
        question: tokens behind it.
        vision: operations of the vision encoder, 0 to leave it out.
        additions: ranks of the glimpse's low-rank additions.
    """

    decoder: Decoder
    predictor: Predictor
    glimpse_layer: int
    prune_layer: int
    prefix: int
    question: int
    visual: int
    kept: int
    vision: int = 0
    additions: Additions = NO_ADDITIONS

    @property
    def looking(self) -> int:
        """Before the first question is asked, over a look."""
        shape = (self.decoder, self.predictor, self.prefix, self.visual, self.prune_layer)
        return self.vision + look(*shape)

    @property
    def asking(self) -> int:
        """One question over a look."""
        return question_over_look(
            self.decoder,
            self.predictor,
            self.glimpse_layer,
            self.prefix,
            self.question,
            self.visual,
            self.kept,
            self.prune_layer,
            self.additions,
        )

    @property
    def caching(self) -> int:
        """Before the first question is asked, of the stock model with a plain prefix cache."""
        return self.vision + stock_prefill(self.decoder, self.prefix)

    @property
    def asking_stock(self) -> int:
        """One question over that cache."""
        return stock_question(self.decoder, self.prefix, self.question)

    def stock_fresh(self, questions: int) -> int:
        """The stock model, whole prompts."""
        return questions * (self.vision + stock_prefill(self.decoder, self._prompt))

    def stock_cached(self, questions: int) -> int:
        """The stock model with a plain prefix cache, the strongest rival."""
        return self.caching + questions * self.asking_stock

    def pruned_fresh(self, questions: int) -> int:
        """GlimpsePrune, whole prompts."""
        text = self._prompt - self.visual
        shape = (self.glimpse_layer, text, self.visual, self.kept, self.prune_layer, self.additions)
        return questions * (self.vision + pruned_prefill(self.decoder, self.predictor, *shape))

    def looked(self, questions: int) -> int:
        """GlimpsePrune over a look."""
        return self.looking + questions * self.asking

    @property
    def break_even(self) -> float | None:
        """Questions at which a look has cost as much as a prefix cache; None where it never does.

        From there on the stock model with a prefix cache is cheaper, in operations of prefills.
        """
        dearer = self.asking - self.asking_stock
        return (self.caching - self.looking) / dearer if dearer > 0 else None

    @property
    def _prompt(self) -> int:
        return self.prefix + self.question
