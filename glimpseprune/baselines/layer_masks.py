"""Dropping visual tokens from chosen decoder layers by forbidding attention to them.

A token that nobody may attend to in a layer has no influence from there on, so answers are exactly
those of a model from which it was removed, with the positions of the others as they were. Nothing
gets faster this way: costs are counted from the tokens each layer works on, not measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_glimpseprune.decoder_layers import query_logits
from modeling_glimpseprune.prune_request import PruneRequest
from modeling_glimpseprune.stock import CACHE_NAME
from modeling_glimpseprune.visual_tokens import VisualTokens

MASKED_ATTENTION = ("sdpa", "eager")


class LayerMasks:
    """Which visual tokens each decoder layer may attend to, for one batch.

    Attributes:
        keep: for each layer `(N,)` bool, True at visual tokens it works on; empty before `begin`.
    """

    def __init__(self) -> None:
        self.keep: list[torch.Tensor] = []
        self._rows = self._columns = torch.empty(0)
        self._batch = 0

    def begin(self, tokens: VisualTokens, batch: int, layers: int) -> None:
        """Start with all visual tokens of a batch of prompts kept in every layer."""
        self._rows, self._columns, self._batch = tokens.rows, tokens.columns, batch
        self.keep = [torch.ones_like(tokens.rows, dtype=torch.bool)] * layers

    def drop_from(self, layer: int, keep: torch.Tensor) -> None:
        """Drop tokens, where `keep` (`(N,)` bool) is False, from a layer and all later ones."""
        for index in range(layer, len(self.keep)):
            self.keep[index] = self.keep[index] & keep

    def restrict(
        self, layer: int, mask: torch.Tensor | None, queries: int, keys: int
    ) -> torch.Tensor | None:
        """A layer's attention mask without the tokens dropped there.

        A token always sees itself, so that no row is empty.

        Args:
            mask: `(batch, 1, queries, keys)` bool or additive, or None for a causal one.

        Returns:
            Such a mask; the one given where the layer keeps everything.
        """
        keep = self.keep[layer]
        if keep.all():
            return mask
        allowed = torch.ones(self._batch, keys, dtype=torch.bool, device=keep.device)
        allowed[self._rows, self._columns] = keep
        causal = torch.ones(queries, keys, dtype=torch.bool, device=keep.device)
        itself = causal.tril(keys - queries) & causal.triu(keys - queries)
        allowed = (allowed[:, None] | itself)[:, None]  # (batch, 1, queries, keys)
        if mask is None:
            return allowed & causal.tril(keys - queries)
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            return mask & allowed
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


@contextmanager
def prefill_begun(
    model: PreTrainedModel, begin: Callable[[PruneRequest, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Call `begin` with each prefill's request and embeddings before the decoder runs.

    What it returns takes the place of the embeddings, if it is not None.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict):
        request = kwargs.get("prune_request")
        if request is None:
            return None
        changed = begin(request, kwargs["inputs_embeds"])
        return (args, kwargs | {"inputs_embeds": changed}) if changed is not None else None

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def masked_layers(model: PreTrainedModel, masks: LayerMasks) -> Iterator[None]:
    """Inside the context every layer's attention obeys the masks.

    Raises:
        ValueError: when the attention implementation takes no mask.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"this method needs attention by {' or '.join(MASKED_ATTENTION)}, got {implementation}"
        )

    def hook(attention: nn.Module, args: tuple, kwargs: dict):
        index = attention.layer_idx
        queries = kwargs["hidden_states"].shape[1]
        keys = kwargs[CACHE_NAME].get_seq_length(index) + queries
        mask = masks.restrict(index, kwargs["attention_mask"], queries, keys)
        return args, kwargs | {"attention_mask": mask}

    handles = [
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
        for layer in model.model.language_model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def last_token_read(
    model: PreTrainedModel, layers: list[int], read: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call `read` with how the prompt's last token attends, in the prefill of each of some layers.

    It is called with the layer and `(batch, keys)`, the attention averaged over heads.
    """
    inputs: dict[int, torch.Tensor] = {}
    handles = []

    def note(index: int) -> Callable:
        def hook(norm: nn.Module, args: tuple) -> None:
            inputs[index] = args[0]

        return hook

    def attend(index: int) -> Callable:
        def hook(attention: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            states = inputs.pop(index)
            if states.shape[1] > 1:
                read(index, _last_token_attention(decoder.layers[index], states, kwargs))

        return hook

    decoder = model.model.language_model
    for index in layers:
        layer = decoder.layers[index]
        handles.append(layer.input_layernorm.register_forward_pre_hook(note(index)))
        handles.append(layer.self_attn.register_forward_hook(attend(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_token_attention(layer: nn.Module, states: torch.Tensor, kwargs: dict) -> torch.Tensor:
    keys = kwargs[CACHE_NAME].layers[layer.self_attn.layer_idx].keys
    rotary = [part[0] if part.ndim == 4 else part for part in kwargs["position_embeddings"]]
    logits = query_logits(layer, states[:, -1:], keys, tuple(part[:, -1:] for part in rotary))
    mask = kwargs["attention_mask"]
    if mask is not None:
        last = mask[:, :, -1, : logits.shape[-1]]  # (batch, 1, keys)
        forbidden = ~last if last.dtype == torch.bool else last < 0
        logits = logits.masked_fill(forbidden, float("-inf"))
    return logits.float().softmax(-1).mean(1)
