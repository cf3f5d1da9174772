"""What a prefix holds of a prompt's beginning beside keys and values: states that wait."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from .visual_tokens import VisualTokens


@dataclass
class HeldPrompt:
    """The beginning of some prompts after layer P's attention, nothing dropped.

    Rows are never repeated: `rows` says which of those held a row of the batch begins with.

    Attributes:
        states: `(held rows, length, hidden)` after layer P's attention, before its MLP.
        position_ids: `(..., held rows, length)` the family's rotary positions.
        rows: `(batch,)` on the host, the held row of each row of the batch.
        tokens: the held rows' visual tokens, with the predictor's conditions as their features.
        item_rows: row of each item of `tokens`, on the host.
        prune_layer: P, the last layer that ran.
        order: `(held rows, length)` place of each among the tokens as the caller sees them, or None
            where none was left out in front of the encoder.
        dropped: how many were left out.
        additions: by decoder layer above P what is added to `states` before it runs, as they are.
        in_place: whether the layers above P ran as well, of which the prefix holds keys and values.
    """

    states: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    tokens: VisualTokens
    item_rows: list[int]
    prune_layer: int
    order: torch.Tensor | None = None
    dropped: int = 0
    additions: dict[int, torch.Tensor] = field(default_factory=dict)
    in_place: bool = False

    @property
    def length(self) -> int:
        return self.states.shape[1]

    @property
    def logical_length(self) -> int:
        """Tokens as the caller sees them."""
        return self.length + self.dropped

    def select_rows(self, rows: torch.Tensor) -> "HeldPrompt":
        """Begin the rows of another batch with these; `rows` `(batch,)` are rows of this one."""
        return replace(self, rows=self.rows[rows])

    def states_at(self, columns: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden)` of some tokens of the prompts that these states begin.

        Args:
            columns: `(batch, tokens)` in the prompts.
            own: `(batch, own tokens, hidden)` of the tokens behind the held ones.
        """
        return self._at(columns, self.states, own)

    def additions_at(
        self, columns: torch.Tensor, own: torch.Tensor, added: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """As `states_at`, of what is added to them before layers.

        Args:
            added: by layer to the own tokens.
        """
        pairs = self._additions_beside(own, added)
        return {layer: self._at(columns, *both) for layer, *both in pairs}

    def _at(self, columns: torch.Tensor, held: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        columns = columns.to(held.device)
        rows = self.rows.to(columns.device)[:, None]
        held = held[rows, columns.clamp(max=self.length - 1)].to(own.device)
        columns = columns.to(own.device)[..., None]
        behind = own.take_along_dim((columns - self.length).clamp(min=0), dim=1)
        return torch.where(columns < self.length, held, behind)

    def _additions_beside(
        self, own: torch.Tensor, added: dict[int, torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Layers, and what is added to held and own states before them, zeros if nothing."""
        for layer in sorted(self.additions.keys() | added.keys()):
            held = self.additions.get(layer)
            behind = added.get(layer)
            yield (
                layer,
                torch.zeros_like(self.states) if held is None else held,
                torch.zeros_like(own) if behind is None else behind,
            )

    def with_positions(self, own: torch.Tensor) -> torch.Tensor:
        """Rotary positions `(..., batch, length + own tokens)`, from those of the own tokens."""
        held = self.position_ids.index_select(-2, self.rows.to(self.position_ids.device))
        return torch.cat([held.to(own.device), own], dim=-1)

    def with_order(self, own: torch.Tensor | None, batch: int, end: int) -> torch.Tensor | None:
        """Places `(batch, length + own tokens)` as `order` has them, or None where all are there.

        Args:
            own: those of the own tokens, or None.
            end: tokens of the whole prompts, those that were left out not counted.
        """
        if own is None and self.order is None:
            return None
        device = self.position_ids.device
        if own is None:
            own = torch.arange(end - self.length, device=device).expand(batch, -1)
        held = torch.arange(self.length, device=device).expand(batch, -1)
        if self.order is not None:
            held = self.order.index_select(0, self.rows.to(device))
        return torch.cat([held.to(own.device), self.logical_length + own], dim=1)

    def with_states(self, own: torch.Tensor) -> torch.Tensor:
        """`(batch, length + own tokens, hidden)`, from `(batch, own tokens, hidden)`."""
        return self._in_front(self.states, own)

    def with_additions(
        self, own: torch.Tensor, added: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """As `with_states`, of what is added to them before layers; see `additions_at`."""
        pairs = self._additions_beside(own, added)
        return {layer: self._in_front(*both) for layer, *both in pairs}

    def _in_front(self, held: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        held = held.index_select(0, self.rows.to(held.device))
        return torch.cat([held.to(own.device), own], dim=1)

    def all_tokens(self, own: VisualTokens | None) -> VisualTokens:
        """The visual tokens of the batch's prompts, row after row.

        Args:
            own: those behind the held ones, with columns of the own tokens, and the predictor's
                conditions as their features.
        """
        held = self.tokens.select_rows(self.rows.tolist(), self.item_rows)
        if own is None:
            return held
        own = replace(own, columns=own.columns + self.logical_length)
        return held.followed_by(own, sort=len(self.rows) > 1)


def prune_layer_over(held: HeldPrompt, asked: int | None) -> int:
    """P of a question over a held prompt, which has run so far and no further.

    Raises:
        ValueError: when the call asks for another.
    """
    if asked not in (None, held.prune_layer):
        raise ValueError(
            f"this prefix was made for prune_layer {held.prune_layer}, not {asked}: look again "
            f"with prune_layer={asked}"
        )
    return held.prune_layer
