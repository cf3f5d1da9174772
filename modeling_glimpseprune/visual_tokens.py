"""Where a prompt's visual tokens are, and what the vision encoder knows of each."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .importance_predictor import TokenGroup, WindowedTokenGroup


@dataclass
class VisualFeatures(BaseModelOutputWithPooling):
    """Output of a vision encoder with what the predictor needs beside the embeddings.

    Attributes:
        pooler_output: one `(placeholders, hidden)` tensor an image.
        deepstack_features: for each view of the images in turn, one list a tapped vision layer,
            then one of geometries, then one of places; each list holds one `(tokens, width)` tensor
            an image. A place is the index of a visual token among its image's placeholders: those
            without one are never dropped. The name is the field that `generate` repeats together
            with the embeddings for beams and several returned sequences.
        views: what the views of an image are called, in prompt order; None for a single one.
    """

    deepstack_features: list[list[torch.Tensor]] | None = None
    views: tuple[str, ...] | None = None

    def by_view(self) -> list[list[list[torch.Tensor]]]:
        """The lists of each view."""
        count = len(self.deepstack_features) // len(self.views or (None,))
        lists = self.deepstack_features
        return [lists[start : start + count] for start in range(0, len(lists), count)]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """`(placeholders, visual tokens)` of each image."""
        places = zip(*(lists[-1] for lists in self.by_view()), strict=True)
        visual = (sum(map(len, of_image)) for of_image in places)
        return list(zip(map(len, self.pooler_output), visual, strict=True))


def whole_images(
    embeddings: list[torch.Tensor],
    layers: list[torch.Tensor],
    geometry: torch.Tensor,
    skipped: int = 0,
) -> VisualFeatures:
    """Features of images whose placeholders are visual tokens of one view.

    Args:
        embeddings: one `(skipped + tokens, hidden)` tensor an image.
        layers: one `(N, width)` tensor a tapped vision layer, image after image.
        geometry: `(N, 6)`, see `token_geometry`.
        skipped: placeholders at the start of each image that are no visual tokens.
    """
    sizes = [len(of_image) - skipped for of_image in embeddings]
    places = [torch.arange(size, device=geometry.device)[:, None] + skipped for size in sizes]
    split = [list(layer.split(sizes)) for layer in (*layers, geometry)]
    return VisualFeatures(pooler_output=list(embeddings), deepstack_features=[*split, places])


@contextmanager
def tap_outputs(
    modules: list[nn.Module], reduce: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor | None]]:
    """Collect what each module returns inside the context, in the order given.

    Only calls of the thread that opened the context are seen, so threads can share a model.

    Args:
        modules: the modules to listen to.
        reduce: what to keep of each output.
    """
    thread = threading.get_ident()
    outputs: list[torch.Tensor | None] = [None] * len(modules)

    def collect(index: int):
        def hook(module, args, output):
            if threading.get_ident() == thread:
                outputs[index] = reduce(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [module.register_forward_hook(collect(i)) for i, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def token_geometry(grids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Place every token in its image, without waiting for the device.

    Args:
        grids: `(images, 3)` frames, height and width of each image in tokens.
        sizes: tokens of each image, known on the host.

    Returns:
        `(N, 6)` frame, row and column of each token in raster order, then its image's grid.
    """
    device, total = grids.device, sum(sizes)
    repeats = torch.tensor(sizes, device=device)
    grid = grids.repeat_interleave(repeats, dim=0, output_size=total)
    starts = (repeats.cumsum(0) - repeats).repeat_interleave(repeats, output_size=total)
    offset = torch.arange(total, device=device) - starts
    height, width = grid[:, 1], grid[:, 2]
    frame, within = offset // (height * width), offset % (height * width)
    return torch.stack([frame, within // width, within % width, *grid.unbind(1)], dim=1)


@dataclass
class VisualTokens:
    """The visual tokens of a batch in prompt order, row after row.

    Attributes:
        rows, columns: `(N,)` where each token stands in the `(batch, length)` prompt.
        features: one `(N, width)` tensor a tapped vision layer.
        geometry: `(N, 6)`, see `token_geometry`.
        kinds: `"image"`, `"video"` or the name of a view, one an item.
        sizes: tokens of each item.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    features: list[torch.Tensor]
    geometry: torch.Tensor
    kinds: list[str]
    sizes: list[int]

    @property
    def total(self) -> int:
        return len(self.rows)

    def groups(self, window: int | None) -> list[TokenGroup]:
        """Which tokens attend to one another in the predictor: each frame by itself.

        Args:
            window: side of the attention windows in tokens, or None for whole frames.
        """
        frames = self._frames(need_grids=window is not None)
        groups: list[TokenGroup] = []
        for start, size, height, width in frames:
            last = groups[-1] if groups else None
            if window is not None:
                groups.append(WindowedTokenGroup(start, height, width, window))
            elif last is not None and last.size == size:
                last.count += 1
            else:
                groups.append(TokenGroup(start, size, 1))
        return groups

    def _frames(self, need_grids: bool) -> list[tuple[int, int, int, int]]:
        """`(start, size, height, width)` of each frame; images need no grid, nor a wait for it."""
        frames, start = [], 0
        for kind, size in zip(self.kinds, self.sizes, strict=True):
            grid = (1, 1, size)
            if need_grids or kind == "video":
                grid = self.geometry[start, 3:].tolist()
            count, height, width = grid
            per_frame = height * width
            frames += [(start + i * per_frame, per_frame, height, width) for i in range(count)]
            start += size
        return frames


def collect_visual_tokens(
    encoded: dict[str, VisualFeatures], masks: dict[str, torch.Tensor]
) -> VisualTokens:
    """Put the encoded images and videos of a batch into prompt order.

    Args:
        encoded: encoder outputs by kind.
        masks: `(batch, length)` bool by kind, True at the placeholders of that kind.
    """
    parts = [
        part for kind, features in encoded.items() for part in _parts(kind, features, masks[kind])
    ]
    positions = torch.cat([part.positions for part in parts])
    features = [torch.cat(layer) for layer in zip(*(part.features for part in parts), strict=True)]
    kinds = [kind for part in parts for kind in [part.kind] * len(part.sizes)]
    sizes = [size for part in parts for size in part.sizes]
    if len(parts) > 1:
        starts = torch.tensor([0, *accumulate(sizes[:-1])], device=positions.device)
        item_order = positions[starts].argsort().tolist()
        kinds, sizes = [kinds[i] for i in item_order], [sizes[i] for i in item_order]
        order = positions.argsort()
        positions, features = positions[order], [layer[order] for layer in features]
    length = next(iter(masks.values())).shape[1]
    *taps, geometry = features
    rows, columns = positions // length, positions % length
    return VisualTokens(rows, columns, taps, geometry, kinds, sizes)


@dataclass
class _Part:
    kind: str
    positions: torch.Tensor  # (n,) in the flattened prompt
    features: list[torch.Tensor]  # taps, then the geometry
    sizes: list[int]


def _parts(kind: str, encoded: VisualFeatures, mask: torch.Tensor) -> list[_Part]:
    """One part a view."""
    lengths = [len(embeddings) for embeddings in encoded.pooler_output]
    starts = [0, *accumulate(lengths)]
    first = (~mask.flatten()).to(torch.uint8).argsort(stable=True)  # placeholders first, in order
    parts = []
    for view, lists in zip(encoded.views or (kind,), encoded.by_view(), strict=True):
        *layers, places = lists
        sizes = [len(of_image) for of_image in places]
        of_batch = [place[:, 0] + start for place, start in zip(places, starts, strict=False)]
        positions = first[torch.cat(of_batch).to(mask.device)]
        features = [torch.cat(list(layer)).to(mask.device) for layer in layers]
        parts.append(_Part(view, positions, features, sizes))
    return parts
