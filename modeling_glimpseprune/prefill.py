"""A prompt on its way through the decoder: look, look ahead, choose, compact, go on."""

import torch

from .decoder_layers import Rotary, query_logits, run_attention, run_layer, run_mlp
from .decoder_run import DecoderRun
from .glimpse_record import GlimpseRecord, refuse_nan
from .held_prompt import HeldPrompt
from .look_ahead import LookAhead
from .prune_request import PruneRequest
from .runners import Runners
from .selection import corner_tokens, select_visual_tokens
from .stock import plain_rotary
from .token_block import TokenBlock
from .visual_tokens import VisualTokens

UNTRAINED = (
    "this checkpoint has no trained glimpse weights, so it cannot tell which visual tokens to "
    "prune: train them (glimpseprune train-stage1), pass visual_keep_mask, or use prune=False"
)

SCORED_AT_ONCE = 2**14  # visual tokens, what bounds the predictor's memory in a batch


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
        self._finish()
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
        request, importance = self.request, None
        tokens = request.tokens.whole or request.tokens  # as the caller knows them
        if request.visual_keep_mask is not None:
            keep = request.visual_keep_mask.to(tokens.rows.device)
        elif request.visual_log_keep is not None:
            keep = torch.ones_like(tokens.rows, dtype=torch.bool)
        else:
            attention = torch.cat(
                [self.attention[index] for index in request.glimpse.attention_layers], dim=-1
            )
            importance = self._score(attention)
            if request.tokens.places is not None:
                of_all = importance.new_full((tokens.total,), float("-inf"))
                importance = of_all.index_put((request.tokens.places,), importance)
            keep = self._select(importance.detach(), tokens)
        if tokens.encoded is not None:
            keep = keep & tokens.encoded
        self.decoder_run.cache.glimpse = GlimpseRecord(
            importance,
            keep,
            tokens.rows,
            tokens.geometry,
            tokens.kinds,
            tokens.sizes,
            tokens.item_rows,
            tokens.grids,
            request.glimpse_layer,
            request.prune_layer,
            tokens.encoded,
        )
        return keep if request.tokens.places is None else keep[request.tokens.places]

    def compact(self, keep: torch.Tensor) -> None:
        """Pack kept tokens to the right in hidden states, positions, mask and layers 0..P.

        A slot that pads a row points at a dropped token.

        Args:
            keep: `(N,)` bool.
        """
        block = self.block
        kept = block.valid[:, : block.prompt_length].clone()
        kept[self.request.tokens.rows, self.request.tokens.columns] = keep
        counts, all_real, last_visual = self._kept_counts(kept)
        slots, length = max(counts), kept.shape[1]
        order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - slots :]
        past = torch.arange(block.past_slots, device=order.device).expand(len(order), -1)
        index = torch.cat([past, block.past_slots + order], dim=1)
        for layer in self.decoder_run.cache.layers[: self.request.prune_layer + 1]:
            layer.keep(index)
        block.fixed_slots = block.past_slots + slots - (length - 1 - last_visual)
        block.take(order, None if all_real and min(counts) == slots else kept.gather(1, order))

    def go_on(self) -> torch.Tensor:
        """Run what is left: layer P's MLP and the layers above it."""
        request, block, run = self.request, self.block, self.decoder_run
        if request.visual_log_keep is not None:
            block.soften(request.visual_log_keep, request.tokens.whole or request.tokens)
        self._run_above()
        hidden_states = run.leave(block)
        if not request.in_place:
            self._finish()
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

    def _score(self, attention: torch.Tensor) -> torch.Tensor:
        """Importance `(N,)` from attention `(N, columns)`; of many tokens some items at a time."""
        request, tokens = self.request, self.request.tokens
        parts = [tokens]
        if tokens.total > SCORED_AT_ONCE and not torch.is_grad_enabled():
            parts = tokens.parts(SCORED_AT_ONCE)
        sizes_seen, scores = 0, []
        for part in parts:
            of_part = attention[sizes_seen : sizes_seen + part.total]
            conditions = [part.of_each(layer) for layer in part.features]
            groups = part.groups(request.predictor_window)
            scores.append(request.glimpse(of_part, conditions, part.geometry[:, 1:3], groups))
            sizes_seen += part.total
        return torch.cat(scores).to(attention.device)

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

    def _select(self, importance: torch.Tensor, tokens: VisualTokens) -> torch.Tensor:
        request = self.request
        keep = select_visual_tokens(
            importance,
            tokens.rows,
            len(self.block.hidden_states),
            request.prune_threshold,
            request.max_keep_ratio,
            request.min_keep_tokens,
        )
        keep |= corner_tokens(tokens.geometry, request.anchor_corners)
        # The answer's first logits are read at the last prompt token, so it stays.
        return keep | (tokens.columns == self._last_column)

    @property
    def _last_column(self) -> int:
        """Where the caller sees the last token of the prompt."""
        return (self.block.prompt_length if self.block.order is None else self.block.length) - 1

    def _kept_counts(self, kept: torch.Tensor) -> tuple[list[int], bool, int]:
        """Kept tokens of each row, whether there is no padding, the last visual token's column.

        It is the one place where the prefill of a single prompt waits for the device.

        Args:
            kept: `(batch, prompt)` bool.

        Raises:
            ValueError: when the masks came from weights that were never trained or from scores that
                are no numbers, or a prompt ends in padding.
        """
        block, trained = self.block, self.request.glimpse.trained.to(kept.device).view(1)
        all_real = ends_real = trained.new_ones(1)
        if block.mask is not None:
            all_real = block.mask.all().view(1)
            ends_real = block.valid[:, block.prompt_length - 1].all().view(1)
        last_visual = self.request.tokens.columns.max().view(1).to(kept.device)
        nan_counts = self.decoder_run.cache.glimpse.nan_counts(len(kept)).to(kept.device)
        known = torch.cat([kept.sum(1), nan_counts, trained, all_real, ends_real, last_visual])
        *counts, trained, all_real, ends_real, last_visual = known.tolist()
        counts, nan_counts = counts[: len(kept)], counts[len(kept) :]
        if not trained and self.request.takes_glimpse:
            raise ValueError(UNTRAINED)
        refuse_nan(nan_counts)
        if not ends_real:
            raise ValueError(
                "a prompt ends in padding, where the answer would start: pad on the left "
                '(processor.tokenizer.padding_side = "left"), or use prune=False'
            )
        return counts, bool(all_real), last_visual

    def _finish(self) -> None:
        """Tell every cache layer what was dropped."""
        block, layers = self.block, self.decoder_run.cache.layers
        slots = block.past_slots + block.order.shape[1]
        dropped = block.length - block.order.shape[1]
        delta = block.next_position - (slots + block.past_dropped + dropped)
        new_columns = block.past_slots + block.past_dropped + block.order
        for layer in layers:
            layer.dropped = block.past_dropped + dropped
            layer.prompt_slots = slots
            layer.fixed_slots = block.fixed_slots
            layer.prompt_mask = block.mask
            layer.position_delta = delta[:, None]
            layer.seal()
        past_columns = block.past_columns.expand(len(new_columns), -1)
        layers[0].prompt_columns = torch.cat([past_columns, new_columns], dim=1)
