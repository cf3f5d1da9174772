"""Processors of GlimpsePrune models: the stock ones, with clear errors for bad images.

They also say how visual tokens lie on an image, which drawing and training need: how many
placeholders it takes, the grid of each of its views, and the part of it that the grids cover.
"""

from dataclasses import dataclass

from transformers import (
    BatchFeature,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.processing_utils import TextKwargs

from .prefix_processing import PrefixProcessingMixin
from .prompt_layout import padded_left  # noqa: F401  (transformers 4, see the models)

SANITIZES = "sanitize_control_tokens" in TextKwargs.__annotations__  # some releases do not


@dataclass
class ImageLayout:
    """The visual tokens of one processed image.

    Attributes:
        placeholders: image tokens it takes in the prompt.
        grids: `(rows, columns)` of visual tokens of each view, in prompt order.
    """

    placeholders: int
    grids: list[tuple[int, int]]


class CheckedProcessorMixin(PrefixProcessingMixin):
    """In front of a stock processor: images are checked before anything is computed."""

    def __call__(self, images=None, text=None, videos=None, prefix=None, **kwargs) -> BatchFeature:
        """Prepare prompts and images for the model, as the stock processor does.

        With a `prefix` that the model looked at, its images are not read again: see `over_prefix`.

        Images that are named (a URL, a path, a base64 string) are read once, and turned as their
        EXIF orientation says.

        Raises:
            ValueError: when an image has no pixels, or images and placeholders differ in number.
        """
        if prefix is not None:
            if videos is not None:
                raise ValueError("a prefix takes images behind it, no videos: give whole inputs")
            if text is None:
                raise ValueError("a prefix takes the text of whole prompts: give text")
            return self.over_prefix(prefix, text, images, **kwargs)
        if images is not None:
            images = read_images(images)
            flat_images = checked_images(images)
            # Where asked to, a stock processor tells placeholders from those that users wrote.
            sanitized = SANITIZES and kwargs.get("sanitize_control_tokens")
            if text is not None and not sanitized:
                check_placeholders(text, self.image_token, len(flat_images))
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def processed_images(self, images: object) -> BatchFeature:
        """The image processor's output of images, as `__call__` takes them."""
        return self.image_processor(checked_images(read_images(images)), return_tensors="pt")

    def image_layouts(self, images: BatchFeature) -> list[ImageLayout]:
        """The layout of each image in the image processor's output."""
        raise NotImplementedError

    def visible_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image that its token grids cover, `(x0, y0, x1, y1)` in its pixels.

        It reaches beyond the image where the image is padded.
        """
        return 0.0, 0.0, float(width), float(height)


class QwenProcessorMixin(CheckedProcessorMixin):
    """What Qwen's processors share: an image is one grid of merged patches."""

    def image_layouts(self, images: BatchFeature) -> list[ImageLayout]:
        merge = self.image_processor.merge_size
        patches = [map(int, grid) for grid in images["image_grid_thw"]]
        grids = [(height // merge, width // merge) for _, height, width in patches]
        return [ImageLayout(rows * columns, [(rows, columns)]) for rows, columns in grids]


class GlimpsePruneQwen2_5_VLProcessor(QwenProcessorMixin, Qwen2_5_VLProcessor):
    """The stock Qwen2.5-VL processor with checks."""


class GlimpsePruneQwen3VLProcessor(QwenProcessorMixin, Qwen3VLProcessor):
    """The stock Qwen3-VL processor with checks."""


class GlimpsePruneLlavaProcessor(CheckedProcessorMixin, LlavaProcessor):
    """The stock LLaVA processor with checks.

    As published it cuts the middle square out of an image, so visual tokens cover no more than
    that; with `do_pad` the image is padded to a square instead.
    """

    def image_layouts(self, images: BatchFeature) -> list[ImageLayout]:
        pixels = images["pixel_values"]
        rows, columns = (int(side) // self.patch_size for side in pixels.shape[-2:])
        others = self.num_additional_image_tokens  # the class token
        others -= self.vision_feature_select_strategy == "default"
        return [ImageLayout(rows * columns + others, [(rows, columns)]) for _ in pixels]

    def visible_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        settings = self.image_processor.to_dict()  # CLIP's processor knows no do_pad
        if settings.get("do_pad"):
            across = down = max(width, height)
        elif settings["do_center_crop"] and settings["size"].get("shortest_edge"):
            scale = min(width, height) / settings["size"]["shortest_edge"]
            across, down = (settings["crop_size"][side] * scale for side in ("width", "height"))
        else:
            return super().visible_box(width, height)
        left, top = (width - across) / 2, (height - down) / 2
        return left, top, left + across, top + down


class GlimpsePruneLlavaNextProcessor(CheckedProcessorMixin, LlavaNextProcessor):
    """The stock LLaVA-NeXT processor with checks; both views of an image cover it whole."""

    def image_layouts(self, images: BatchFeature) -> list[ImageLayout]:
        tile = images["pixel_values"][0].shape[-2:]
        sizes = [tuple(map(int, size)) for size in images["image_sizes"]]
        return [self._layout(*size, *(int(side) for side in tile)) for size in sizes]

    def _layout(self, height: int, width: int, tile_height: int, tile_width: int) -> ImageLayout:
        pinpoints = self.image_processor.image_grid_pinpoints
        best_height, best_width = select_best_resolution((height, width), pinpoints)
        base = tile_height // self.patch_size, tile_width // self.patch_size
        tiles = best_height // tile_height, best_width // tile_width
        visual, rows = self._get_unpadded_features(height, width, *base, *tiles)
        placeholders = base[0] * base[1] + visual + rows  # a newline token ends each row
        columns = visual // rows if rows else base[1] * tiles[1]
        return ImageLayout(placeholders, [base, (rows, columns)])


def read_images(images: object) -> object:
    """Read what is named in an image or nested lists of images; what is an image stays as it is."""
    if isinstance(images, (list, tuple)):
        return [read_images(image) for image in images]
    return load_image(images) if isinstance(images, str) else images


def checked_images(images: object) -> list:
    """One list of the images in nested ones.

    Raises:
        ValueError: for an image without pixels.
    """
    flat_images = make_flat_list_of_images(images)
    for index, image in enumerate(flat_images):
        check_has_pixels(image, index)
    return flat_images


def check_has_pixels(image: object, index: int) -> None:
    """Refuse an image of zero width or height.

    Raises:
        ValueError: naming the image and its size.
    """
    if hasattr(image, "getbands"):  # Pillow's
        if 0 in image.size:
            width, height = image.size
            raise ValueError(f"image {index} has no pixels: height {height}, width {width}")
    elif 0 in image.shape:
        raise ValueError(f"image {index} has no pixels: its shape is {tuple(image.shape)}")


def check_placeholders(text: str | list[str], image_token: str, num_images: int) -> None:
    """Refuse texts whose image placeholders do not match the images.

    Raises:
        ValueError: naming both numbers.
    """
    texts = [text] if isinstance(text, str) else text
    found = sum(part.count(image_token) for part in texts)
    if found != num_images:
        raise ValueError(
            f"the text holds {found} image placeholder(s) {image_token}, but {num_images} image(s) "
            "were given; use processor.apply_chat_template to write one for each image"
        )
