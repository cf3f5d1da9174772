"""The look-ahead: text and glimpse run on to layer K over visual tokens that stay at layer P.

Above the prune layer P a visual token stands still: each layer makes its keys and values of the
token's state after layer P's attention, rotated at its position. With grouped queries that costs a
hundredth of the layer. Nothing but the glimpse's attention leaves the look-ahead.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .decoder_layers import Rotary, device_of, split_heads, turn
from .decoder_run import DecoderRun
from .prune_request import PruneRequest
from .runners import Runners
from .stock import plain_rotary
from .token_block import TokenBlock
from .visual_tokens import VisualTokens


class LookAhead:
    """One prompt's look-ahead, from layer P's MLP on.

    Args:
        run: the decoder, and the cache that holds earlier turns in the layers above P.
        block: the prompt after layer P's attention.
        rotary: its rotary embeddings, as the decoder makes them.
        request: what to do with its visual tokens.
        beside: the glimpse tokens after layer P's attention, or None where there are none.

    Raises:
        ValueError: when nothing that runs could look, see `_check_looks`.

    Attributes:
        stale: `(batch, visual tokens, hidden)` states of the visual tokens.
        stale_rotary: cosine and sine `(batch, visual tokens, head_dim)` of their positions.
        slots: `(N,)` where each visual token's key stands among those that the runners see.
        runners: the prompt's text and the glimpse tokens.
    """

    def __init__(
        self,
        run: DecoderRun,
        block: TokenBlock,
        rotary: Rotary,
        request: PruneRequest,
        beside: Runners | None,
    ):
        self.decoder_run, self.request, self.past_slots = run, request, block.past_slots
        if beside is None:
            _check_looks(block, request)
        visual, text = _split(block, request.tokens)
        rotary = plain_rotary(run.decoder.config, rotary)
        self.stale = block.states_at(visual.columns)
        self.stale_rotary = tuple(visual.of(part) for part in rotary)
        self.slots = block.past_slots + visual.slots_of(request.tokens)
        states, text_rotary = block.states_at(text.columns), tuple(text.of(part) for part in rotary)
        count = 0 if beside is None else beside.num_glimpse
        if beside is not None:
            states = torch.cat([states, beside.states.to(states)], dim=1)
            both = zip(text_rotary, beside.rotary, strict=True)
            text_rotary = tuple(torch.cat([part, own.to(part)], dim=1) for part, own in both)
        seen = _seen(block, visual, text.followed_by(count, block.prompt_length))
        self.runners = Runners(states, text_rotary, seen, request.glimpse, count)
        self.runners.run_mlp(run.layers[request.prune_layer], request.prune_layer)

    def step(self, index: int) -> torch.Tensor | None:
        """Run a layer above P; of layer K, where the look-ahead ends, only the query.

        Returns:
            The glimpse's attention to each visual token, `(N, heads)`, or None where it is not
            read.
        """
        layer, runners, glimpse = self.decoder_run.layers[index], self.runners, self.request.glimpse
        runners.add_vectors(index)
        normed = layer.input_layernorm(self.stale.to(device_of(layer.input_layernorm, self.stale)))
        key = self._of_stale(layer, index, "k_proj", normed)
        keys = self._behind_past(index, turn(key, self.stale_rotary), "keys")
        read = None
        if index in glimpse.attention_layers:
            read = runners.look(layer, index, keys, self.request.tokens.rows, self.slots)
        if index < self.request.glimpse_layer:
            value = self._of_stale(layer, index, "v_proj", normed)
            runners.attend(layer, index, keys, self._behind_past(index, value, "values"))
            runners.run_mlp(layer, index)
        return read

    def _of_stale(
        self, layer: nn.Module, index: int, name: str, normed: torch.Tensor
    ) -> torch.Tensor:
        """Keys or values `(batch, heads, visual tokens, head_dim)` of the stale states."""
        projected = getattr(layer.self_attn, name)(normed)
        if self.request.glimpse.stale_additions is not None:
            projected = projected + self.request.glimpse.stale_additions[str(index)][name](normed)
        return split_heads(layer, name, projected)

    def _behind_past(self, index: int, own: torch.Tensor, name: str) -> torch.Tensor:
        """Put what an earlier turn left in the cache in front of keys or values."""
        if not self.past_slots:
            return own
        past = getattr(self.decoder_run.cache.layers[index], name)
        return torch.cat([past[:, :, : self.past_slots].to(own), own], dim=2)


@dataclass
class _Part:
    """Some of a prompt's tokens, each row's packed to the right.

    Attributes:
        columns: `(batch, tokens)` where they stand in the prompt.
        real: `(batch, tokens)` bool, False at slots that only pad.
    """

    columns: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of_flags(cls, flags: torch.Tensor, width: int) -> "_Part":
        """The flagged ones of `(batch, prompt)`, of which no row has more than `width`."""
        columns = flags.to(torch.uint8).argsort(dim=1, stable=True)[:, flags.shape[1] - width :]
        return cls(columns, flags.gather(1, columns))

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch or 1, prompt, *)` to `(batch, tokens, *)`."""
        states = states.expand(len(self.columns), -1, -1)
        return states.take_along_dim(self.columns.to(states.device)[..., None], dim=1)

    def slots_of(self, tokens: VisualTokens) -> torch.Tensor:
        """`(N,)` slot of each visual token in its row, where these are the visual tokens."""
        batch, width = self.columns.shape
        counts = tokens.rows.new_zeros(batch).index_add_(
            0, tokens.rows, torch.ones_like(tokens.rows)
        )
        first = width - counts  # of each row
        before = counts.cumsum(0) - counts
        return torch.arange(tokens.total, device=tokens.rows.device) + (first - before)[tokens.rows]

    def followed_by(self, count: int, column: int) -> "_Part":
        """These tokens, and `count` more in every row that begin at a column."""
        batch = len(self.columns)
        steps = torch.arange(column, column + count, device=self.columns.device)
        columns = torch.cat([self.columns, steps.expand(batch, -1)], dim=1)
        return _Part(columns, torch.cat([self.real, self.real.new_ones(batch, count)], dim=1))


