"""The split forward: a decoder that takes a glimpse, drops visual tokens and goes on without them.

`PrunedForwardMixin` goes in front of a stock text model. Without a `PruneRequest` it runs the stock
forward (and lines the attention mask up with a cache that was pruned before). With one it appends
the glimpse token to the prompt, runs layers 0..K, scores the visual tokens from the glimpse token's
attention, compacts hidden states, positions and cache between layer K's attention and its MLP, and
runs the rest. Callers keep seeing the prompt's full length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .decoder_layers import (
    query_logits,
    run_attention,
    run_attention_with_weights,
    run_layer,
    run_mlp,
)
from .glimpse import Glimpse
from .glimpse_record import GlimpseRecord
from .layer_outputs import LayerOutputs, spread
from .pruned_cache import adopt_layers, pruned_layer, slot_columns, slot_mask
from .selection import corner_tokens, select_visual_tokens
from .stock import causal_mask, given_cache, outputs_with_cache, refuse_unknown_tensors, take_cache
from .token_block import TokenBlock
from .visual_tokens import VisualTokens

UNTRAINED = (
    "this checkpoint has no trained glimpse weights, so it cannot tell which visual tokens to "
    "prune: train them (glimpseprune train-stage1), pass visual_keep_mask, or use prune=False"
)
SOFT_ATTENTIONS = ("eager", "sdpa")


@dataclass
class PruneRequest:
    """What a prefill is asked to do with its visual tokens.

    Attributes:
        glimpse: the trained modules.
        tokens: the batch's visual tokens.
        glimpse_layer: K, the last layer that sees every token; -1 prunes before the decoder, with
            a mask given by the caller.
        predictor_window: side of the predictor's attention windows in tokens, or None.
        anchor_corners: corners whose token is always kept.
        prune_threshold, max_keep_ratio, min_keep_tokens: see `select_visual_tokens`.
        visual_keep_mask: `(N,)` bool given by the caller; no glimpse is taken then.
        visual_log_keep: `(N,)` a soft mask given by the caller; no glimpse is taken, and every
            token stays.
        prompt_length: tokens before the completion, or None when all are prompt.
        in_place: keep every token and leave the glimpse token in the sequence, where the
            completion sees it: the forward of stage 1.
        only_glimpse: stop after layer K's attention.
        compact_output: return the hidden states of kept tokens only, packed to the right.
    """

    glimpse: Glimpse
    tokens: VisualTokens
    glimpse_layer: int
    predictor_window: int | None
    anchor_corners: list[str]
    prune_threshold: float
    max_keep_ratio: float | None
    min_keep_tokens: int
    visual_keep_mask: torch.Tensor | None = None
    visual_log_keep: torch.Tensor | None = None
    prompt_length: int | None = None
    in_place: bool = False
    only_glimpse: bool = False
    compact_output: bool = False

    @property
    def takes_glimpse(self) -> bool:
        """Whether the glimpse decides, and not the caller."""
        return self.visual_keep_mask is None and self.visual_log_keep is None


class PrunedForwardMixin:
    """Put in front of a stock text model whose layers follow Llama's names."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prune_request: PruneRequest | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The stock forward, or with a `prune_request` the split one.

        Raises:
            ValueError: for what cannot be combined with pruning.
        """
        cache = take_cache(kwargs, cache)
        if prune_request is not None:
            self._check_prunable(attention_mask, prune_request)
            refuse_unknown_tensors(kwargs)
            outputs = LayerOutputs(
                len(self.layers),
                self._wants("output_hidden_states", kwargs),
                self._wants("output_attentions", kwargs),
            )
            return self._forward_pruned(
                inputs_embeds,
                attention_mask,
                position_ids,
                cache,
                self.config.use_cache if use_cache is None else use_cache,
                prune_request,
                outputs,
            )
        layer = pruned_layer(cache)
        if layer is not None and (attention_mask is None or _is_2d(attention_mask)):
            new_tokens = input_ids if inputs_embeds is None else inputs_embeds
            attention_mask = slot_mask(layer, attention_mask, new_tokens.shape[1])
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **given_cache(cache),
            **kwargs,
        )
        if layer is not None and outputs.attentions is not None:
            outputs.attentions = tuple(_over_prompt(each, layer) for each in outputs.attentions)
        return outputs

    def rotary_position_ids(
        self, position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, past_length: int
    ) -> torch.Tensor:
        """The positions the family's rotary embedding takes, `(..., batch, length)`."""
        if position_ids is not None:
            return position_ids
        batch, length = inputs_embeds.shape[:2]
        positions = torch.arange(past_length, past_length + length, device=inputs_embeds.device)
        return positions.expand(batch, -1)

    def _wants(self, output: str, kwargs: dict) -> bool:
        asked = kwargs.get(output)
        return bool(getattr(self.config, output) if asked is None else asked)

    def _check_prunable(self, attention_mask: torch.Tensor | None, request: PruneRequest) -> None:
        if not (attention_mask is None or _is_2d(attention_mask)):
            raise ValueError(
                "pruning takes a 2-D attention mask (batch, length) and a DynamicCache; static "
                "caches come with a mask of their own: use the default cache, or prune=False"
            )
        if "sliding_attention" in (getattr(self.config, "layer_types", None) or []):
            raise ValueError("sliding-window layers cannot be pruned; use prune=False")
        attention = self.config._attn_implementation
        if request.visual_log_keep is not None and attention not in SOFT_ATTENTIONS:
            raise ValueError(
                f"visual_log_keep needs attn_implementation {' or '.join(SOFT_ATTENTIONS)}, which "
                f"take a mask of numbers; got {attention}"
            )

    def _forward_pruned(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: DynamicCache | None,
        use_cache: bool,
        request: PruneRequest,
        outputs: LayerOutputs,
    ) -> BaseModelOutputWithPast:
        cache = DynamicCache() if cache is None else cache
        adopt_layers(cache, len(self.layers))
        past_length = cache.get_seq_length()
        positions = self.rotary_position_ids(position_ids, inputs_embeds, past_length)
        length = inputs_embeds.shape[1]
        prompt_length = length if request.prompt_length is None else request.prompt_length
        if not 0 < prompt_length <= length:
            raise ValueError(f"prompt_length must lie in 1..{length}, got {prompt_length}")
        if prompt_length < length and request.tokens.columns.max() >= prompt_length:
            raise ValueError(
                f"a visual token stands behind the prompt's {prompt_length} tokens: pad prompts on "
                "the left and completions on the right, so that one boundary serves the batch"
            )

        end = length if request.in_place else prompt_length
        ahead = self._tokens_ahead(prompt_length, request)
        arguments = (inputs_embeds, attention_mask, positions, cache, prompt_length)
        states = []
        if ahead:
            states.append(self._run_block(slice(0, ahead), *arguments, request, outputs))
        prefill = self._start(slice(ahead, end), *arguments, request)
        states.append(self._run_prefill(prefill, cache, request, outputs))
        if end < length and not request.only_glimpse:
            rest = slice(end, length)
            states.append(self._run_block(rest, *arguments, request, outputs, prefill.log_keep))
        last_hidden_state = torch.cat(states, dim=1)
        finished = not request.only_glimpse
        return outputs_with_cache(
            last_hidden_state,
            cache if use_cache and request.visual_log_keep is None else None,
            hidden_states=outputs.hidden_states(last_hidden_state) if finished else None,
            attentions=outputs.attentions() if finished else None,
        )

    def _tokens_ahead(self, prompt_length: int, request: PruneRequest) -> int:
        """How many tokens run before the block that the glimpse token is in.

        In place, the prompt does: it never sees the glimpse token, so on a frozen base none of it
        needs a gradient, and the backward pass runs over glimpse and completion alone.
        """
        if not request.in_place:
            return 0
        return prompt_length if request.glimpse.token is not None else prompt_length - 1

    def _run_block(
        self,
        part: slice,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: DynamicCache,
        prompt_length: int,
        request: PruneRequest,
        outputs: LayerOutputs,
        past_log_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run tokens without a glimpse over the cache: `(batch, tokens, hidden)` after the norm.

        Args:
            past_log_keep: `(batch, past slots)`, see `TokenBlock`.
        """
        block = self._start(
            part, inputs_embeds, attention_mask, position_ids, cache, prompt_length, None
        )
        if past_log_keep is not None:
            block.log_keep = pad(past_log_keep, (0, block.length))
        self._run_layers(0, block, cache, request, outputs)
        return self.norm(block.hidden_states)

    def _start(
        self,
        part: slice,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: DynamicCache,
        prompt_length: int,
        request: PruneRequest | None,
    ) -> TokenBlock:
        """Line the mask up with the cache, and insert the glimpse tokens after the prompt.

        Args:
            part: the tokens to run; those before it are in the cache already.
            request: None for a block without glimpse tokens.
        """
        prompt_positions = position_ids[..., :prompt_length].reshape(
            -1, len(inputs_embeds), prompt_length
        )
        next_position = prompt_positions[..., -1].amax(dim=0) + 1
        inputs_embeds, position_ids = inputs_embeds[:, part], position_ids[..., part]
        length = inputs_embeds.shape[1]
        place = prompt_length - part.start if request is not None else length
        past = cache.layers[0]
        if attention_mask is not None:
            attention_mask = attention_mask[:, : past.get_seq_length() + length]
        mask = slot_mask(past, attention_mask, length)
        if mask is not None:
            mask = mask[:, past.dropped :].to(inputs_embeds.device, torch.bool)
        past_slots = past.physical_length
        vectors = None
        if request is not None and request.takes_glimpse and request.glimpse.token:
            vectors = request.glimpse.token(0).to(inputs_embeds)
        count = 0 if vectors is None else len(vectors)
        if vectors is not None:
            batch = inputs_embeds.shape[0]
            rows = vectors.expand(batch, -1, -1)
            inputs_embeds = _insert(inputs_embeds, rows, place, dim=1)
            steps = torch.arange(count, device=position_ids.device)
            following = (next_position[:, None] + steps).expand(*position_ids.shape[:-1], -1)
            position_ids = _insert(position_ids, following, place, dim=-1)
            if mask is not None:
                ones = mask.new_ones(batch, count)
                mask = _insert(mask, ones, past_slots + place, dim=1)
        return TokenBlock(
            inputs_embeds,
            position_ids,
            mask,
            length,
            past_slots,
            past.dropped,
            slot_columns(past, past_slots, inputs_embeds.device),
            prompt_start=past_slots - part.start,
            prompt_length=prompt_length,
            glimpse_slice=slice(place, place + count),
            next_position=next_position,
        )

    def _run_prefill(
        self, prefill: TokenBlock, cache: DynamicCache, request: PruneRequest, outputs: LayerOutputs
    ) -> torch.Tensor:
        """Hidden states `(batch, length, hidden)` after the final norm, glimpse tokens removed."""
        attention = self._run_glimpse(prefill, cache, request, outputs)
        keep = self._score_and_select(attention, prefill, cache, request)
        if request.only_glimpse:
            return prefill.hidden_states
        layer = self.layers[request.glimpse_layer]
        if not request.in_place:
            self._compact(self._prompt_mask(keep, prefill, request), prefill, cache, request)
        if request.visual_log_keep is not None:
            prefill.soften(request.visual_log_keep, request.tokens)
        if request.glimpse_layer >= 0:
            prefill.hidden_states = run_mlp(layer, prefill.hidden_states)
        self._run_layers(request.glimpse_layer + 1, prefill, cache, request, outputs)
        hidden_states = self.norm(prefill.hidden_states)
        if not request.in_place:
            self._finish(prefill, cache)
            if request.compact_output and not outputs.wants_hidden_states:
                return hidden_states
        return prefill.as_seen(hidden_states)

    def _run_glimpse(
        self, prefill: TokenBlock, cache: DynamicCache, request: PruneRequest, outputs: LayerOutputs
    ) -> torch.Tensor | None:
        """Run layers 0..K-1 and layer K's attention; read the glimpse token's attention.

        Returns:
            `(N, attention_layers * heads)`, or None when the caller gave the keep mask.
        """
        last_layer = request.glimpse_layer
        mask, rotary = self._mask_and_rotary(prefill, cache, first_layer=0)
        logits = {}
        query = slice(prefill.glimpse_slice.stop - 1, prefill.glimpse_slice.stop)
        keys = prefill.past_slots + prefill.glimpse_slice.stop
        for index, layer in enumerate(self.layers[: last_layer + 1]):
            self._add_glimpse_vectors(index, prefill, request)
            query_states = prefill.hidden_states[:, query]
            run = run_attention if index == last_layer else run_layer
            self._step(run, index, prefill, mask, rotary, cache, outputs)
            if request.takes_glimpse and index in request.glimpse.attention_layers:
                query_rotary = tuple(_plain(part)[:, query] for part in rotary)
                layer_keys = cache.layers[index].keys[:, :, :keys]
                logits[index] = query_logits(layer, query_states, layer_keys, query_rotary)
        if not logits:
            return None
        columns = [
            self._visual_attention(logits[index], prefill, request)
            for index in request.glimpse.attention_layers
        ]
        return torch.cat(columns, dim=-1)

    def _step(
        self,
        run: Callable,
        index: int,
        block: TokenBlock,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: DynamicCache,
        outputs: LayerOutputs,
    ) -> None:
        """Run one layer, or its attention only, and note what the caller asked to see of it."""
        layer = self.layers[index]
        if outputs.wants_hidden_states:
            outputs.add_states(index, block.as_seen(block.hidden_states))
        if not outputs.wants_attentions:
            block.hidden_states = run(layer, block.hidden_states, mask, rotary, cache)
            return
        states, weights = run_attention_with_weights(
            layer, block.hidden_states, mask, rotary, cache
        )
        outputs.add_attention(index, block.weights_as_seen(weights))
        block.hidden_states = states if run is run_attention else run_mlp(layer, states)

    def _visual_attention(
        self, logits: torch.Tensor, prefill: TokenBlock, request: PruneRequest
    ) -> torch.Tensor:
        """`(batch, heads, keys)` of one layer to `(N, heads)` at the visual tokens."""
        tokens = request.tokens
        logits = logits.to(tokens.rows.device)
        valid = torch.ones_like(logits[:, 0], dtype=torch.bool)
        if prefill.mask is not None:
            valid = prefill.mask[:, : logits.shape[-1]]
        attention = request.glimpse.read_attention(logits, valid)
        return attention[tokens.rows, :, prefill.prompt_start + tokens.columns]

    def _add_glimpse_vectors(self, layer: int, prefill: TokenBlock, request: PruneRequest) -> None:
        vectors = request.glimpse.token(layer) if layer and prefill.has_glimpse else None
        if vectors is not None:
            prefill.hidden_states[:, prefill.glimpse_slice] += vectors.to(prefill.hidden_states)

    def _score_and_select(
        self,
        attention: torch.Tensor | None,
        prefill: TokenBlock,
        cache: DynamicCache,
        request: PruneRequest,
    ) -> torch.Tensor:
        """Put the record on the cache; return `(N,)` bool, True at kept visual tokens."""
        tokens, importance = request.tokens, None
        if request.visual_keep_mask is not None:
            keep = request.visual_keep_mask.to(tokens.rows.device)
        elif request.visual_log_keep is not None:
            keep = torch.ones_like(tokens.rows, dtype=torch.bool)
        else:
            importance = request.glimpse(
                attention,
                [layer.to(attention) for layer in tokens.features],
                tokens.geometry[:, 1:3],
                tokens.groups(request.predictor_window),
            ).to(attention.device)
            keep = self._select(importance.detach(), prefill, request)
        cache.glimpse = GlimpseRecord(
            importance, keep, tokens.rows, tokens.geometry, tokens.kinds, tokens.sizes
        )
        return keep

    def _prompt_mask(
        self, keep: torch.Tensor, prefill: TokenBlock, request: PruneRequest
    ) -> torch.Tensor:
        """`(batch, prompt)` bool, True at all kept tokens, from that of the visual tokens."""
        prompt = prefill.valid[:, : prefill.prompt_length].clone()
        prompt[request.tokens.rows, request.tokens.columns] = keep
        return prompt

    def _select(
        self, importance: torch.Tensor, prefill: TokenBlock, request: PruneRequest
    ) -> torch.Tensor:
        tokens = request.tokens
        keep = select_visual_tokens(
            importance,
            tokens.rows,
            len(prefill.hidden_states),
            request.prune_threshold,
            request.max_keep_ratio,
            request.min_keep_tokens,
        )
        keep |= corner_tokens(tokens.geometry, request.anchor_corners)
        # The answer's first logits are read at the last prompt token, so it stays.
        return keep | (tokens.columns == prefill.prompt_length - 1)

    def _compact(
        self, keep: torch.Tensor, prefill: TokenBlock, cache: DynamicCache, request: PruneRequest
    ) -> None:
        """Pack kept tokens to the right in hidden states, positions, mask and layers 0..K.

        A slot that pads a row points at a dropped token.

        Args:
            keep: `(batch, prompt)` bool.
        """
        counts, all_real, last_visual = _kept_counts(keep, prefill, request)
        slots = max(counts)
        prefill.fixed_slots = prefill.past_slots + slots - (keep.shape[1] - 1 - last_visual)
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - slots :]
        real = keep.gather(1, order)
        batch, past_slots = len(order), prefill.past_slots
        past = torch.arange(past_slots, device=order.device).expand(batch, -1)
        index = torch.cat([past, past_slots + order], dim=1)
        for layer in cache.layers[: request.glimpse_layer + 1]:
            layer.keep(index)
        states = prefill.hidden_states
        prefill.hidden_states = states.take_along_dim(order.to(states.device)[..., None], dim=1)
        positions = prefill.position_ids
        prefill.position_ids = positions.take_along_dim(
            order.expand(*positions.shape[:-1], -1), dim=-1
        )
        prefill.order, prefill.glimpse_slice = order, slice(slots, slots)
        if all_real and min(counts) == slots:
            prefill.mask = None
            return
        past_mask = real.new_ones(batch, past_slots)
        if prefill.mask is not None:
            past_mask = prefill.mask[:, :past_slots]
        prefill.mask = torch.cat([past_mask, real], dim=1)

    def _run_layers(
        self,
        first: int,
        block: TokenBlock,
        cache: DynamicCache,
        request: PruneRequest,
        outputs: LayerOutputs,
    ) -> None:
        if first == len(self.layers):
            return
        mask, rotary = self._mask_and_rotary(block, cache, first)
        stop = request.glimpse_layer + 1 if request.only_glimpse else len(self.layers)
        for index in range(first, stop):
            if request.in_place:
                self._add_glimpse_vectors(index, block, request)
            self._step(run_layer, index, block, mask, rotary, cache, outputs)

    def _finish(self, prefill: TokenBlock, cache: DynamicCache) -> None:
        """Tell every cache layer what was dropped."""
        slots = prefill.past_slots + prefill.order.shape[1]
        dropped = prefill.length - prefill.order.shape[1]
        delta = prefill.next_position - (slots + prefill.past_dropped + dropped)
        new_columns = prefill.past_slots + prefill.past_dropped + prefill.order
        for layer in cache.layers:
            layer.dropped += dropped
            layer.prompt_slots = slots
            layer.fixed_slots = prefill.fixed_slots
            layer.prompt_mask = prefill.mask
            layer.position_delta = delta[:, None]
            layer.seal()
        past_columns = prefill.past_columns.expand(len(new_columns), -1)
        cache.layers[0].prompt_columns = torch.cat([past_columns, new_columns], dim=1)

    def _mask_and_rotary(
        self, block: TokenBlock, cache: DynamicCache, first_layer: int
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]:
        """Attention mask and rotary embeddings for the layers from `first_layer` on.

        With a soft mask it is float, `(batch, 1, tokens, slots)`.

        The mask functions ask the cache's first layer how much it holds. Layers above K hold less
        than those below, so they are shown a cache that begins with `first_layer`.
        """
        rotary = self.rotary_emb(block.hidden_states, block.position_ids)
        if block.log_keep is not None:
            return block.soft_mask().to(block.hidden_states.dtype), rotary
        remaining = DynamicCache()
        remaining.layers = cache.layers[first_layer:]
        mask = block.mask
        if mask is not None:
            mask = torch.cat([mask.new_zeros(len(mask), block.past_dropped), mask], dim=1)
        start = block.past_slots + block.past_dropped
        return causal_mask(self.config, block.hidden_states, mask, remaining, start), rotary


def _is_2d(attention_mask: object) -> bool:
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def _over_prompt(weights: torch.Tensor | None, layer) -> torch.Tensor | None:
    """Lay the keys of attention weights `(batch, heads, tokens, slots)` out as the caller's."""
    if weights is None:
        return None
    slots = weights.shape[-1]
    columns = slot_columns(layer, slots, weights.device).expand(len(weights), -1)
    return spread(weights, columns, slots + layer.dropped, dim=3)


def _insert(tensor: torch.Tensor, part: torch.Tensor, position: int, dim: int) -> torch.Tensor:
    before, after = tensor.tensor_split([position], dim=dim)
    return torch.cat([before, part, after], dim=dim)


def _plain(rotary: torch.Tensor) -> torch.Tensor:
    """`(batch, length, head_dim)`; one axis stands for all where a family keeps three.

    It is used at glimpse tokens only, whose positions on the three axes are equal.
    """
    return rotary[0] if rotary.ndim == 4 else rotary


def _kept_counts(
    keep: torch.Tensor, prefill: TokenBlock, request: PruneRequest
) -> tuple[list[int], bool, int]:
    """Kept tokens of each row, whether the mask has no padding, the last visual token's column.

    It is the one place where a prefill waits for the device.

    Raises:
        ValueError: when the masks came from weights that were never trained, or a prompt ends in
            padding.
    """
    trained = request.glimpse.trained.to(keep.device).view(1)
    all_real = ends_real = trained.new_ones(1)
    if prefill.mask is not None:
        all_real = prefill.mask.all().view(1)
        ends_real = prefill.valid[:, prefill.prompt_length - 1].all().view(1)
    last_visual = request.tokens.columns.max().view(1).to(keep.device)
    known = torch.cat([keep.sum(1), trained, all_real, ends_real, last_visual])
    *counts, trained, all_real, ends_real, last_visual = known.tolist()
    if not trained and request.takes_glimpse:
        raise ValueError(UNTRAINED)
    if not ends_real:
        raise ValueError(
            "a prompt ends in padding, where the answer would start: pad on the left "
            '(processor.tokenizer.padding_side = "left"), or use prune=False'
        )
    return counts, bool(all_real), last_visual
