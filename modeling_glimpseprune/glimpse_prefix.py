"""A prefix: the beginning of a prompt, looked at once, for as many questions as come."""

import copy
import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .fingerprints import fingerprint
from .held_prompt import HeldPrompt
from .prefix_file import write_parts
from .prefix_parts import PrefixOrigin, of_parts, to_parts
from .prompt_layout import behind_prefix
from .pruned_cache import PrunedLayer
from .shared_layer import shared_cache


class GlimpsePrefix(DynamicCache):
    """What `look` returns and `generate`, `forward` and `glimpse` take as their cache.

    It is never written to: each call goes on with a fork, which shares what is held here. So one
    prefix serves any number of questions, threads included.

    Attributes:
        layers: keys and values, unpruned in layers 0..P; those above hold earlier turns, if any,
            or what `in_place` asks for.
        held: states of the tokens after layer P's attention, and their visual tokens.
        origin: what it was made of.
    """

    def __init__(self, layers: Sequence[PrunedLayer], held: HeldPrompt, origin: PrefixOrigin):
        super().__init__()
        self.layers = list(layers)
        self.held, self.origin = held, origin

    @classmethod
    def of_cache(cls, cache: DynamicCache, origin: PrefixOrigin) -> "GlimpsePrefix":
        """The prefix of a cache whose prompt waits."""
        return cls(shared_cache(cache).layers, cache.held, origin)

    @property
    def batch_size(self) -> int:
        """Rows that a batch over this prefix has, or a multiple of it."""
        return len(self.held.rows)

    @property
    def settled_length(self) -> int:
        """Tokens in front of those held, of earlier turns whose visual tokens were chosen."""
        return self.get_seq_length() - self.held.logical_length

    @property
    def prune_layer(self) -> int:
        """P, the last layer that ran."""
        return self.held.prune_layer

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        held = self.held
        parts = [held.states, *held.additions.values(), *held.tokens.features]
        parts += [part for layer in self.layers for part in getattr(layer, "held", ())]
        return sum(part.nbytes for part in parts)

    def fork(self, batch: int, in_place: bool = False) -> tuple[DynamicCache, HeldPrompt]:
        """A cache to write to, and the held prompt, for a batch whose rows begin with this prefix.

        Args:
            batch: its rows, a multiple of this prefix's; each row here begins as many in turn.
            in_place: with what the layers above P hold of this prompt, if they ran.

        Raises:
            ValueError: for another number of rows.
        """
        rows = self.rows_of(batch)
        cache = DynamicCache()
        cache.layers = [layer.fork(rows) for layer in self.layers]
        if self.held.in_place and not in_place:
            above = self.layers[self.prune_layer + 1 :]
            cache.layers[self.prune_layer + 1 :] = [PrunedLayer.fork(each, rows) for each in above]
        return cache, self.held.select_rows(rows)

    def rows_of(self, batch: int) -> torch.Tensor:
        """`(batch,)` row of this prefix that each row of a batch begins with.

        Raises:
            ValueError: for a number of rows that is no multiple of this prefix's.
        """
        if batch % self.batch_size:
            raise ValueError(
                f"a prefix of {self.batch_size} rows begins batches of a multiple of "
                f"{self.batch_size} rows, got {batch}: prefix.select_rows([...]) arranges its rows"
            )
        return torch.arange(self.batch_size).repeat_interleave(batch // self.batch_size)

    def visual_counts(self, batch: int) -> list[int]:
        """Visual tokens held of each row of a batch over this prefix."""
        tokens = self.held.tokens
        counts = [0] * len(self.held.states)
        for row, size in zip(self.held.item_rows, tokens.sizes, strict=True):
            counts[row] += size
        return [counts[row] for row in self.held.rows[self.rows_of(batch)].tolist()]

    def begun(self, batch: int) -> PrefixOrigin:
        """What each row of a batch over this prefix begins with."""
        return self.origin.select_rows(self.held.rows[self.rows_of(batch)].tolist())

    def prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Whole prompts as a batch over this prefix, padded between it and what is behind it.

        Args:
            input_ids: `(batch, length)`, padded on the left.
            attention_mask: `(batch, length)`, or None for all ones.

        Returns:
            `input_ids` and `attention_mask`, `(batch, prefix + longest rest)`.

        Raises:
            ValueError: when a prompt does not begin with the prefix, or is nothing else.
        """
        begun = self.begun(len(input_ids))
        return behind_prefix(begun.input_ids, begun.attention_mask, input_ids, attention_mask)

    def to(self, device: torch.device | str) -> "GlimpsePrefix":
        """This prefix with its tensors on a device. It works over any, moving what it needs."""
        tensors, notes = self.parts()
        return self.of_parts({name: each.to(device) for name, each in tensors.items()}, notes)

    def save(self, path: str | os.PathLike) -> None:
        """Write this prefix to a safetensors file, which the model's `load_prefix` reads."""
        write_parts(path, *self.parts())

    def parts(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What this prefix holds, as named tensors and notes that JSON can hold."""
        return to_parts(self.layers, self.held, self.origin)

    @classmethod
    def of_parts(cls, tensors: dict[str, torch.Tensor], notes: dict) -> "GlimpsePrefix":
        """The prefix of which these are the `parts`."""
        return cls(*of_parts(tensors, notes))

    def select_rows(self, rows: Sequence[int] | torch.Tensor) -> "GlimpsePrefix":
        """A prefix of some of these rows, in any order and as often as wanted; tensors are shared.

        Args:
            rows: numbers of rows of this prefix.
        """
        rows = torch.as_tensor(rows).cpu()
        layers = [layer.fork(rows) for layer in self.layers]
        return GlimpsePrefix(layers, self.held.select_rows(rows), self.origin)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `select_rows`, of this prefix itself, as for any cache."""
        self._become(self.select_rows(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, in this prefix itself, as for any cache."""
        self._become(self.select_rows(self.rows_of(repeats * self.batch_size)))

    def crop(self, *args, **kwargs) -> None:
        """Refused: what is held waits for the layers above, and is no end of a prompt.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a prefix cannot be cropped, as its visual tokens wait for a question: look again, "
            "with prefix_length for less of the prompt"
        )

    def reset(self) -> None:
        """Refused, as for `update`."""
        self._refuse_writing()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused, as for `update`."""
        self._refuse_writing()

    def update(self, *args, **kwargs):
        """Refused: a prefix is never written to.

        Raises:
            ValueError: always.
        """
        self._refuse_writing()

    def __deepcopy__(self, memo: dict) -> "GlimpsePrefix":
        return copy.copy(self)

    def __copy__(self) -> "GlimpsePrefix":
        return self.select_rows(range(self.batch_size))

    def _become(self, other: "GlimpsePrefix") -> None:
        self.layers, self.held = other.layers, other.held

    def _refuse_writing(self) -> None:
        raise ValueError(
            "a prefix is never written to: hand it to generate, forward or glimpse of the "
            "GlimpsePrune model that looked, which go on with a copy"
        )


def check_made_by(prefix: GlimpsePrefix, model: nn.Module) -> None:
    """Refuse a prefix of other weights or adapters.

    Args:
        model: the backbone that is to go on with it.

    Raises:
        ValueError: when they differ.
    """
    if prefix.origin.made_by != fingerprint(model):
        raise ValueError(
            "this prefix was made by another model, or by this one with other weights, another "
            "dtype or another adapter: look again with the model as it is now"
        )
