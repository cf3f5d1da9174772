"""Tokens on their way through a decoder, and how their caller sees them."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from .held_prompt import HeldPrompt
from .layer_outputs import spread
from .visual_tokens import VisualTokens

# What a soft mask adds to scores. Both are finite in every dtype, so that a row that sees nothing
# else is no division by zero, and the lower one stays far below the other.
DROPPED, UNSEEN = -1e4, -3e4


@dataclass
class TokenBlock:
    """Tokens on their way through the layers: the prompt, or what stands before or after it.

    Attributes:
        hidden_states: `(batch, tokens, hidden)`.
        position_ids: `(..., batch, tokens)`, the family's rotary positions.
        mask: `(batch, past slots + tokens)` bool, True at real tokens, or None for all.
        length: tokens as the caller sees them, pruned ones counted, glimpse tokens not.
        past_slots: physical length of the cache before these tokens.
        past_dropped: tokens dropped from the cache before these tokens.
        past_columns: `(batch or 1, past slots)` where the caller sees the slots of the cache.
        prompt_start: slot of the prompt's first token.
        prompt_length: tokens of the prompt.
        glimpse_slice: where the glimpse tokens stand in `hidden_states`.
        next_position: `(batch,)`, the position at which the answer (and the glimpse) starts.
        order: `(batch, slots)` place among the `length` tokens of each slot, glimpse tokens left
            out; None while every token is there.
        fixed_slots: slots up to the last visual token, once the prompt is compact.
        log_keep: `(batch, past slots + tokens)`, what a soft mask adds to the scores of each key.
        held: what waits in front of the block's own tokens, once they are joined; `hidden_states`
            hold the own ones alone until the prompt is compact.
        additions: by decoder layer what is still to be added to `hidden_states` before it runs,
            laid out as they are.
        unseen: tokens at the beginning that the caller does not see, those of a prefix.
    """

    hidden_states: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor | None
    length: int
    past_slots: int
    past_dropped: int
    past_columns: torch.Tensor
    prompt_start: int
    prompt_length: int
    glimpse_slice: slice
    next_position: torch.Tensor
    order: torch.Tensor | None = None
    fixed_slots: int = 0
    log_keep: torch.Tensor | None = None
    held: HeldPrompt | None = None
    unseen: int = 0
    additions: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def has_glimpse(self) -> bool:
        """Whether glimpse tokens are among them."""
        return self.glimpse_slice.start < self.glimpse_slice.stop

    @property
    def valid(self) -> torch.Tensor:
        """`(batch, tokens)` bool, True at the block's real tokens."""
        if self.mask is None:
            return self.hidden_states.new_ones(self.position_ids.shape[-2:], dtype=torch.bool)
        return self.mask[:, self.past_slots :]

    def insert_glimpse(self, vectors: torch.Tensor, place: int) -> None:
        """Put glimpse tokens in front of the block's token `place`, or behind its last one.

        Args:
            vectors: `(glimpse tokens, hidden)`.
        """
        batch, count = len(self.hidden_states), len(vectors)
        rows = vectors.expand(batch, -1, -1)
        self.hidden_states = _insert(self.hidden_states, rows, place, dim=1)
        self.additions = {
            layer: _insert(added, torch.zeros_like(rows), place, dim=1)
            for layer, added in self.additions.items()
        }
        positions = self.following_positions(count)
        self.position_ids = _insert(self.position_ids, positions, place, dim=-1)
        if self.mask is not None:
            ones = self.mask.new_ones(batch, count)
            self.mask = _insert(self.mask, ones, self.past_slots + place, dim=1)
        self.glimpse_slice = slice(place, place + count)

    def add(self, layer: int) -> None:
        """Add to the hidden states, once, what is added before a decoder layer."""
        added = self.additions.pop(layer, None)
        if added is not None:
            self.hidden_states = self.hidden_states + added.to(self.hidden_states.device)

    def following_positions(self, count: int) -> torch.Tensor:
        """`(..., batch, count)` rotary positions behind the prompt, the same on every axis."""
        steps = torch.arange(count, device=self.position_ids.device)
        positions = self.next_position[:, None] + steps
        return positions.expand(*self.position_ids.shape[:-1], -1)

    def join(self, held: HeldPrompt) -> None:
        """Put what a prefix holds in front of these tokens: from here on they are one prompt."""
        self.held, self.unseen = held, held.logical_length
        self.past_slots = self.prompt_start
        self.past_dropped -= held.dropped
        self.past_columns = self.past_columns[:, : self.past_slots]
        self.order = held.with_order(self.order, len(self.hidden_states), self.prompt_length)
        self.position_ids = held.with_positions(self.position_ids)
        self.length += held.logical_length
        places = (self.glimpse_slice.start, self.glimpse_slice.stop)
        self.glimpse_slice = slice(*(place + held.length for place in places))

    def states_at(self, columns: torch.Tensor) -> torch.Tensor:
        """Hidden states `(batch, tokens, hidden)` at some columns `(batch, tokens)`."""
        if self.held is not None:
            return self.held.states_at(columns, self.hidden_states)
        return _at(columns, self.hidden_states)

    def _additions_at(self, columns: torch.Tensor) -> dict[int, torch.Tensor]:
        if self.held is not None:
            return self.held.additions_at(columns, self.hidden_states, self.additions)
        return {layer: _at(columns, added) for layer, added in self.additions.items()}

    def take(self, order: torch.Tensor, real: torch.Tensor | None) -> None:
        """Keep some of the block's tokens.

        Args:
            order: `(batch, slots)` token of each slot.
            real: `(batch, slots)` bool, False at slots that only pad, or None when none does.
        """
        positions = self.position_ids
        self.additions = self._additions_at(order)
        self.hidden_states, self.held = self.states_at(order), None
        self.position_ids = positions.take_along_dim(
            order.expand(*positions.shape[:-1], -1), dim=-1
        )
        self.order = order if self.order is None else self.order.gather(1, order)
        self.glimpse_slice = slice(order.shape[1], order.shape[1])
        if real is None:
            self.mask = None
            return
        past_mask = real.new_ones(len(order), self.past_slots)
        if self.mask is not None:
            past_mask = self.mask[:, : self.past_slots]
        self.mask = torch.cat([past_mask, real], dim=1)

    def shown(self) -> torch.Tensor:
        """The hidden states as the caller sees them, from which the next layer goes on.

        So gradients reach what the caller was given.
        """
        seen = self.as_seen(self.hidden_states)
        if seen is self.hidden_states or self.unseen:
            return seen
        states, rows = seen, self.hidden_states[:, self.glimpse_slice]
        if self.order is not None:
            states = seen.take_along_dim(self.order.to(seen.device)[..., None], dim=1)
        self.hidden_states = _insert(states, rows, self.glimpse_slice.start, dim=1)
        return seen

    def as_seen(self, states: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Lay tensors of the block's tokens, `(batch, ...)`, out as the caller sees the tokens.

        Glimpse tokens go, and dropped tokens are zeros.
        """
        seen = self._laid_out(states, dim)
        return seen.narrow(dim, self.unseen, seen.shape[dim] - self.unseen) if self.unseen else seen

    def _laid_out(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        if self.has_glimpse:
            states = self._without_glimpse(states, dim)
        if self.order is None:
            return states
        shape = [1] * states.ndim
        shape[0], shape[dim] = self.order.shape
        real = self._without_glimpse(self.valid, 1).to(states.device).view(shape)
        return spread(states * real, self.order, self.length, dim)

    def _without_glimpse(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        bounds = [self.glimpse_slice.start, self.glimpse_slice.stop]
        before, _, after = states.tensor_split(bounds, dim=dim)
        return torch.cat([before, after], dim=dim)

    def weights_as_seen(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        """Attention weights `(batch, heads, tokens, slots)` laid out on both sides.

        Where the caller sees the block as it is, gradients reach them.
        """
        if weights is None:
            return None
        if self.order is None and not self.has_glimpse and not self.past_slots:
            return weights
        past, own = weights.tensor_split([self.past_slots], dim=3)
        length = self.past_slots + self.past_dropped
        past = spread(past, self.past_columns.expand(len(past), -1), length, dim=3)
        return self.as_seen(torch.cat([past, self._laid_out(own, dim=3)], dim=3), dim=2)

    def soften(self, visual_log_keep: torch.Tensor, tokens: VisualTokens) -> None:
        """Weigh the keys of a prompt of which every token stayed, from here on.

        Args:
            visual_log_keep: `(N,)` log-probability to be kept of each visual token.
            tokens: where they stand.
        """
        states = self.hidden_states
        given = visual_log_keep.to(tokens.rows.device).clamp(min=DROPPED)
        of_prompt = given.new_zeros(len(states), self.length)
        of_prompt = of_prompt.index_put((tokens.rows, tokens.columns), given)
        of_slots = of_prompt.gather(1, self.order)
        self.log_keep = pad(of_slots, (self.past_slots, 0)).to(states.device)

    def soft_mask(self) -> torch.Tensor:
        """`(batch, 1, tokens, slots)` float: `log_keep` of the keys that a token may see."""
        batch, slots = self.log_keep.shape
        place = torch.arange(slots, device=self.log_keep.device)
        seen = place <= place[self.past_slots :, None]  # (tokens, slots)
        if self.mask is not None:
            seen = seen & self.mask[:, None].to(seen.device)
        seen = seen.expand(batch, -1, -1)
        return torch.where(seen, self.log_keep[:, None], UNSEEN)[:, None]


def _at(columns: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return states.take_along_dim(columns.to(states.device)[..., None], dim=1)


def _insert(tensor: torch.Tensor, part: torch.Tensor, position: int, dim: int) -> torch.Tensor:
    before, after = tensor.tensor_split([position], dim=dim)
    return torch.cat([before, part, after], dim=dim)
