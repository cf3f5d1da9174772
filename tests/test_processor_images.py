"""Processors take the images that the stock ones take, in every form, and read each once."""

import base64
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import FAMILIES, sees_videos
from PIL import ExifTags, Image
from qwen3_prompts import qwen3_processor
from test_llava import build_processor as build_llava_processor
from transformers import ProcessorMixin

from glimpseprune.tiny_world.vocabulary import build_processor as build_qwen_processor
from modeling_glimpseprune.processing_glimpseprune import SANITIZES

HEIGHT, WIDTH = 56, 84
SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def processors(family) -> tuple[ProcessorMixin, ProcessorMixin]:
    """A stock processor, and ours of the same parts."""
    if sees_videos(family):
        build = {"qwen2_5_vl": build_qwen_processor, "qwen3_vl": qwen3_processor}[family]
        stock, settings = build(), ("video_processor",)
    else:
        stock, settings = build_llava_processor(family), SETTINGS
    names = ("image_processor", "tokenizer", "chat_template", *settings)
    parts = {name: getattr(stock, name) for name in names}
    return stock, FAMILIES[family].family.processor_class(**parts)


def pixels(seed: int = 0, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def picture(seed: int = 0, channels: int = 3) -> Image.Image:
    return Image.fromarray(pixels(seed, channels))


def tensor(dtype: torch.dtype) -> torch.Tensor:
    values = torch.from_numpy(pixels()).permute(2, 0, 1).to(dtype)
    return values / 255 if dtype.is_floating_point else values


# What is given -> how many images it is.
FORMS: dict[str, tuple[Callable[[], object], int]] = {
    "picture": (picture, 1),
    "picture_with_alpha": (lambda: [picture(0, 4)], 1),
    "grey_picture_with_alpha": (lambda: [Image.fromarray(pixels()[..., 0]).convert("LA")], 1),
    "picture_with_palette": (lambda: [picture().convert("P")], 1),
    "array": (lambda: [pixels()], 1),
    "array_with_alpha": (lambda: [pixels(0, 4)], 1),
    "alpha_channels_first": (lambda: [pixels(0, 4).transpose(2, 0, 1)], 1),
    "grey_array": (lambda: [pixels(0, 1)], 1),
    "array_of_two_channels": (lambda: [pixels(0, 2)], 1),
    "array_without_channels": (lambda: [pixels()[..., 0]], 1),
    "floats": (lambda: [pixels().astype(np.float32) / 255], 1),
    "tensor": (lambda: [tensor(torch.uint8)], 1),
    "bfloat16": (lambda: [tensor(torch.bfloat16)], 1),
    "float16": (lambda: [tensor(torch.float16)], 1),
    "tensor_with_alpha": (lambda: [torch.from_numpy(pixels(0, 4))], 1),
    "batch_array": (lambda: np.stack([pixels(0), pixels(1)]), 2),
    "batch_tensor": (lambda: torch.stack([tensor(torch.uint8)] * 3), 3),
    "nested": (lambda: [[picture(0)], [picture(1)]], 2),
    "unlike_sizes": (lambda: [pixels(), picture(2).resize((56, 56))], 2),
    "nothing_of_the_kind": (lambda: [7], 1),
}


def process(processor: ProcessorMixin, images: object, count: int) -> dict | type:
    """What comes of images, or the kind of error."""
    text = " and ".join([processor.image_token] * count)
    try:
        return dict(processor(images=images, text=text, return_tensors="pt"))
    except Exception as error:
        return type(error)


def assert_same(ours: dict, stock: dict) -> None:
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("form", FORMS)
def test_what_stock_takes_is_taken(processors, form):
    make, count = FORMS[form]
    stock, ours = (process(processor, make(), count) for processor in processors)
    if isinstance(stock, dict):
        assert isinstance(ours, dict), f"{form} is refused with {ours}"
        assert_same(ours, stock)
    else:
        assert not isinstance(ours, dict), f"{form} is taken where stock raises {stock}"


class Pages:
    """A server of one picture that counts how often it was asked; a ticket admits one visitor."""

    def __init__(self, content: bytes):
        self.asked = 0
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                pages.asked += 1
                self.send_response(200 if pages.asked == 1 else 410)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/page.png"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def pages() -> Iterator[Pages]:
    pages = Pages(as_png(picture()))
    yield pages
    pages.server.shutdown()
    pages.server.server_close()


def as_png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_names_of_images(processors, tmp_path):
    """Paths and base64 strings, alone, in lists and beside pictures."""
    path = tmp_path / "page.png"
    path.write_bytes(as_png(picture()))
    written = base64.b64encode(as_png(picture())).decode()
    for named in (str(path), written, f"data:image/png;base64,{written}"):
        for images, given, count in (
            (named, picture(), 1),
            ([[named], [picture(1)]], [[picture()], [picture(1)]], 2),
        ):
            expected = process(processors[0], given, count)
            ours = process(processors[1], images, count)
            assert isinstance(expected, dict)
            assert_same(ours, expected)


@pytest.mark.parametrize("way", ["processor", "chat template"])
def test_an_address_is_asked_once(processors, pages, way):
    processor = processors[1]
    if way == "processor":
        inputs = process(processor, [pages.address], 1)
    else:
        content = [{"type": "image", "url": pages.address}, {"type": "text", "text": "What?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
    assert pages.asked == 1
    expected = process(processors[0], [picture()], 1)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_a_named_photo_is_turned(processors, tmp_path):
    """On every release, also where the stock loader of a release leaves it on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # what is stored is to be turned clockwise
    path = tmp_path / "photo.png"
    picture().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    turned = process(processors[1], [str(path)], 1)
    assert_same(turned, process(processors[0], [picture()], 1))


def test_a_name_that_leads_nowhere(processors, tmp_path):
    with pytest.raises(ValueError, match="absent.png"):
        processors[1](images=[str(tmp_path / "absent.png")], text=processors[1].image_token)


def test_a_question_may_name_the_placeholder(processors):
    """`sanitize_control_tokens` makes plain text of what users write, where a release knows it."""

    def ask(processor: ProcessorMixin) -> dict:
        question = {"type": "text", "text": f"What is {processor.image_token}?"}
        content = [{"type": "image", "image": picture()}, question]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt", sanitize_control_tokens=True,
        )  # fmt: skip
        return dict(inputs)

    if not SANITIZES:
        with pytest.raises(ValueError, match="2 image placeholder.*1 image"):
            ask(processors[1])
        return
    for processor in processors:  # a template must write special tokens itself
        processor.chat_template = processor.chat_template.replace("USER:", "<s>USER:")
    assert_same(ask(processors[1]), ask(processors[0]))
