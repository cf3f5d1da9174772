"""Runs one decoder layer, whole or by halves, over a cache whose layers differ in length.

Layers follow Llama's names. No attention class is touched: whatever the attention implementation,
the layers compute it themselves.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .stock import given_cache

Rotary = tuple[torch.Tensor, torch.Tensor]
MLP_CHUNK = 2048  # tokens
HEAD_NORMS = {"q_proj": "q_norm", "k_proj": "k_norm"}  # of the attentions that have them


def run_layer(
    layer: nn.Module,
    states: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: Rotary,
    cache: Cache,
) -> torch.Tensor:
    """`(batch, length, hidden)` after a layer; its keys and values go to the cache."""

    def run(states: torch.Tensor, mask: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        output = layer(
            states,
            attention_mask=mask,
            use_cache=True,
            position_embeddings=rotary,
            **given_cache(cache),
        )
        return output[0] if isinstance(output, tuple) else output

    if _checkpoints(layer):
        return _run_checkpointed(run, layer, states, mask, cache)
    if _is_long(states):
        return run_mlp(layer, run_attention(layer, states, mask, rotary, cache))
    return run(states, mask, cache)


def run_attention(
    layer: nn.Module,
    states: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: Rotary,
    cache: Cache,
) -> torch.Tensor:
    """The first half of a layer: attention and its residual."""

    def run(states: torch.Tensor, mask: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        return run_attention_with_weights(layer, states, mask, rotary, cache)[0]

    if _checkpoints(layer):
        return _run_checkpointed(run, layer, states, mask, cache)
    return run(states, mask, cache)


def run_attention_with_weights(
    layer: nn.Module,
    states: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: Rotary,
    cache: Cache,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `run_attention`, and the weights `(batch, heads, length, slots)` where there are any."""
    device = device_of(layer.input_layernorm, states)
    attended = layer.self_attn(
        hidden_states=layer.input_layernorm(states.to(device)),
        attention_mask=None if mask is None else mask.to(device),
        use_cache=True,
        position_embeddings=tuple(part.to(device) for part in rotary),
        **given_cache(cache),
    )
    return states.to(attended[0].device) + attended[0], attended[1]


def run_mlp(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The second half of a layer: MLP and its residual.

    A long prefill runs part by part: the MLP's inner width, several times the model's, takes more
    memory than anything else in a layer.
    """
    if not _is_long(states):
        return states + layer.mlp(layer.post_attention_layernorm(states))
    output = states.new_empty(states.shape)
    parts = zip(*(each.flatten(0, 1).split(MLP_CHUNK) for each in (states, output)), strict=True)
    for part, place in parts:
        torch.add(part, layer.mlp(layer.post_attention_layernorm(part)), out=place)
    return output


def query_logits(
    layer: nn.Module, states: torch.Tensor, keys: torch.Tensor, rotary: Rotary
) -> torch.Tensor:
    """Scaled products of one query token with a layer's cached keys.

    Args:
        layer: the decoder layer.
        states: `(batch, 1, hidden)`, the query token's input to the layer.
        keys: `(batch, key_value_heads, slots, head_dim)`, rotated.
        rotary: cosine and sine `(batch, 1, head_dim)` of the query's position.

    Returns:
        `(batch, heads, slots)`.
    """
    states = states.to(device_of(layer.input_layernorm, states))
    query = split_heads(layer, "q_proj", layer.self_attn.q_proj(layer.input_layernorm(states)))
    return scaled_products(layer, turn(query, rotary), keys)


def split_heads(layer: nn.Module, name: str, projected: torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, heads * head_dim)` to `(batch, heads, tokens, head_dim)`.

    Queries and keys are normed on the way where the attention norms each head's.

    Args:
        name: the linear map that made them.
    """
    heads = projected.unflatten(-1, (-1, layer.self_attn.head_dim))
    norm = getattr(layer.self_attn, HEAD_NORMS.get(name, ""), None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def turn(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate `(batch, heads, tokens, head_dim)` by `(batch, tokens, head_dim)` angles."""
    cosine, sine = (part.to(states.device) for part in rotary)
    return apply_rotary_pos_emb(states, states, cosine, sine)[0]


def scaled_products(layer: nn.Module, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products of one query token with keys, `(batch, heads, slots)`.

    The query is scaled first: products of large queries and keys leave float16's range.

    Args:
        query: `(batch, heads, 1, head_dim)`, rotated.
        keys: `(batch, key_value_heads, slots, head_dim)`, rotated.
    """
    grouped = (query.squeeze(2) * layer.self_attn.scaling).unflatten(1, (keys.shape[1], -1))
    keys = keys.to(grouped.device)  # an offloaded cache holds them elsewhere
    return (grouped @ keys.transpose(2, 3)).flatten(1, 2)


def device_of(module: nn.Module, states: torch.Tensor) -> torch.device:
    """Where a module computes; where the states are if its weights are fetched when needed."""
    weight = next(module.parameters(), states)
    return states.device if weight.device.type == "meta" else weight.device


def _is_long(states: torch.Tensor) -> bool:
    return states[..., 0].numel() > MLP_CHUNK and not torch.is_grad_enabled()


def _checkpoints(layer: nn.Module) -> bool:
    return layer.gradient_checkpointing and layer.training


class _HeldStates:
    """Stands in for the cache while a layer runs: the states come in and go out as arguments."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        self.keys, self.values = keys, values

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


def _run_checkpointed(
    run: Callable,
    layer: nn.Module,
    states: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    """Run with activations recomputed in the backward pass, keys and values excepted.

    The mask is an argument, as a soft one passes gradients on. The stock checkpointing of a layer
    takes its cache away, so the layer's own is switched off.
    """
    held = cache.layers[layer.self_attn.layer_idx]
    past = (held.keys, held.values) if held.is_initialized else (None, None)

    def recompute(states, mask, keys, values):
        states_held = _HeldStates(keys, values)
        layer.gradient_checkpointing = False
        try:
            output = run(states, mask, states_held)
        finally:
            layer.gradient_checkpointing = True
        return output, states_held.keys, states_held.values

    output, keys, values = layer._gradient_checkpointing_func(recompute, states, mask, *past)
    if not held.is_initialized:
        held.update(keys[:, :, :0], values[:, :, :0])
    held.keys, held.values = keys, values
    return output
