"""Image files as people see them: RGB, and turned as their EXIF orientation says.

Cameras store photos as their sensor lies and note beside them how to turn them. Every picture that
this package opens goes through here, so sizes and boxes are those of the turned picture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ORIENTATION = ExifTags.Base.Orientation
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns


class PictureSize(NamedTuple):
    """Width and height in pixels of the turned picture, and whether its file has them exchanged."""

    width: int
    height: int
    on_its_side: bool


def open_image(path: str | Path | BytesIO, max_pixels: int | None = None) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF orientation says.

    Args:
        path: of the file, or its content.
        max_pixels: larger images are refused before they are read.

    Raises:
        ValueError: naming the file, when there is none, it is not a readable image or too large.
    """
    with _opened(path) as image:
        _check_size(image, _name(path), max_pixels)
        return _upright(image)


def image_of(content: bytes, name: str, max_pixels: int | None = None) -> Image.Image:
    """Read the content of an image file as `open_image` does.

    Args:
        name: of the file, for messages.
        max_pixels: larger images are refused before they are read.

    Raises:
        ValueError: when it is not a readable image or too large.
    """
    with _readable(BytesIO(content), name) as image:
        _check_size(image, name, max_pixels)
        return _upright(image)


def picture_size(path: str | Path) -> PictureSize:
    """The size that `open_image` gives, read from the file's head.

    Raises:
        ValueError: naming the file, when there is none or it is not a readable image.
    """
    with _opened(path) as image:
        if image.format == "TIFF":
            image.load()  # whereupon Pillow turns it by itself
        try:
            on_its_side = image.getexif().get(ORIENTATION) in ON_ITS_SIDE
        except SyntaxError:
            on_its_side = False
        width, height = image.size[::-1] if on_its_side else image.size
        return PictureSize(width, height, on_its_side)


def _check_size(image: Image.Image, name: str, max_pixels: int | None) -> None:
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(
            f"the image {name} is too large: {image.width} x {image.height} pixels, "
            f"more than {max_pixels}"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
    except SyntaxError:  # damaged EXIF, which Pillow passes over in JPEG files
        pass
    return image.convert("RGB")


@contextmanager
def _opened(path: str | Path | BytesIO) -> Iterator[Image.Image]:
    if not isinstance(path, BytesIO) and not Path(path).is_file():
        raise ValueError(f"there is no image {path}")
    with _readable(path, _name(path)) as image:
        yield image


@contextmanager
def _readable(file: str | Path | BytesIO, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read the image {name}: it is no image file") from error
    except OSError as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error


def _name(path: str | Path | BytesIO) -> str:
    return "given as bytes" if isinstance(path, BytesIO) else str(path)
