"""The images of a request: fetched from addresses that may be read, in the messages' place."""

import base64
import binascii
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from PIL import Image

from ..images import image_of

TEXT_PARTS = ("text", "input_text", "output_text")
LARGEST = 64 * 2**20  # bytes of an image file behind a URL
TIMEOUT = 10.0, 30.0  # seconds to wait for a connection, and for more of an image
SHOWN = 80  # characters of an address in a message


class ImageReader:
    """Reads data URLs, web addresses, and files of one folder, if any.

    Args:
        folder: of which local files may be read; None refuses all.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = None if folder is None else folder.resolve()

    def with_images(self, messages: object) -> list[dict]:
        """OpenAI messages whose images are RGB pictures instead of addresses.

        Raises:
            ValueError: when there are none or they are not formed as the protocol says, or for an
                image that may not or cannot be read.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list of at least one message")
        count = 0
        read = []
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"a message must be an object with a role, got {_shown(message)}")
            content = message.get("content")
            if not isinstance(content, (str, list, type(None))):
                raise ValueError(
                    f"content of a message must be text or a list of parts, got {_shown(content)}"
                )
            if isinstance(content, list):
                parts = []
                for part in content:
                    if (address := _address(part)) is not None:
                        part = {"type": "image_url", "image_url": self.read(address, count)}
                        count += 1
                    parts.append(part)
                message = message | {"content": parts}
            read.append(message)
        return read

    def read(self, address: str, number: int = 0) -> Image.Image:
        """The picture at an address, turned as its EXIF orientation says.

        Args:
            address: a `data:` or `http(s)://` URL, or a path or `file://` URL.
            number: of the image in its request, for messages.

        Raises:
            ValueError: saying why it may not or cannot be read.
        """
        try:
            return image_of(self._content(address), "sent")
        except Exception as error:  # whatever hostile bytes make Pillow raise
            raise ValueError(f"image {number} ({_shown(address)}): {error}") from error

    def _content(self, address: str) -> bytes:
        scheme = address[:8].lower()
        if scheme.startswith("data:"):
            return _data_of(address)
        if scheme.startswith(("http://", "https://")):
            return _fetched(address)
        return self._local_file(address).read_bytes()

    def _local_file(self, address: str) -> Path:
        if self.folder is None:
            raise ValueError(
                "local files are refused here: send a data URL or a web address, or start the "
                "server with --allow-local-files FOLDER"
            )
        if address.lower().startswith("file://"):
            address = unquote(urlsplit(address).path)
        path = (self.folder / address).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError("it lies outside of the folder that --allow-local-files names")
        if not path.is_file():
            raise ValueError("there is no such file")
        return path


def _address(part: object) -> str | None:
    """The address of a part that is an image; None for text.

    Raises:
        ValueError: for other parts.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return None
    if kind in ("image_url", "input_image"):
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        if isinstance(address, str):
            return address
    raise ValueError(
        'a part must be {"type": "text", "text": ...} or {"type": "image_url", "image_url": '
        f'{{"url": ...}}}}, got {_shown(part)}'
    )


def _data_of(address: str) -> bytes:
    head, _, data = address.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError("a data URL must begin with data:image/...;base64,")
    try:
        return base64.b64decode(unquote(data), validate=True)
    except binascii.Error as error:
        raise ValueError(f"what its data URL holds is not base64: {error}") from error


def _fetched(address: str) -> bytes:
    try:
        with requests.get(address, timeout=TIMEOUT, stream=True) as response:
            response.raise_for_status()
            content = bytearray()
            for piece in response.iter_content(2**20):
                content += piece
                if len(content) > LARGEST:
                    raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
            return bytes(content)
    except requests.RequestException as error:
        raise ValueError(f"it cannot be fetched: {error}") from error


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
