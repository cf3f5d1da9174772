"""A slow and obvious reference of the look-ahead, beside `reference.py`.

One conversation at a time, every token in its place from the first layer to the last, and every
layer written out here. What makes the look-ahead is two lines of `attention_ahead`: above the prune
layer P the tokens called `frozen` never move again, so a layer makes their keys and values of
states that are stale; all others move as ever. The glimpse token stands behind the prompt, and
which key (column) a query (row) may see is said by one bool matrix a layer.

L counts the tokens of a conversation and the glimpse tokens g behind it; n its visual tokens.
"""

import math
from typing import NamedTuple

import torch
from reference import (
    added_between_layers,
    allowed_attention,
    dropped_positions,
    embeddings_of,
    glimpse_vectors,
    positions,
    predict_slowly,
    rms_norm,
    visual_positions,
    weights_of,
)

ROTARY_BASE = 10_000.0
Matrices = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


class Corrections(NamedTuple):
    """Low-rank additions `B @ A @ x` to linear maps of decoder layers, by layer and map.

    Each is `(A, B)` of shapes `(rank, in)` and `(out, rank)`.

    Args:
        glimpse: of the glimpse tokens' own rows, in layers 0..K; maps are `q_proj`, `k_proj`,
            `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj`.
        stale: of the frozen tokens' keys and values, in layers P+1..K; maps are `k_proj`, `v_proj`.
    """

    glimpse: Matrices
    stale: Matrices


NO_CORRECTIONS = Corrections({}, {})


class Earlier(NamedTuple):
    """Turns before the one that is glimpsed at, as a kept cache holds them.

    Args:
        prompt: the first turn's inputs.
        keep_mask: of its visual tokens.
        prune_layer: the layer at which they were dropped.
    """

    prompt: dict
    keep_mask: torch.Tensor
    prune_layer: int


class Sequence(NamedTuple):
    """Tokens on their way through the decoder.

    Args:
        states: `(L, hidden)`, inputs of layer 0; the glimpse tokens' are zeros.
        position_ids: `(axes, L)`, three axes or one.
        frozen: `(L,)` bool, True at tokens that do not move above the prune layer.
        is_glimpse: `(L,)` bool.
        seen: for each layer `(L, L)` bool, True where a query (row) may see a key (column).
        added: `(L, hidden)` for each of the first layers, what tokens that move gain behind it.
    """

    states: torch.Tensor
    position_ids: torch.Tensor
    frozen: torch.Tensor
    is_glimpse: torch.Tensor
    seen: list[torch.Tensor]
    added: list[torch.Tensor]


def score_ahead(
    stock,
    glimpse,
    config,
    prompt: dict,
    prune_layer: int,
    corrections: Corrections = NO_CORRECTIONS,
    earlier: Earlier | None = None,
    turn: dict | None = None,
) -> torch.Tensor:
    """Importance logits `(n,)` of the visual tokens of a prompt, or of a later turn.

    Args:
        stock: the model that is glimpsed with.
        glimpse: the module that holds the glimpse weights, but for the corrections.
        config: of the pruned model.
        prompt: the whole conversation, with images or videos, not both.
        prune_layer: P, at most the configuration's glimpse layer.
        earlier: what came before the turn that is glimpsed at, if anything.
        turn: that turn's inputs alone, where something came before.
    """
    weights = weights_of(glimpse)
    sequence = start_sequence(stock, config, prompt, earlier)
    attention = attention_ahead(stock, weights, config, sequence, prune_layer, corrections)
    of_visual = attention[:, sequence.frozen].T  # (n, attention_layers * heads)
    return predict_slowly(stock, weights, config, prompt if turn is None else turn, of_visual)


def start_sequence(stock, config, prompt: dict, earlier: Earlier | None = None) -> Sequence:
    """The conversation with room for the glimpse tokens behind it; its last turn's visuals freeze.

    Visual tokens of earlier turns are text to this one: those that were kept stand in the cache.
    """
    words, behind = embeddings_of(stock, prompt)[0], added_between_layers(stock, prompt)
    count = config.num_glimpse_tokens
    states = torch.cat([words, words.new_zeros(count, words.shape[-1])])
    length, place = len(states), torch.arange(len(states))
    frozen = torch.zeros(length, dtype=torch.bool)
    frozen[visual_positions(stock, prompt)] = True
    dropped, first_length, dropped_at = torch.zeros_like(frozen), length, 0
    if earlier is not None:
        first_length, dropped_at = earlier.prompt["input_ids"].shape[1], earlier.prune_layer
        dropped[:first_length] = dropped_positions(stock, earlier.prompt, earlier.keep_mask)
        frozen &= place >= first_length
    seen = [
        allowed_attention(dropped, first_length, prunes=layer > dropped_at)
        for layer in range(config.glimpse_layer + 1)
    ]
    position_ids = positions(stock, prompt, length).reshape(-1, length)
    added = [torch.cat([each, each.new_zeros(count, each.shape[-1])]) for each in behind]
    return Sequence(states, position_ids, frozen, place >= length - count, seen, added)


