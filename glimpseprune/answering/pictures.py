"""Images that rows name: files, URLs, data URLs and bytes."""

import base64
from io import BytesIO
from time import sleep

import requests
from PIL import Image

from ..images import open_image

SECONDS_TO_CONNECT, SECONDS_BETWEEN_BYTES, TRIES = 10, 30, 3
MOST_BYTES = 1 << 28  # of an image that is fetched
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # beyond which Pillow warns


def read_picture(image: str | bytes, max_pixels: int) -> Image.Image:
    """Read an image as `open_image` does.

    Args:
        image: a path, a URL, a data URL, or the bytes of an image file.
        max_pixels: the most that are read.

    Raises:
        ValueError: when it cannot be read or is too large.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        image = fetch(image)
    elif isinstance(image, str) and image.startswith("data:"):
        head, _, content = image.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"a data URL of an image has to be base64, got {head!r:.80}")
        image = base64.b64decode(content, validate=True)
    return open_image(BytesIO(image) if isinstance(image, bytes) else image, max_pixels)


def fetch(url: str) -> bytes:
    """The content of a URL, tried a few times.

    Raises:
        ValueError: when it cannot be fetched.
    """
    for attempt in range(TRIES):
        sleep(attempt**2)
        try:
            with requests.get(
                url, stream=True, timeout=(SECONDS_TO_CONNECT, SECONDS_BETWEEN_BYTES)
            ) as response:
                if 400 <= response.status_code < 500 and response.status_code != 429:
                    raise ValueError(f"cannot fetch {url}: status {response.status_code}")
                response.raise_for_status()
                content = bytearray()
                for part in response.iter_content(1 << 16):
                    content += part
                    if len(content) > MOST_BYTES:
                        raise ValueError(
                            f"cannot fetch {url}: it is larger than {MOST_BYTES} bytes"
                        )
                return bytes(content)
        except requests.RequestException as error:
            problem = error
    raise ValueError(f"cannot fetch {url}: {problem}")
