"""A prompt on its way through the decoder: look, look ahead, choose, compact, go on."""

import torch

from .choosing import choose
from .compaction import compact, seal
from .decoder_layers import Rotary, query_logits, run_attention, run_layer, run_mlp
from .decoder_run import DecoderRun
from .held_prompt import HeldPrompt
from .look_ahead import LookAhead
from .prune_request import PruneRequest
from .runners import Runners
from .stock import plain_rotary
from .token_block import TokenBlock


class Prefill:
    """One prompt (a batch of them) and what is asked of it. `run` takes the steps in their order.

    The glimpse tokens are the block's last rows, whose keys and values leave the cache when the
    prompt is compacted; or, where the glimpse is read ahead or has weights of its own, they run
    beside it and never enter the cache.

    Args:
        run: the decoder, the cache and what the caller wants to see.
        block: the prompt's tokens, glimpse tokens included unless they run beside it.
        request: what to do with the visual tokens.
    """

    def __init__(self, run: DecoderRun, block: TokenBlock, request: PruneRequest):
        self.decoder_run, self.block, self.request = run, block, request
        self.beside: Runners | None = None
        if request.runs_beside and request.glimpse.token is not None:
            self.beside = Runners.of_glimpse(run.decoder, block, request.glimpse)
        self.rotary: Rotary | None = None
        self.attention: dict[int, torch.Tensor] = {}  # (N, heads) of each layer that was read

    def run(self) -> torch.Tensor:
        """Hidden states `(batch, length, hidden)` after the final norm, glimpse tokens removed.

        With `only_glimpse` or `hold` those after layer P's attention, glimpse tokens included.
        """
        self.look()
        if self.request.hold:
            return self.hold()
        if self.request.held is not None and not self.request.in_place:
            self.join()
        if self.request.looks_ahead:
            self.look_ahead()
        keep = self.choose()
        if self.request.only_glimpse:
            return self.block.hidden_states
        if not self.request.in_place:
            self.compact(keep)
        return self.go_on()

    def look(self) -> None:
        """Run layers 0..P-1 and layer P's attention over every token."""
        request, block, last = self.request, self.block, self.request.prune_layer
        mask, self.rotary = self.decoder_run.mask_and_rotary(block, first_layer=0)
        for index in range(last + 1):
            self._add_glimpse_vectors(index)
            self.decoder_run.enter(index, block)
            query_states = block.hidden_states[:, self._query]
            run = run_attention if index == last else run_layer
            self.decoder_run.step(run, index, block, mask, self.rotary)
            if self.beside is not None:
                self._step_beside(index)
            elif request.takes_glimpse and index in request.glimpse.attention_layers:
                layer = self.decoder_run.layers[index]
                plain = plain_rotary(self.decoder_run.decoder.config, self.rotary)
                query_rotary = tuple(part[:, self._query] for part in plain)
                keys = self._keys(index)
                self._read(index, query_logits(layer, query_states, keys, query_rotary))

    def hold(self) -> torch.Tensor:
        """Put the tokens on the cache, to wait there for what comes behind them."""
        request, block, cache = self.request, self.block, self.decoder_run.cache
        states, own = block.hidden_states, block.hidden_states.shape[1]
        additions = dict(block.additions)
        if request.in_place:
            self._run_above()
        if request.held is not None:
            additions = request.held.with_additions(states, additions)
            states = request.held.with_states(states)
            self.join()
        order, tokens = block.order, request.tokens.whole or request.tokens
        if order is None:
            block.order = torch.arange(block.length, device=states.device).expand(len(states), -1)
        last_visual = int(request.tokens.columns.max())
        block.fixed_slots = block.past_slots + 1 + last_visual
        seal(block, cache.layers)
        cache.held = HeldPrompt(
            states,
            block.position_ids,
            torch.arange(len(states)),
            tokens,
            tokens.item_rows.tolist(),
            request.prune_layer,
            order,
            block.length - states.shape[1],
            additions,
            request.in_place,
        )
        return states[:, -own:]

    def join(self) -> None:
        """Let what a prefix holds and what came behind it be one prompt."""
        self.block.join(self.request.held)
        for layer in self.decoder_run.cache.layers:
            layer.dropped = self.block.past_dropped

    def look_ahead(self) -> None:
        """Let text and glimpse run on to layer K over the visual tokens as they stand."""
        if self.block.held is not None:
            positions = self.block.position_ids
            self.rotary = self.decoder_run.decoder.rotary_emb(self.block.hidden_states, positions)
        ahead = LookAhead(self.decoder_run, self.block, self.rotary, self.request, self.beside)
        for index in range(self.request.prune_layer + 1, self.request.glimpse_layer + 1):
            read = ahead.step(index)
            if read is not None:
                self.attention[index] = read

    def choose(self) -> torch.Tensor:
        """Put the record on the cache; return `(N,)` bool, True at kept visual tokens."""
        record = choose(self.request, self.block, self.attention)
        self.decoder_run.cache.glimpse, places = record, self.request.tokens.places
        return record.keep_mask if places is None else record.keep_mask[places]

    def compact(self, keep: torch.Tensor) -> None:
        """Pack kept tokens, `(N,)` bool, to the right in what was run so far."""
        cache, batch = self.decoder_run.cache, len(self.block.hidden_states)
        of_prompt = cache.layers[: self.request.prune_layer + 1]
        compact(self.block, of_prompt, self.request, keep, cache.glimpse.nan_counts(batch))

    def go_on(self) -> torch.Tensor:
        """Run what is left: layer P's MLP and the layers above it."""
        request, block, run = self.request, self.block, self.decoder_run
        if request.visual_log_keep is not None:
            block.soften(request.visual_log_keep, request.tokens.whole or request.tokens)
        self._run_above()
        hidden_states = run.leave(block)
        if not request.in_place:
            seal(block, run.cache.layers)
            if request.compact_output and not run.outputs.wants_hidden_states:
                return hidden_states
        return block.as_seen(hidden_states)

    def _run_above(self) -> None:
        """Layer P's MLP and the layers above it, over the tokens as they are."""
        request, block, run = self.request, self.block, self.decoder_run
        if request.prune_layer >= 0:
            block.hidden_states = run_mlp(run.layers[request.prune_layer], block.hidden_states)
        before = self._add_glimpse_vectors if request.in_place else None
        run.whole_layers(block, request.prune_layer + 1, len(run.layers), before)

    @property
    def _query(self) -> slice:
        """The row of the block that looks: the last glimpse token, or the last prompt token."""
        return slice(self.block.glimpse_slice.stop - 1, self.block.glimpse_slice.stop)

    def _keys(self, index: int) -> torch.Tensor:
        """`(batch, heads, slots, head_dim)` of the tokens up to the glimpse."""
        slots = self.block.past_slots + self.block.glimpse_slice.stop
        return self.decoder_run.cache.layers[index].keys[:, :, :slots]

    def _step_beside(self, index: int) -> None:
        """Run the glimpse tokens through a layer that the prompt has just passed.

        Of layer P they run the attention; its MLP opens the look-ahead.
        """
        beside, request = self.beside, self.request
        layer, held = self.decoder_run.layers[index], self.decoder_run.cache.layers[index]
        slots = self.block.prompt_start + self.block.prompt_length
        keys, values = held.keys[:, :, :slots], held.values[:, :, :slots]
        beside.add_vectors(index)
        if index in request.glimpse.attention_layers:
            of_tokens = request.tokens.rows, self.block.prompt_start + request.tokens.columns
            self.attention[index] = beside.look(layer, index, keys, *of_tokens)
        if index < request.prune_layer or request.looks_ahead:
            beside.attend(layer, index, keys, values)
        if index < request.prune_layer:
            beside.run_mlp(layer, index)

    def _read(self, index: int, logits: torch.Tensor) -> None:
        """Note one layer's `(batch, heads, keys)` at the visual tokens."""
        tokens = self.request.tokens
        logits = logits.to(tokens.rows.device)
        valid = torch.ones_like(logits[:, 0], dtype=torch.bool)
        if self.block.mask is not None:
            valid = self.block.mask[:, : logits.shape[-1]]
        read = self.request.glimpse.read_attention(logits, valid)
        self.attention[index] = read[tokens.rows, :, self.block.prompt_start + tokens.columns]

    def _add_glimpse_vectors(self, layer: int) -> None:
        block = self.block
        vectors = self.request.glimpse.token(layer) if layer and block.has_glimpse else None
        if vectors is not None:
            block.hidden_states[:, block.glimpse_slice] += vectors.to(block.hidden_states)
