"""Low-rank additions to a decoder's linear maps, for glimpse tokens and stale states alone.

They start at zero, so a model that gains them answers as before until they are trained.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .decoder_layers import device_of

ATTENTION_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MAPS = ("gate_proj", "up_proj", "down_proj")
STALE_MAPS = ("k_proj", "v_proj")


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class LowRankAddition(nn.Module):
    """`up(down(x))`, to be added to what a linear map makes of x."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = ZeroLinear(rank, out_features, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, in the dtype that came."""
        inner = states.to(device_of(self.down, states), self.down.weight.dtype)
        return self.up(self.down(inner)).to(states)


def low_rank_additions(
    text_config, layers: Iterable[int], maps: tuple[str, ...], rank: int
) -> nn.ModuleDict:
    """Additions of some layers: `additions[str(layer)][map]`.

    Args:
        text_config: the decoder's configuration.
        layers: which decoder layers have additions.
        maps: names of the linear maps.
        rank: inner width of each addition.
    """
    sizes = _map_sizes(text_config)
    return nn.ModuleDict(
        {
            str(layer): nn.ModuleDict({name: LowRankAddition(*sizes[name], rank) for name in maps})
            for layer in layers
        }
    )


def _map_sizes(config) -> dict[str, tuple[int, int]]:
    """`(in, out)` of each linear map of a decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key),
        "v_proj": (hidden, key),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