def attention_ahead(
    stock,
    weights: dict,
    config,
    sequence: Sequence,
    prune_layer: int,
    corrections: Corrections = NO_CORRECTIONS,
) -> torch.Tensor:
    """How the last token looks at every token: `(attention_layers * heads, L)`.

    Scaled products, or the logarithm of their softmax over what it may see.
    """
    eps = config.get_text_config().rms_norm_eps
    states, looks = sequence.states.clone(), {}
    moves = ~sequence.frozen
    for index in range(config.glimpse_layer + 1):
        if sequence.is_glimpse.any():
            vectors = glimpse_vectors(weights, config, index, eps)
            if vectors is not None:
                states[sequence.is_glimpse] += vectors
        layer = _Layer(stock, sequence, index, index > prune_layer, corrections)
        attended, looks[index] = layer.attend(states)
        everybody = torch.ones_like(moves)
        movers = moves if index > prune_layer else everybody
        states = torch.where(movers[:, None], states + attended, states)
        movers = moves if index >= prune_layer else everybody
        states = torch.where(movers[:, None], states + layer.mlp(states), states)
        if index < len(sequence.added):
            states = torch.where(movers[:, None], states + sequence.added[index], states)
    columns = torch.cat([looks[index] for index in config.attention_layers])
    if config.attention_scores == "log_probabilities":
        columns = columns.log_softmax(-1)
    return columns


class _Layer:
    """One decoder layer, written out.

    Args:
        stock: the model whose weights it has.
        sequence: the tokens.
        index: which layer.
        is_stale: whether the frozen tokens' states are stale here.
        corrections: of all layers.
    """

    def __init__(self, stock, sequence: Sequence, index: int, is_stale: bool, corrections):
        self.config = stock.config.get_text_config()
        self.weights = stock.model.language_model.layers[index]
        self.sequence, self.index = sequence, index
        self.is_stale, self.corrections = is_stale, corrections

    def attend(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention adds to each token, `(L, hidden)`, and the last token's scores.

        The latter are `(heads, L)`, -inf where it may not see.
        """
        heads, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        size = self.weights.self_attn.head_dim
        attention, normed = self.weights.self_attn, self._norm("input_layernorm", states)
        query, key, value = (
            self._map(attention, name, normed).view(len(states), -1, size).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )  # each (heads or key-value heads, L, size)
        if self.config.model_type == "qwen3_vl_text":
            eps = self.config.rms_norm_eps
            query = rms_norm(query, attention.q_norm.weight, eps)
            key = rms_norm(key, attention.k_norm.weight, eps)
        query, key = self._rotate(query), self._rotate(key)
        key, value = (each.repeat_interleave(heads // shared, dim=0) for each in (key, value))
        scores = query @ key.transpose(1, 2) / math.sqrt(size)
        scores = scores.masked_fill(~self.sequence.seen[self.index], float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(states), -1)
        return self._map(attention, "o_proj", mixed), scores[:, -1]

    def mlp(self, states: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to each token, `(L, hidden)`."""
        normed = self._norm("post_attention_layernorm", states)
        gate = self._map(self.weights.mlp, "gate_proj", normed)
        up = self._map(self.weights.mlp, "up_proj", normed)
        return self._map(self.weights.mlp, "down_proj", gate * gate.sigmoid() * up)

    def _norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return rms_norm(states, getattr(self.weights, name).weight, self.config.rms_norm_eps)

    def _map(self, part, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A linear map of all tokens, corrected at the rows that have a correction."""
        outputs = getattr(part, name)(inputs)
        corrected = [(self.corrections.glimpse, self.sequence.is_glimpse)]
        if self.is_stale:
            corrected.append((self.corrections.stale, self.sequence.frozen))
        for matrices, rows in corrected:
            if (self.index, name) in matrices:
                down, up = matrices[self.index, name]
                outputs = torch.where(rows[:, None], outputs + inputs @ down.T @ up.T, outputs)
        return outputs

    def _rotate(self, vectors: torch.Tensor) -> torch.Tensor:
        """Turn the pairs `(i, i + size / 2)` of `(heads, L, size)` by the tokens' positions."""
        half = vectors.shape[-1] // 2
        pair = torch.arange(half, dtype=torch.float64)
        of_pair = self.sequence.position_ids[self._axes(half)].T  # (L, half)
        angles = of_pair * ROTARY_BASE ** (-pair / half)
        cosine, sine = angles.cos().to(vectors), angles.sin().to(vectors)
        first, second = vectors[..., :half], vectors[..., half:]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    def _axes(self, half: int) -> list[int]:
        """Which axis of the positions turns each pair."""
        if len(self.sequence.position_ids) == 1:
            return [0] * half
        sections = self.config.rope_scaling["mrope_section"]
        if self.config.model_type == "qwen3_vl_text":  # in turns, as long as a section lasts
            return [i % 3 if i // 3 < sections[i % 3] else 0 for i in range(half)]
        return [axis for axis, pairs in enumerate(sections) for _ in range(pairs)]
