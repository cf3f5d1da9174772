"""The seam with a stock text model: a forward that hands prompts with visual tokens to a prefill.

`PrunedForwardMixin` goes in front of a stock text model. Without a `PruneRequest` it runs the stock
forward (and lines the attention mask up with a cache that was pruned before). With one it appends
the glimpse token to the prompt, runs the prompt as `Prefill` says, and what stands behind it as one
block over the pruned cache. Callers keep seeing the prompt's full length.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .call_checks import check_covered, check_prunable, is_2d
from .decoder_call import DecoderCall
from .decoder_run import DecoderRun
from .layer_additions import LayerAdditions
from .layer_outputs import LayerOutputs, spread
from .left_out import leave_out
from .prefill import Prefill
from .prune_request import PruneRequest
from .pruned_cache import PrunedLayer, adopt_layers, pruned_layer, slot_columns, slot_mask
from .pruning_arguments import refuse_unknown_tensors
from .row_boundaries import AlignedRows
from .stock import given_cache, outputs_with_cache, take_cache
from .visual_tokens import VisualTokens


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
        layer_additions: LayerAdditions | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The stock forward, or with a `prune_request` the split one.

        Args:
            layer_additions: what visuals add between layers.

        Raises:
            ValueError: for what cannot be combined with pruning.
        """
        cache, layers = take_cache(kwargs, cache), kwargs.pop("layers", {})
        if prune_request is not None:
            past = 0 if cache is None else cache.get_seq_length()
            check_prunable(self.config, attention_mask, position_ids, past, prune_request)
            check_covered(attention_mask, inputs_embeds)
            refuse_unknown_tensors(kwargs)
            asked = _asked(self.config, "output_hidden_states", kwargs)
            wanted = bool(asked), bool(_asked(self.config, "output_attentions", kwargs))
            outputs = LayerOutputs(len(self.layers), *wanted)
            cache = DynamicCache() if cache is None else cache
            adopt_layers(cache, len(self.layers))
            run = DecoderRun(self, cache, outputs)
            call = self._call(inputs_embeds, attention_mask, position_ids, cache, prune_request)
            call.additions = layer_additions
            use_cache = self.config.use_cache if use_cache is None else use_cache
            if isinstance(prune_request.prompt_length, torch.Tensor):
                returned = self._run_aligned(run, call, prune_request, asked)
                layers |= outputs.told(returned)
                return returned
            last_hidden_state = self._run_pruned(run, call, prune_request)
            finished = not (prune_request.only_glimpse or prune_request.hold)
            returned = outputs_with_cache(
                last_hidden_state,
                cache if use_cache and prune_request.visual_log_keep is None else None,
                hidden_states=outputs.hidden_states(last_hidden_state, asked) if finished else None,
                attentions=outputs.attentions() if finished else None,
            )
            layers |= outputs.told(returned)
            return returned
        layer = pruned_layer(cache)
        if layer is not None:
            refuse_unknown_tensors(kwargs)
        if layer is not None and (attention_mask is None or is_2d(attention_mask)):
            new_tokens = input_ids if inputs_embeds is None else inputs_embeds
            attention_mask = slot_mask(layer, attention_mask, new_tokens.shape[1])
        if layer_additions is not None:
            kwargs |= self.stock_additions(layer_additions, inputs_embeds)
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
            layers["attentions"] = outputs.attentions
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

    def stock_additions(self, additions: LayerAdditions, inputs_embeds: torch.Tensor) -> dict:
        """The stock forward's arguments for what visuals add between layers, if it has any."""
        raise NotImplementedError

    def _call(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: DynamicCache,
        request: PruneRequest,
    ) -> DecoderCall:
        positions = self.rotary_position_ids(position_ids, inputs_embeds, cache.get_seq_length())
        length = inputs_embeds.shape[1]
        prompt_length = length if request.prompt_length is None else request.prompt_length
        held_length = 0 if request.held is None else request.held.length
        if isinstance(prompt_length, torch.Tensor):
            return DecoderCall(inputs_embeds, attention_mask, positions, length)
        if not 0 < prompt_length <= length:
            raise ValueError(f"prompt_length must lie in 1..{length}, got {prompt_length}")
        start = 0 if request.held is None else request.held.logical_length
        _check_visuals_in_prompt(request.tokens, start + prompt_length, start + length)
        return DecoderCall(inputs_embeds, attention_mask, positions, prompt_length, held_length)

    def _run_aligned(
        self,
        run: DecoderRun,
        call: DecoderCall,
        request: PruneRequest,
        asked: bool | int | list[int],
    ) -> BaseModelOutputWithPast:
        """Run rows whose prompts end at different columns, each cut at its own boundary.

        No cache is returned: it would hold the rows as they were moved.
        """
        if run.cache.get_seq_length() or run.outputs.wants_attentions:
            raise ValueError(
                "prompts that end at different columns cannot be combined with a cache that holds "
                "tokens, nor with output_attentions: pad prompts on the left and completions on "
                "the right"
            )
        rows = AlignedRows(request.prompt_length, call.length, call.attention_mask)
        moved = DecoderCall(
            rows.move(call.inputs_embeds),
            rows.attention_mask,
            rows.move_positions(call.position_ids),
            rows.prompt_length,
            additions=call.additions and call.additions.moved(rows),
        )
        tokens = request.tokens.moved_by(rows.shift)
        request = replace(request, tokens=tokens, prompt_length=rows.prompt_length)
        _check_visuals_in_prompt(tokens, rows.prompt_length, moved.length)
        last_hidden_state = self._run_pruned(run, moved, replace(request, compact_output=False))
        states = run.outputs.hidden_states(last_hidden_state, asked)
        run.outputs.move_unnormed(rows.move_back)
        if states is not None:
            states = tuple(each if each is None else rows.move_back(each) for each in states)
        return outputs_with_cache(rows.move_back(last_hidden_state), None, hidden_states=states)

    def _run_pruned(
        self, run: DecoderRun, call: DecoderCall, request: PruneRequest
    ) -> torch.Tensor:
        """Hidden states `(batch, length, hidden)` after the final norm, as the caller sees them."""
        end = call.length if request.in_place else call.prompt_length
        ahead = self._tokens_ahead(call.prompt_length, request)
        if request.tokens.encoded is not None:
            rows = request.tokens.rows_left_out(len(call.inputs_embeds))
            for layer in run.cache.layers:
                layer.note_left_out(rows)
        if request.in_place and request.tokens.encoded is not None:
            call = call.hiding(request.tokens, run.cache.get_seq_length())
            request = replace(request, tokens=request.tokens.seen_by_encoder())
        states = []
        if ahead:
            states.append(self._run_block(run, call, slice(0, ahead), request))
        block = call.block(slice(ahead, end), run.cache.layers[0])
        if not request.in_place:
            request = leave_out(block, request)
        if request.takes_glimpse and request.glimpse.token and not request.runs_beside:
            place = call.prompt_length - ahead if request.in_place else block.position_ids.shape[-1]
            block.insert_glimpse(request.glimpse.token(0).to(block.hidden_states), place)
        states.append(Prefill(run, block, request).run())
        if end < call.length and not request.only_glimpse:
            rest = slice(end, call.length)
            states.append(self._run_block(run, call, rest, request, block.log_keep))
        return torch.cat(states, dim=1)

    def _tokens_ahead(self, prompt_length: int, request: PruneRequest) -> int:
        """How many tokens run before the block that the glimpse token is in.

        In place, the prompt does: it never sees the glimpse token, so on a frozen base none of it
        needs a gradient, and the backward pass runs over glimpse and completion alone.
        """
        if not request.in_place or request.hold:
            return 0
        return prompt_length if request.glimpse.token is not None else prompt_length - 1

    def _run_block(
        self,
        run: DecoderRun,
        call: DecoderCall,
        part: slice,
        request: PruneRequest,
        past_log_keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run tokens without a glimpse over the cache: `(batch, tokens, hidden)` after the norm.

        Args:
            past_log_keep: `(batch, past slots)`, see `TokenBlock`.
        """
        block = call.block(part, run.cache.layers[0])
        if past_log_keep is not None:
            block.log_keep = pad(past_log_keep, (0, block.length))
        stop = request.prune_layer + 1 if request.only_glimpse else len(self.layers)
        run.whole_layers(block, 0, stop)
        return run.leave(block)


def _asked(config: PretrainedConfig, output: str, arguments: dict) -> bool | int | list[int]:
    """Which outputs of layers the caller wants: all, none, or those of some indices."""
    asked = arguments.get(output)
    asked = getattr(config, output) if asked is None else asked
    return False if asked is None else asked


def _check_visuals_in_prompt(tokens: VisualTokens, prompt_length: int, length: int) -> None:
    if prompt_length < length and tokens.columns.max() >= prompt_length:
        raise ValueError(
            f"a visual token stands behind the prompt's {prompt_length} tokens: the completion "
            "begins behind the last image or video of its row"
        )


def _over_prompt(weights: torch.Tensor | None, layer: PrunedLayer) -> torch.Tensor | None:
    """Lay the keys of attention weights `(batch, heads, tokens, slots)` out as the caller's."""
    if weights is None:
        return None
    slots = weights.shape[-1]
    columns = slot_columns(layer, slots, weights.device).expand(len(weights), -1)
    return spread(weights, columns, slots + layer.dropped, dim=3)
