"""Processors of GlimpsePrune models: the stock ones, with clear errors for bad images."""

from transformers import BatchFeature, Qwen2_5_VLProcessor
from transformers.image_utils import get_image_size, make_flat_list_of_images, to_numpy_array


class GlimpsePruneQwen2_5_VLProcessor(Qwen2_5_VLProcessor):
    """The stock Qwen2.5-VL processor; images are checked before anything is computed."""

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """Prepare prompts and images for the model, as the stock processor does.

        Raises:
            ValueError: when an image has no pixels, or images and placeholders differ in number.
        """
        if images is not None:
            flat_images = make_flat_list_of_images(self.image_processor.fetch_images(images))
            for index, image in enumerate(flat_images):
                check_has_pixels(image, index)
            if text is not None:
                check_placeholders(text, self.image_token, len(flat_images))
        return super().__call__(images=images, text=text, videos=videos, **kwargs)


def check_has_pixels(image: object, index: int) -> None:
    """Refuse an image of zero width or height.

    Raises:
        ValueError: naming the image and its size.
    """
    size = image.size[::-1] if hasattr(image, "getbands") else get_image_size(to_numpy_array(image))
    if 0 in size:
        raise ValueError(f"image {index} has no pixels: height {size[0]}, width {size[1]}")


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
