"""Where a prompt's visual tokens are, and what the vision encoder knows of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from .importance_predictor import TokenGroup, WindowedTokenGroup
from .visual_features import ImageView, VisualFeatures


@dataclass
class VisualTokens:
    """The visual tokens of a batch in prompt order, row after row.

    Attributes:
        rows, columns: `(N,)` where each token stands in the `(batch, length)` prompt.
        features: one tensor a tapped vision layer, `(N, width)`, or fewer rows with an index; what
            the vision encoder's layers returned, or the conditions that the predictor makes of it.
        geometry: `(N, 6)`, see `token_geometry`.
        kinds: `"image"`, `"video"` or the name of a view, one an item.
        sizes: tokens of each item; a view may have none.
        item_rows: `(items,)` row of the batch of each.
        grids: `(items, 3)` frames, height and width of each, in tokens.
        feature_index: `(N,)` which of the features each token has, or None for one each. So rows
            that ask about one image share its features.
        encoded: `(N,)` bool, False at tokens that the vision encoder did not see, or None for all.
        whole: of `seen_by_encoder`: all tokens, in the caller's columns.
        places: of `seen_by_encoder`: `(N,)` index of each among all.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    features: list[torch.Tensor]
    geometry: torch.Tensor
    kinds: list[str]
    sizes: list[int]
    item_rows: torch.Tensor
    grids: torch.Tensor
    feature_index: torch.Tensor | None = None
    encoded: torch.Tensor | None = None
    whole: "VisualTokens | None" = None
    places: torch.Tensor | None = None

    @property
    def total(self) -> int:
        return len(self.rows)

    def moved_by(self, shift: torch.Tensor) -> "VisualTokens":
        """The same tokens in rows that were moved to the right, each by `(batch,)` columns."""
        return replace(self, columns=self.columns + shift.to(self.columns.device)[self.rows])

    def select_rows(self, rows: Sequence[int], item_rows: Sequence[int]) -> "VisualTokens":
        """The tokens of another batch, each row of which is one of these.

        Args:
            rows: of these tokens, for each row of the other batch.
            item_rows: `item_rows` on the host.
        """
        ends = list(accumulate(self.sizes))
        spans = [torch.arange(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]
        chosen = [
            (place, item)
            for place, row in enumerate(rows)
            for item, of_item in enumerate(item_rows)
            if of_item == row
        ]
        device, items = self.rows.device, [item for _, item in chosen]
        sizes = [self.sizes[item] for item in items]
        index = torch.cat([spans[item] for item in items]).to(device)
        new_rows = torch.tensor([place for place, _ in chosen])
        return self._picked(index, items)._in_rows(new_rows.to(device), sizes)

    def followed_by(self, own: "VisualTokens", sort: bool) -> "VisualTokens":
        """These tokens and others of the same rows behind them.

        Args:
            sort: whether there are several rows, whose tokens have to be brought together.
        """
        count = len(self.features[0]) if self.features else 0
        index = torch.arange(own.total, device=own.rows.device) + count
        mine = self.feature_index
        if mine is None:
            mine = torch.arange(self.total, device=self.rows.device)
        both = VisualTokens(
            *(_cat(getattr(self, name), getattr(own, name)) for name in ("rows", "columns")),
            [_cat(*layers) for layers in zip(self.features, own.features, strict=True)],
            _cat(self.geometry, own.geometry),
            self.kinds + own.kinds,
            self.sizes + own.sizes,
            _cat(self.item_rows, own.item_rows),
            _cat(self.grids, own.grids),
            _cat(mine, index),
            self._encoded_with(own),
        )
        if not sort:
            return both
        item_rows = both.item_rows.tolist()
        items = sorted(range(len(item_rows)), key=item_rows.__getitem__)
        return both._picked(both.rows.argsort(stable=True), items)

    def seen_by_encoder(self) -> "VisualTokens":
        """Those that the vision encoder saw; `whole` and `places` say of which."""
        if self.encoded is None:
            return self
        places = self.encoded.nonzero()[:, 0]
        seen = self.encoded.split(self.sizes)
        sizes = torch.stack([part.sum() for part in seen]).tolist()
        items = list(range(len(sizes)))
        chosen = replace(self._picked(places, items), sizes=sizes)
        return replace(chosen, encoded=None, whole=self, places=places)

    def rows_left_out(self, batch: int) -> torch.Tensor:
        """`(batch,)` bool, True at rows of which the vision encoder did not see some."""
        rows = self.rows.new_zeros(batch, dtype=torch.bool)
        if self.encoded is not None:
            rows[self.rows[~self.encoded]] = True
        return rows

    def _encoded_with(self, own: "VisualTokens") -> torch.Tensor | None:
        if self.encoded is None and own.encoded is None:
            return None
        return _cat(
            *(
                torch.ones_like(each.rows, dtype=torch.bool)
                if each.encoded is None
                else each.encoded
                for each in (self, own)
            )
        )

    def parts(self, limit: int) -> Iterator["VisualTokens"]:
        """The tokens in order, a few whole items at a time.

        Args:
            limit: tokens of a part, unless a single item has more.
        """
        first, start, count = 0, 0, 0
        for item, size in enumerate([*self.sizes, limit]):
            if count and count + size > limit:
                index = torch.arange(start, start + count, device=self.rows.device)
                yield self._picked(index, list(range(first, item)))
                first, start, count = item, start + count, 0
            count += size

    def of_each(self, layer: torch.Tensor) -> torch.Tensor:
        """One of the features, `(N, width)`."""
        if self.feature_index is None:
            return layer
        return layer[self.feature_index.to(layer.device)]

    def _picked(self, index: torch.Tensor, items: list[int]) -> "VisualTokens":
        """Some of the tokens, and the items they are of."""
        places = torch.tensor(items, device=self.item_rows.device)
        return replace(
            self,
            rows=self.rows[index],
            columns=self.columns[index],
            geometry=self.geometry[index],
            kinds=[self.kinds[item] for item in items],
            sizes=[self.sizes[item] for item in items],
            item_rows=self.item_rows[places],
            grids=self.grids[places.to(self.grids.device)],
            feature_index=index if self.feature_index is None else self.feature_index[index],
            encoded=None if self.encoded is None else self.encoded[index],
        )

    def _in_rows(self, item_rows: torch.Tensor, sizes: list[int]) -> "VisualTokens":
        repeats = torch.tensor(sizes, device=item_rows.device)
        rows = item_rows.repeat_interleave(repeats, output_size=sum(sizes))
        return replace(self, rows=rows, item_rows=item_rows)

    def groups(self, window: int | None) -> list[TokenGroup]:
        """Which tokens attend to one another in the predictor: each frame by itself.

        Args:
            window: side of the attention windows in tokens, or None for whole frames.
        """
        groups: list[TokenGroup] = []
        if window is not None:
            places = self.geometry[:, 1:3].cpu()
            frames = [(start, size) for start, size in self._frames() if size]
            return [
                WindowedTokenGroup(start, places[start : start + size], window)
                for start, size in frames
            ]
        for start, size in self._frames():
            last = groups[-1] if groups else None
            if size == 0:
                continue
            if last is not None and last.size == size:
                last.count += 1
            else:
                groups.append(TokenGroup(start, size, 1))
        return groups

    def _frames(self) -> list[tuple[int, int]]:
        """`(start, size)` of each frame; images without videos need no wait for the device."""
        starts = [0, *accumulate(self.sizes)][:-1]
        if "video" not in self.kinds:
            return list(zip(starts, self.sizes, strict=True))
        frames, of_token = [], self.geometry[:, 0].cpu()
        for start, size in zip(starts, self.sizes, strict=True):
            of_item = of_token[start : start + size]
            for count in of_item.unique_consecutive(return_counts=True)[1].tolist():
                frames.append((start, count))
                start += count
        return frames


def collect_visual_tokens(
    encoded: dict[str, VisualFeatures], masks: dict[str, torch.Tensor]
) -> VisualTokens:
    """Put the encoded images and videos of a batch into prompt order.

    Args:
        encoded: encoder outputs by kind.
        masks: `(batch, length)` bool by kind, True at the placeholders of that kind.
    """
    images = [
        image
        for kind, features in encoded.items()
        for image in _images(kind, features, masks[kind])
    ]
    if len(encoded) > 1:
        order = torch.stack([image.placeholders[0] for image in images]).argsort().tolist()
        images = [images[i] for i in order]
    views = [(image, view) for image in images for view in image.views]
    positions = torch.cat(
        [image.placeholders[view.places.to(image.placeholders.device)] for image, view in views]
    )
    layers = zip(*(view.taps for _, view in views), strict=True)
    length, device = next(iter(masks.values())).shape[1], positions.device
    return VisualTokens(
        rows=positions // length,
        columns=positions % length,
        features=[torch.cat(layer).to(device) for layer in layers],
        geometry=torch.cat([view.geometry for _, view in views]).to(device),
        kinds=[view.name or image.kind for image, view in views],
        sizes=[len(view.places) for _, view in views],
        item_rows=torch.stack([image.placeholders[0] // length for image, _ in views]),
        grids=torch.stack([view.grid for _, view in views]).to(device),
        encoded=_encoded([view for _, view in views], device),
    )


def _cat(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, second.to(first.device)])


def _encoded(views: list[ImageView], device: torch.device) -> torch.Tensor | None:
    """Which tokens were encoded, or None where all were."""
    if all(view.encoded is None for view in views):
        return None
    flags = [
        torch.ones_like(view.places, dtype=torch.bool) if view.encoded is None else view.encoded
        for view in views
    ]
    return torch.cat([each.to(device) for each in flags])


@dataclass
class _Image:
    kind: str
    placeholders: torch.Tensor  # where they stand in the flattened prompt
    views: list[ImageView]


def _images(kind: str, encoded: VisualFeatures, mask: torch.Tensor) -> list[_Image]:
    lengths = [len(embeddings) for embeddings in encoded.pooler_output]
    first = (~mask.flatten()).to(torch.uint8).argsort(stable=True)  # placeholders first, in order
    ends = list(accumulate(lengths))
    return [
        _Image(kind, first[end - length : end], views)
        for length, end, views in zip(lengths, ends, encoded.glimpse_views, strict=True)
    ]
