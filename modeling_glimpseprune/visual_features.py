"""What a vision encoder returns: embeddings, and what the predictor needs to know of each token."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class ImageView:
    """One view of one image or video: visual tokens that attend to one another in the predictor.

    Attributes:
        taps: one `(tokens, width)` tensor a tapped vision layer.
        geometry: `(tokens, 6)`, see `token_geometry`.
        grid: `(3,)` its frames, height and width in tokens; a side may be 0.
        places: `(tokens,)` ascending index of each among its image's placeholders. Placeholders
            that no view names are no visual tokens: they are never dropped.
        name: what the view is called, or None for the only one of an image.
        encoded: `(tokens,)` bool, False at tokens that the encoder did not see, or None for all.
    """

    taps: list[torch.Tensor]
    geometry: torch.Tensor
    grid: torch.Tensor
    places: torch.Tensor
    name: str | None = None
    encoded: torch.Tensor | None = None


@dataclass
class VisualFeatures(BaseModelOutputWithPooling):
    """Output of a vision encoder with what the predictor needs beside the embeddings.

    Attributes:
        pooler_output: one `(placeholders, hidden)` tensor an image.
        deepstack_features: for each of the decoder's first layers what is added behind it, one
            `(placeholders, hidden)` tensor an image; None in most families.
        glimpse_views: for each image its views, in prompt order.
    """

    deepstack_features: list[Sequence[torch.Tensor]] | None = None
    glimpse_views: list[list[ImageView]] | None = None

    @classmethod
    def of(cls, fields: dict) -> "VisualFeatures":
        """Features with some of the fields, in the order in which they come."""
        features = cls()
        for name, value in fields.items():
            features[name] = value
        return features

    def without_views(self) -> "VisualFeatures":
        """The same without `glimpse_views`."""
        return self.of({name: self[name] for name in self if name != "glimpse_views"})

    def to_tuple(self) -> tuple:
        """The stock fields that hold something."""
        return tuple(self.without_views().values())

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """`(placeholders, visual tokens)` of each image."""
        visual = (sum(len(view.places) for view in views) for views in self.glimpse_views)
        return list(zip(map(len, self.pooler_output), visual, strict=True))

    def select(self, images: Sequence[int]) -> "VisualFeatures":
        """The features of some images, each as often as it is named."""
        added = self.deepstack_features
        if added is not None:
            added = [[layer[image] for image in images] for layer in added]
        return type(self)(
            pooler_output=[self.pooler_output[image] for image in images],
            deepstack_features=added,
            glimpse_views=self.glimpse_views and [self.glimpse_views[image] for image in images],
        )

    def repeat_rows(self, placeholders: list[int], repeats: int) -> "VisualFeatures":
        """The features of a batch whose rows are repeated, each row's images together.

        Args:
            placeholders: of each row.
            repeats: of each row.
        """
        images, selected = iter(enumerate(map(len, self.pooler_output))), []
        for remaining in placeholders:
            row = []
            while remaining > 0:
                image, size = next(images)
                row.append(image)
                remaining -= size
            selected += row * repeats
        return self.select(selected)


def described(kind: str, features: dict, prunes: bool = True) -> VisualFeatures:
    """Encoded visuals that a call gave, which need not come from our encoders.

    Args:
        kind: `"image"` or `"video"`.
        features: an output with a `pooler_output`.
        prunes: whether the call asks where visual tokens lie.

    Raises:
        ValueError: when they do not say it.
    """
    if isinstance(features, dict) and "glimpse_views" in features:
        return features
    if prunes:
        raise ValueError(
            f"mm_encoder_outputs[{kind!r}], a {type(features).__name__}, does not say where visual "
            f"tokens lie: give what this model's encode_visual({kind!r}, ...) returns, or use "
            "prune=False"
        )
    embeddings, added = features.pooler_output, getattr(features, "deepstack_features", None)
    if added is not None:
        sizes = [len(of_image) for of_image in embeddings]
        added = [torch.cat(list(layer)).view(sum(sizes), -1).split(sizes) for layer in added]
    return VisualFeatures(pooler_output=embeddings, deepstack_features=added)


def refuse_parts(encoded: dict) -> None:
    """Refuse encoded visuals that lack some of their tokens, which the stock decoder would see.

    Args:
        encoded: encoder outputs by kind, of any class.

    Raises:
        ValueError: naming the kind.
    """
    for kind, features in encoded.items():
        of_images = features.get("glimpse_views") if isinstance(features, dict) else None
        if any(view.encoded is not None for views in of_images or () for view in views):
            raise ValueError(
                f"mm_encoder_outputs[{kind!r}] lacks the patches that were left out in front of "
                "the encoder, and prune=False answers from all: encode them whole (encode_visual)"
            )


def whole_images(
    embeddings: Sequence[torch.Tensor],
    layers: list[torch.Tensor],
    geometry: torch.Tensor,
    grids: torch.Tensor,
    skipped: int = 0,
    encoded: torch.Tensor | None = None,
) -> VisualFeatures:
    """Features of images whose placeholders are visual tokens of one view.

    Args:
        embeddings: one `(skipped + tokens, hidden)` tensor an image.
        layers: one `(N, width)` tensor a tapped vision layer, image after image.
        geometry: `(N, 6)`, see `token_geometry`.
        grids: `(images, 3)` frames, height and width of each image in tokens.
        skipped: placeholders at the start of each image that are no visual tokens.
        encoded: `(N,)` bool, False at tokens that the encoder did not see, or None for all.
    """
    sizes = [len(of_image) - skipped for of_image in embeddings]
    taps = zip(*(layer.split(sizes) for layer in layers), strict=True)
    places = [torch.arange(size, device=geometry.device) + skipped for size in sizes]
    parts = zip(taps, geometry.split(sizes), grids, places, strict=True)
    views = [[ImageView(list(layers), *where)] for layers, *where in parts]
    if encoded is not None:
        for (view,), of_image in zip(views, encoded.split(sizes), strict=True):
            view.encoded = of_image
    return VisualFeatures(pooler_output=embeddings, glimpse_views=views)


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
