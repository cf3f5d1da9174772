"""A cache layer over keys and values that others read, too: it copies when it writes."""

import torch
from transformers.cache_utils import Cache, DynamicCache

from .pruned_cache import PrunedLayer, adopt_layers


class SharedLayer(PrunedLayer):
    """A `PrunedLayer` whose first slots are held elsewhere and shared.

    New keys and values are its own. The two are put together for one layer at a time, where they
    are read, so many questions over one prefix hold no more than their own tokens. As soon as
    anything else is written, everything is its own.

    Args:
        keys, values: `(held rows, heads, slots, head_dim)`, which are never written to.
        rows: `(batch,)` on the host, the held row that each row of the batch begins with.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.rows, self.is_initialized = rows, True
        self.dtype, self.device = keys.dtype, keys.device
        self._held: list[torch.Tensor | None] = [keys, values]
        self._own: list[torch.Tensor | None] = [
            part.new_empty(len(rows), part.shape[1], 0, part.shape[3]) for part in (keys, values)
        ]

    @property
    def held(self) -> tuple[torch.Tensor | None, ...]:
        """The shared keys and values; None where the layer has its own by now."""
        return tuple(self._held)

    @property
    def keys(self) -> torch.Tensor | None:
        return self._joined(0)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._write(0, keys)

    @property
    def values(self) -> torch.Tensor | None:
        return self._joined(1)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._write(1, values)

    @property
    def physical_length(self) -> int:
        parts = (part for part in (self._held[1], self._own[1]) if part is not None)
        return sum(part.shape[2] for part in parts if part.numel())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for which, new in enumerate((key_states, value_states)):
            self._own[which] = torch.cat([self._own[which].to(new), new], dim=-2)
        return self.keys, self.values

    def keep(self, index: torch.Tensor) -> None:
        """As `PrunedLayer.keep`; gathers from what is held and what is its own by themselves."""
        if None in self.held:
            super().keep(index)
            return
        slots, rows = self._held[0].shape[2], self.rows[:, None]
        for which, (held, own) in enumerate(zip(self._held, self._own, strict=True)):
            of_held = index.clamp(max=slots - 1).to(held.device)
            kept = held.transpose(1, 2)[rows.to(held.device), of_held].transpose(1, 2).to(own)
            if own.shape[2]:
                place = index[:, None, :, None].to(own.device)
                behind = own.take_along_dim((place - slots).clamp(min=0), dim=2)
                kept = torch.where(place < slots, kept, behind)
            self._write(which, kept)

    def fork(self, rows: torch.Tensor) -> PrunedLayer:
        """The layer in another batch, each row of which is one of these."""
        forked = SharedLayer(*self.held, self.rows[rows])
        forked.take_marks(self, rows)
        return forked

    def _joined(self, which: int) -> torch.Tensor | None:
        held, own = self._held[which], self._own[which]
        if held is None:
            return own
        if len(held) == 1:
            held = held.expand(len(self.rows), -1, -1, -1)
        elif not torch.equal(self.rows, torch.arange(len(held))):
            held = held.index_select(0, self.rows.to(held.device))
        return torch.cat([held.to(own), own], dim=2) if own.shape[2] else held.to(own)

    def _write(self, which: int, part: torch.Tensor | None) -> None:
        """Let one half be the layer's own. The stock constructor writes before there are any."""
        if "_own" in self.__dict__:
            self._held[which], self._own[which] = None, part


def shared_cache(cache: Cache | None) -> DynamicCache | None:
    """A cache to write to that shares what another one holds, which is left as it is.

    Raises:
        ValueError: for layers that cannot be pruned.
    """
    if cache is None:
        return None
    shared = DynamicCache()
    shared.layers = list(cache.layers)
    adopt_layers(shared, len(cache.layers))
    shared.layers = [_share(layer) for layer in shared.layers]
    for name in ("rope_deltas", "follows_turn", "placeholders"):
        if hasattr(cache, name):
            setattr(shared, name, getattr(cache, name))
    return shared


def _share(layer: PrunedLayer) -> PrunedLayer:
    shared = PrunedLayer()
    if layer.is_initialized and layer.physical_length:
        keys, values = layer.keys, layer.values
        shared = SharedLayer(keys, values, torch.arange(len(keys)))
    shared.take_marks(layer)
    return shared
