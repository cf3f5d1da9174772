"""Look once, ask often: `look`, and full prompts over a prefix."""

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .encode_choice import ENCODE_ARGUMENTS, NONE_BEHIND
from .fingerprints import fingerprint
from .given_visuals import GivenVisual
from .glimpse_prefix import GlimpsePrefix, check_made_by
from .later_turns import past_length
from .prefix_file import read_parts
from .prefix_parts import PrefixOrigin
from .prompt_layout import padded_left
from .shared_layer import shared_cache
from .stock import cache_of, given_cache, take_cache, token_types


class LookingMixin:
    """The part of the model users hold that makes prefixes, and asks over them."""

    def look(
        self: PreTrainedModel,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        cache: Cache | None = None,
        prefix_length: int | Sequence[int] | None = None,
        differentiable: bool = False,
        in_place: bool = False,
        **inputs,
    ) -> GlimpsePrefix:
        """Run the beginning of a prompt once, for any number of questions about its visuals.

        The vision encoder and layers 0..P run over the prompt up to its last image or video, and
        nothing is dropped. `generate`, `forward` and `glimpse` take the result as their cache.

        Args:
            input_ids: `(rows, length)` whole prompts; what stands behind the cut is left out.
            attention_mask: `(rows, length)`, or None for all ones.
            cache: a prefix that these prompts begin with; or the cache of an earlier turn, whose
                visual tokens stay as they were chosen. Either is left as it is.
            prefix_length: tokens of each prompt that the prefix takes, padding not counted; one
                number for all, or one a row. Default: up to the last visual token and its end
                marker.
            differentiable: keep what gradients need, for questions in training.
            in_place: run the layers above P as well, so that questions may be asked with `in_place`
                over whole prompts that nothing was dropped of.
            inputs: what else `generate` takes of the prompts; of the settings `prune_layer`.

        Raises:
            ValueError: when there is no image or video, the cut would go through one, the prompts
                do not begin with the prefix given, or `in_place` comes with a cache.
        """
        given = inputs | {"input_ids": input_ids, "attention_mask": attention_mask}
        cache = take_cache(given, cache)
        if in_place and cache is not None:
            raise ValueError(
                "look with in_place begins a prompt: leave the cache out, or look without in_place"
            )
        if isinstance(cache, GlimpsePrefix):
            given = self.over_prefix(cache, given)
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        self._check_looked_at(given)
        mask = torch.ones_like(ids) if mask is None else mask.long()
        past = past_length(cache)
        given = self.model.drop_cached_visuals(ids, past, given)
        visuals = self.model.place_visuals(ids, given)
        ends = self._ends(ids, mask, past, prefix_length)
        taken = [_is_taken(visual, ends[visual.row]) for visual in visuals]
        given = self.model.keep_visuals(given, visuals, taken)
        spans = [slice(past, end) for end in ends]
        rows = [ids[row, span][mask[row, span].bool()].cpu() for row, span in enumerate(spans)]
        new = {name: each.to(ids.device) for name, each in padded_left(rows, 0).items()}
        whole_mask = torch.cat([mask[:, :past], new["attention_mask"]], dim=1)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            outputs = self.model(
                **self._with_types(new["input_ids"], given),
                input_ids=new["input_ids"],
                attention_mask=whole_mask,
                hold=True,
                in_place=in_place,
                use_cache=True,
                return_dict=True,
                **given_cache(cache if isinstance(cache, GlimpsePrefix) else shared_cache(cache)),
            )
        pixels: list[dict[int, str]] = [{} for _ in ids]
        if isinstance(cache, GlimpsePrefix):
            pixels = [dict(of_row) for of_row in cache.begun(len(ids)).pixels]
        for visual, is_taken in zip(visuals, taken, strict=True):
            if is_taken:
                padding = whole_mask.shape[1] - past - len(rows[visual.row])
                before = int(mask[visual.row, past : visual.first].sum())
                pixels[visual.row][past + padding + before] = visual.hash
        whole_ids = torch.cat([ids[:, :past], new["input_ids"]], dim=1)
        made_by = fingerprint(self.model)
        origin = PrefixOrigin(whole_ids.cpu(), whole_mask.cpu().bool(), pixels, made_by)
        return GlimpsePrefix.of_cache(cache_of(outputs), origin)

    def load_prefix(self: PreTrainedModel, path: str | os.PathLike) -> GlimpsePrefix:
        """Read a prefix that `GlimpsePrefix.save` wrote, onto the host.

        Args:
            path: of the file.

        Raises:
            ValueError: when the file is damaged, or another model made it.
        """
        prefix = GlimpsePrefix.of_parts(*read_parts(path))
        check_made_by(prefix, self.model)
        return prefix

    def over_prefix(self: PreTrainedModel, prefix: GlimpsePrefix, inputs: dict) -> dict:
        """A call's inputs with prompts laid out over a prefix, checked against it.

        Args:
            inputs: `input_ids` `(batch, length)` of whole prompts, and what comes with them.

        Raises:
            ValueError: when prompts or pixels are not those of the prefix.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("a prefix is held against input_ids: give whole prompts as ids")
        inputs = inputs | prefix.prompts(ids, inputs.get("attention_mask"))
        ids = inputs["input_ids"]
        brought = self.model.drop_cached_visuals(ids, past_length(prefix), inputs)
        if self.model.asks_for_part(inputs) and not self.model.place_visuals(ids, brought):
            raise ValueError(NONE_BEHIND)
        pixels = prefix.begun(len(ids)).pixels
        for visual in self.model.place_visuals(ids, inputs):
            if (expected := pixels[visual.row].get(visual.first)) not in (None, visual.hash):
                raise ValueError(
                    f"the {visual.kind} of prompt {visual.row} at token {visual.first} is another "
                    f"one than the prefix was made of (hash {expected[:8]}, not "
                    f"{visual.hash[:8]}): look at this one, or leave pixels of the prefix out"
                )
        return self._with_types(ids, inputs)

    def behind_prefix(self: PreTrainedModel, prefix: GlimpsePrefix, inputs: dict) -> dict:
        """A backbone's inputs, the tokens and visuals behind a prefix, from whole prompts."""
        inputs, past = self.over_prefix(prefix, inputs), past_length(prefix)
        inputs = self.model.drop_cached_visuals(inputs["input_ids"], past, inputs)
        ids = inputs["input_ids"][:, past:]
        return self._with_types(ids, inputs) | {"input_ids": ids} | given_cache(prefix)

    def _check_looked_at(self, given: dict) -> None:
        """Refuse arguments of `look` that it would ignore.

        Raises:
            ValueError: naming them.
        """
        names = {"prune_layer", "mm_token_type_ids", "mm_encoder_outputs", *ENCODE_ARGUMENTS}
        for of_kind in (*self.model.visual_inputs.values(), *self.model.visual_notes.values()):
            names |= set(of_kind)
        unknown = sorted(name for name, value in given.items() if value is not None)
        if unknown := [name for name in unknown if name not in names]:
            raise ValueError(
                f"look does not take {', '.join(unknown)}: give it the prompts, what comes with "
                "them from the processor, and prune_layer; settings of a question go with the "
                "question"
            )

    def _ends(
        self,
        ids: torch.LongTensor,
        mask: torch.Tensor,
        past: int,
        prefix_length: int | Sequence[int] | None,
    ) -> list[int]:
        """The column of each row that a look goes up to."""
        counts = mask.cumsum(1)
        if prefix_length is not None:
            lengths = counts[:, -1]
            held = counts[:, past - 1] if past else torch.zeros_like(lengths)
            taken = torch.as_tensor(prefix_length, device=mask.device)
            if taken.ndim and len(taken) != len(ids):
                raise ValueError(f"prefix_length has {len(taken)} numbers for {len(ids)} prompts")
            taken = taken.expand(len(ids))
            if bool(((taken <= held) | (taken > lengths)).any()):
                least, most = int(held.max()) + 1, int(lengths.min())
                raise ValueError(
                    f"prefix_length must lie in {least}..{most}, tokens of the prompts without "
                    f"padding and behind the cache, got {prefix_length}"
                )
            return (1 + (counts < taken[:, None]).sum(1)).tolist()
        visual = torch.isin(ids, self.model.visual_token_ids.to(ids.device))
        marker = getattr(self.config, "vision_end_token_id", None)
        places = torch.arange(ids.shape[1], device=ids.device)
        ends = (1 + torch.where(visual, places, -1).amax(1)).tolist()
        if min(ends) <= past:
            raise ValueError(
                f"prompt {ends.index(min(ends))} has no image or video to look at"
                + (" behind what the cache holds: give prefix_length to take text" if past else "")
            )
        length = ids.shape[1]
        marked = (end < length and ids[row, end] == marker for row, end in enumerate(ends))
        return [end + bool(is_marked) for end, is_marked in zip(ends, marked, strict=True)]

    def _with_types(self, ids: torch.LongTensor, inputs: dict) -> dict:
        """Inputs whose notes of which tokens are placeholders, if any, fit the ids."""
        inputs = dict(inputs)
        inputs.pop("mm_token_type_ids", None)
        if not self.model.positions_from_ids:
            return inputs
        return inputs | token_types(*(ids == each for each in self.model.visual_token_ids.tolist()))


def _is_taken(visual: GivenVisual, end: int) -> bool:
    """Whether a visual stands before the end of a prefix.

    Raises:
        ValueError: when the end is in it.
    """
    if visual.first < end <= visual.last:
        raise ValueError(
            f"prefix_length cuts through the {visual.kind} of prompt {visual.row} that takes the "
            f"tokens {visual.first} to {visual.last}: cut before or behind it"
        )
    return visual.last < end
