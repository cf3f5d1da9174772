"""Tokens that run through decoder layers beside the cache: they read it and never enter it.

Glimpse tokens do, where they have weights of their own or are read ahead; in a look-ahead the
prompt's text does, too. Their attention is computed here, with the layers' own linear maps, as
which tokens they see fits no mask of the attention implementations.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .decoder_layers import Rotary, device_of, run_mlp, scaled_products, split_heads, turn
from .glimpse import Glimpse
from .stock import plain_rotary
from .token_block import TokenBlock


class Runners:
    """A few tokens a row, the glimpse tokens last.

    Attributes:
        states: `(batch, tokens, hidden)`.
        rotary: cosine and sine `(batch, tokens, head_dim)`.
        seen: `(batch, 1, tokens, held + tokens)` bool, True where a token may look: at what the
            layer holds, then at the runners themselves.
        glimpse: the glimpse weights.
        num_glimpse: how many of the tokens are glimpse tokens.
    """

    def __init__(
        self,
        states: torch.Tensor,
        rotary: Rotary,
        seen: torch.Tensor,
        glimpse: Glimpse,
        num_glimpse: int,
    ):
        self.states, self.rotary, self.seen = states, rotary, seen
        self.glimpse, self.num_glimpse = glimpse, num_glimpse

    @classmethod
    def of_glimpse(cls, decoder: PreTrainedModel, block: TokenBlock, glimpse: Glimpse) -> "Runners":
        """The glimpse tokens behind a prompt, at the entrance of layer 0."""
        vectors = glimpse.token(0).to(block.hidden_states)
        batch, count = len(block.hidden_states), len(vectors)
        states = vectors.expand(batch, -1, -1)
        rotary = decoder.rotary_emb(states, block.following_positions(count))
        slots = block.prompt_start + block.prompt_length
        held = states.new_ones(batch, slots, dtype=torch.bool)
        if block.mask is not None:
            held = block.mask[:, :slots]
        own = held.new_ones(count, count).tril()
        seen = torch.cat([held[:, None].expand(-1, count, -1), own.expand(batch, -1, -1)], dim=2)
        rotary = plain_rotary(decoder.config, rotary)
        return cls(states, rotary, seen[:, None], glimpse, count)

    def add_vectors(self, index: int) -> None:
        """Add the glimpse vectors of a layer above the first."""
        if not index or not self.num_glimpse:
            return
        vectors = self.glimpse.token(index)
        if vectors is not None:
            text, glimpse = self._parts(self.states)
            self.states = torch.cat([text, glimpse + vectors.to(glimpse)], dim=1)

    def attend(
        self, layer: nn.Module, index: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """The first half of a layer: attention and its residual.

        Args:
            layer: the decoder layer.
            index: its number.
            keys, values: `(batch, key_value_heads, held, head_dim)`.
        """
        normed = self._normed(layer)
        query, key, value = (
            split_heads(layer, name, self._map(layer.self_attn, index, name, normed))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        keys = torch.cat([keys.to(key), turn(key, self.rotary)], dim=2)
        values = torch.cat([values.to(value), value], dim=2)
        groups = query.shape[1] // keys.shape[1]
        attended = F.scaled_dot_product_attention(
            turn(query, self.rotary),
            keys.repeat_interleave(groups, dim=1),
            values.repeat_interleave(groups, dim=1),
            attn_mask=self.seen.to(query.device),
            scale=layer.self_attn.scaling,
        )
        attended = attended.transpose(1, 2).flatten(2)
        output = self._map(layer.self_attn, index, "o_proj", attended)
        self.states = self.states.to(output.device) + output

    def look(
        self,
        layer: nn.Module,
        index: int,
        keys: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """How the last token looks at some of the keys of a layer, read before it is run.

        Args:
            layer, index, keys: as for `attend`.
            rows, slots: `(N,)` which of the held keys.

        Returns:
            `(N, heads)`, as the predictor takes it.
        """
        normed = self._normed(layer)
        query, key = (
            split_heads(layer, name, self._map(layer.self_attn, index, name, states))
            for name, states in (("q_proj", normed[:, -1:]), ("k_proj", normed))
        )
        keys = torch.cat([keys.to(key), turn(key, self.rotary)], dim=2)
        last = tuple(part[:, -1:] for part in self.rotary)
        logits = scaled_products(layer, turn(query, last), keys).to(rows.device)
        seen = self.seen[:, 0, -1].to(rows.device)
        return self.glimpse.read_attention(logits, seen)[rows, :, slots]

    def run_mlp(self, layer: nn.Module, index: int) -> None:
        """The second half of a layer: MLP and its residual."""
        if self.glimpse.token_additions is None:
            self.states = run_mlp(layer, self.states)
            return
        text, glimpse = self._parts(self.states)
        normed = layer.post_attention_layernorm(glimpse)
        gate, up = (self._map(layer.mlp, index, name, normed) for name in ("gate_proj", "up_proj"))
        inner = layer.mlp.act_fn(gate) * up
        glimpse = glimpse + self._map(layer.mlp, index, "down_proj", inner)
        self.states = torch.cat([run_mlp(layer, text), glimpse], dim=1)

    def _parts(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and glimpse tokens of `(batch, tokens, *)`."""
        return states.tensor_split([states.shape[1] - self.num_glimpse], dim=1)

    def _normed(self, layer: nn.Module) -> torch.Tensor:
        self.states = self.states.to(device_of(layer.input_layernorm, self.states))
        return layer.input_layernorm(self.states)

    def _map(self, module: nn.Module, index: int, name: str, states: torch.Tensor) -> torch.Tensor:
        """A linear map of the layer, with the glimpse tokens' own additions on their rows.

        Args:
            states: `(batch, tokens, *)`, the last ones glimpse tokens.
        """
        output = getattr(module, name)(states)
        if self.glimpse.token_additions is None or not self.num_glimpse:
            return output
        count = min(self.num_glimpse, states.shape[1])
        added = self.glimpse.token_additions[str(index)][name](states[:, -count:])
        return torch.cat([output[:, :-count], output[:, -count:] + added], dim=1)