def _check_looks(block: TokenBlock, request: PruneRequest) -> None:
    """Without a glimpse token the prompt's last token looks, so it must be one that runs.

    Raises:
        ValueError: when it is a visual token, which stands still.
    """
    if (request.tokens.columns == block.prompt_length - 1).any():
        raise ValueError(
            "a prompt ends in an image, whose last token would have to look as there is no glimpse "
            "token (num_glimpse_tokens 0), but stands still above prune_layer "
            f"{request.prune_layer}: put text behind the image, or give prune_layer as the "
            f"glimpse_layer {request.glimpse_layer}"
        )


def _split(block: TokenBlock, tokens: VisualTokens) -> tuple[_Part, _Part]:
    """A prompt's visual tokens and its text.

    How wide the parts are is known of a single prompt; a batch waits for the device.
    """
    real = block.valid[:, : block.prompt_length]
    visual = torch.zeros_like(real)
    visual[tokens.rows, tokens.columns] = True
    text = real & ~visual
    widths = tokens.total, block.prompt_length - tokens.total
    if len(real) > 1:
        widths = torch.stack([visual.sum(1).max(), text.sum(1).max()]).tolist()
    return _Part.of_flags(visual, widths[0]), _Part.of_flags(text, widths[1])


def _seen(block: TokenBlock, visual: _Part, runners: _Part) -> torch.Tensor:
    """`(batch, 1, runners, past + visual tokens + runners)` bool, True where a runner may look.

    A runner sees what stands before it in the prompt; one that only pads sees itself, as rows of a
    softmax must not be empty.
    """
    batch, count = runners.columns.shape
    past = block.valid.new_ones(batch, block.past_slots)
    if block.mask is not None:
        past = block.mask[:, : block.past_slots]
    columns = torch.cat([visual.columns, runners.columns], dim=1)
    real = torch.cat([visual.real, runners.real], dim=1)
    before = real[:, None] & (columns[:, None] <= runners.columns[:, :, None])
    itself = torch.eye(count, dtype=torch.bool, device=real.device)
    itself = torch.cat([itself.new_zeros(count, visual.columns.shape[1]), itself], dim=1)
    return torch.cat([past[:, None].expand(-1, count, -1), before | itself], dim=2)[:, None]
