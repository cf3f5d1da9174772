"""A cache layer that is compact inside and logical outside.

After pruning, a layer holds keys and values of kept tokens only, but everything that counts
positions from the cache (new positions, slicing of ids on a later turn, cropping in assisted
decoding) must go on seeing the prompt's full length. So the layer reports the logical length, and
tells the mask functions its physical length and the difference as an offset, as transformers' own
sliding-window layer does.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .stock import QUANTIZED_LAYER, number_of_tokens

# What a layer knows of its prompt: in all, and for each row.
MARKS = ("dropped", "prompt_slots", "fixed_slots")
ROW_MARKS = ("prompt_mask", "prompt_columns", "position_delta", "lacks_patches")


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` from which prompt tokens were dropped.

    Rows of a batch keep different numbers of tokens; they are packed to the right, and
    `prompt_mask` remembers which of the first slots are real.

    Attributes:
        keys, values: `(batch, heads, physical_length, head_dim)`.
        dropped: logical length minus physical length.
        prompt_slots: physical slots that the pruned prompt takes.
        fixed_slots: those up to its last visual token, which cannot be cropped.
        prompt_mask: `(batch, prompt_slots)` bool, True at real tokens, or None when all are.
        prompt_columns: `(batch, prompt_slots)` the logical position of each of the prompt's slots,
            for laying attentions out; on the cache's first layer only.
        position_delta: `(batch, 1)`, the next token's rotary position minus the logical length, or
            None before the first pruning.
        lacks_patches: `(batch,)` bool, True where visual tokens of this prompt or of an earlier
            turn were left out in front of the vision encoder, or None where none was.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._forget_pruning()

    def _forget_pruning(self) -> None:
        self.dropped = 0
        self.prompt_slots = 0
        self.fixed_slots = 0
        self.prompt_mask: torch.Tensor | None = None
        self.prompt_columns: torch.Tensor | None = None
        self.position_delta: torch.Tensor | None = None
        self.lacks_patches: torch.Tensor | None = None

    @property
    def physical_length(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self, *args, **kwargs) -> int:
        """The logical length, pruned tokens counted."""
        return self.physical_length + self.dropped

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        """`(physical length with the new tokens, offset of the first slot)`.

        Args:
            query: the new tokens, see `number_of_tokens`.
        """
        return self.physical_length + number_of_tokens(query), self.dropped

    def crop(self, length: int) -> None:
        """Remove tokens from the end.

        Args:
            length: minus the number of tokens to remove, or the logical length to keep.

        Raises:
            ValueError: when the cut would reach the prompt's visual tokens.
        """
        remove = -length if length <= 0 else self.get_seq_length() - length
        if remove <= 0:
            return
        kept = self.physical_length - remove
        if kept < self.fixed_slots:
            raise ValueError(
                f"cannot remove {remove} tokens: the cut would reach the prompt's visual tokens, "
                "some of which are gone; keep the prompt or start again without the cache"
            )
        self.prompt_slots = min(self.prompt_slots, kept)
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask[:, : self.prompt_slots]
        if self.prompt_columns is not None:
            self.prompt_columns = self.prompt_columns[:, : self.prompt_slots]
        self.keys = self.keys[..., :kept, :]
        self.values = self.values[..., :kept, :]

    def reset(self) -> None:
        super().reset()
        self._forget_pruning()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices, ...])

    def fork(self, rows: torch.Tensor) -> "PrunedLayer":
        """A layer without keys and values in another batch, each row of which is one of these."""
        forked = PrunedLayer()
        forked.take_marks(self, rows)
        return forked

    def take_marks(self, layer: "PrunedLayer", rows: torch.Tensor | None = None) -> None:
        """Know of the prompt what another layer knows.

        Args:
            rows: `(batch,)` of the other layer, or None for all.
        """
        for name in (*MARKS, *ROW_MARKS):
            setattr(self, name, getattr(layer, name))
        if rows is not None:
            self._map_rows(lambda marks: marks[rows.to(marks.device)])

    def _map_rows(self, function) -> None:
        for name in ROW_MARKS:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, function(rows))

    def note_left_out(self, rows: torch.Tensor) -> None:
        """Remember rows, `(batch,)` bool, that lack patches, beside those of earlier turns."""
        before = self.lacks_patches
        self.lacks_patches = rows if before is None else before.to(rows.device) | rows

    def seal(self) -> None:
        """Hear that the prompt is compact: from here on the layer only grows."""

    def keep(self, index: torch.Tensor) -> None:
        """Keep only the given slots, freeing the rest.

        An offloaded layer is gathered on the device of the index, where its next update puts it.

        Args:
            index: `(batch, slots)` physical slots in the order to keep them.
        """
        if self.keys.device.type == "cpu" != index.device.type:
            self.prefetch()
        index = index[:, None, :, None].to(self.keys.device)
        self.keys = self.keys.take_along_dim(index, dim=2)
        self.values = self.values.take_along_dim(index, dim=2)


class PrunedQuantizedLayer(PrunedLayer):
    """A pruned layer that hands a compact prompt to a quantized layer, and what follows.

    Quantized tokens cannot be gathered, so a prompt is held as it is until it is compact.

    Attributes:
        store: transformers' quantized layer.
    """

    is_croppable = False  # asked before assisted decoding on newer releases

    def __init__(self, store: DynamicLayer):
        super().__init__()
        self.store = store

    @property
    def is_sealed(self) -> bool:
        return self.store.get_seq_length() > 0

    @property
    def physical_length(self) -> int:
        return self.store.get_seq_length() + super().physical_length

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.store if self.is_sealed else super()).update(*args, **kwargs)

    def seal(self) -> None:
        self.store.update(self.keys, self.values)
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]

    def crop(self, length: int) -> None:
        if length < 0 or length < self.get_seq_length():
            self._refuse_if_sealed("cropped")
        super().crop(length)

    def reset(self) -> None:
        super().reset()
        self.store.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_sealed:
            self.store.reorder_cache(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse_if_sealed("repeated")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._refuse_if_sealed("taken apart")
        super().batch_select_indices(indices)

    def _refuse_if_sealed(self, what: str) -> None:
        if self.is_sealed:
            raise ValueError(f"a quantized cache cannot be {what}: use the default DynamicCache")


def adopt_layers(cache: Cache, num_layers: int) -> None:
    """Give a cache `num_layers` layers that can be pruned; what they hold stays.

    Raises:
        ValueError: when the layers are neither `DynamicLayer`s nor empty quantized ones.
    """
    layers = list(cache.layers)
    layers += [DynamicLayer() for _ in range(num_layers - len(layers))]
    cache.layers = [_adopt(layer) for layer in layers]


def _adopt(layer: DynamicLayer) -> PrunedLayer:
    if isinstance(layer, QUANTIZED_LAYER) and not layer.get_seq_length():
        return PrunedQuantizedLayer(layer)
    if isinstance(layer, PrunedLayer) and not getattr(layer, "is_sealed", False):
        return layer
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"visual tokens cannot be pruned from a cache of {type(layer).__name__}s: use the "
            "default DynamicCache, or prune=False"
        )
    pruned = PrunedLayer()
    pruned.__dict__.update(layer.__dict__)
    return pruned


def pruned_layer(cache: object) -> PrunedLayer | None:
    """The first layer of a cache from which tokens were dropped; None for any other cache."""
    if not isinstance(cache, Cache) or not getattr(cache, "layers", None):
        return None
    layer = cache.layers[0]
    return layer if isinstance(layer, PrunedLayer) and layer.prompt_slots else None


def slot_columns(layer: PrunedLayer, num_slots: int, device: torch.device) -> torch.Tensor:
    """Where the caller sees each of a layer's first slots.

    Args:
        layer: the cache's first layer.

    Returns:
        `(batch or 1, num_slots)` logical positions.
    """
    if layer.prompt_columns is None:
        return torch.arange(num_slots, device=device)[None]
    columns = layer.prompt_columns.to(device)
    later = torch.arange(layer.prompt_slots, num_slots, device=device) + layer.dropped
    return torch.cat([columns, later.expand(len(columns), -1)], dim=1)


def slot_mask(
    layer: PrunedLayer, attention_mask: torch.Tensor | None, num_new_tokens: int
) -> torch.Tensor | None:
    """Line a caller's attention mask up with the slots of a pruned layer.

    Args:
        layer: the cache's first layer.
        attention_mask: `(batch, logical length + new tokens)`, or None for all ones.
        num_new_tokens: tokens about to be added.

    Returns:
        A mask of the same shape whose last `physical length + new tokens` columns belong to the
        slots and the new tokens; mask functions skip the `dropped` columns before. None for all
        ones.
    """
    if layer.prompt_mask is None:
        return attention_mask
    prompt_mask = layer.prompt_mask
    if attention_mask is None:
        length = layer.get_seq_length() + num_new_tokens
        attention_mask = prompt_mask.new_ones(prompt_mask.shape[0], length)
    skipped = attention_mask.new_zeros(prompt_mask.shape[0], layer.dropped)
    later = attention_mask[:, layer.dropped + layer.prompt_slots :]
    return torch.cat([skipped, prompt_mask.to(attention_mask), later], dim=1)
