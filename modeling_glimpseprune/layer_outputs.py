"""Hidden states and attentions of a pruned prefill, laid out as the caller sees the prompt."""

from collections.abc import Callable

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .stock import LAYER_OUTPUTS, select_hidden_states


class LayerOutputs:
    """Collects what layers return while blocks of tokens run through them, one block after another.

    Dropped tokens are zeros: their rows of the hidden states of layers above K, and their rows and
    columns of the attentions there. Attentions of layers up to K, which ran before anything was
    dropped, are whole.
    """

    def __init__(self, num_layers: int, hidden_states: bool, attentions: bool) -> None:
        self._states: list[list] | None = [[] for _ in range(num_layers)] if hidden_states else None
        self._unnormed: list[torch.Tensor] = []
        self._attentions: list[list] | None = (
            [[] for _ in range(num_layers)] if attentions else None
        )

    @property
    def wants_attentions(self) -> bool:
        return self._attentions is not None

    @property
    def wants_hidden_states(self) -> bool:
        return self._states is not None

    def add_states(self, layer: int, rows: torch.Tensor) -> None:
        """Take a block's input to a layer, `(batch, tokens, hidden)`."""
        self._states[layer].append(rows)

    def add_unnormed(self, rows: torch.Tensor) -> None:
        """Take a block's states behind the last layer, `(batch, tokens, hidden)`."""
        self._unnormed.append(rows)

    def add_attention(self, layer: int, weights: torch.Tensor | None) -> None:
        """Take a block's weights `(batch, heads, tokens, logical length)`, or None."""
        self._attentions[layer].append(weights)

    def hidden_states(
        self, last_hidden_state: torch.Tensor, asked: bool | int | list[int] = True
    ) -> tuple[torch.Tensor | None, ...] | None:
        """`(batch, length, hidden)` of the input of each layer and of the final norm.

        Args:
            asked: which of them, as callers ask stock models.
        """
        if self._states is None:
            return None
        inputs = map(_joined, self._states)
        return select_hidden_states((*inputs, last_hidden_state), asked)

    def move_unnormed(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lay what `add_unnormed` took out in another way."""
        self._unnormed = [move(_joined(self._unnormed))] if self._unnormed else []

    def told(self, outputs: BaseModelOutputWithPast) -> dict:
        """What classes above the text model are told of the layers: see `with_layers_shown`."""
        unnormed = _joined(self._unnormed) if self._unnormed else None
        return {name: outputs.get(name) for name in LAYER_OUTPUTS} | {"unnormed": unnormed}

    def attentions(self) -> tuple[torch.Tensor, ...] | None:
        """`(batch, heads, length, past and length)` of each layer that keeps them."""
        if self._attentions is None:
            return None
        stacked = (_stack(blocks) for blocks in self._attentions)
        return tuple(weights for weights in stacked if weights is not None)


def spread(values: torch.Tensor, positions: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Move slots to their logical positions, with zeros everywhere else.

    Args:
        values: `(batch, ...)` with the slots along `dim`.
        positions: `(batch or 1, slots)`, no position twice in a row.
        length: of the result along `dim`.
    """
    shape = [1] * values.ndim
    shape[0], shape[dim] = positions.shape
    target = list(values.shape)
    target[dim] = length
    index = positions.to(values.device).view(shape).expand_as(values)
    return values.new_zeros(target).scatter(dim, index, values)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _stack(blocks: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Rows of all blocks; what a block could not see yet has weight zero."""
    if any(block is None for block in blocks):
        return None
    if len(blocks) == 1:
        return blocks[0]
    columns = max(block.shape[-1] for block in blocks)
    padded = [torch.nn.functional.pad(block, (0, columns - block.shape[-1])) for block in blocks]
    return torch.cat(padded, dim=2)
