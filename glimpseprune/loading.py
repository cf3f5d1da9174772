"""Loading a GlimpsePrune repository as its users do; by default the tiny one that comes along."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from .hub.remote_code import with_code
from .package_files import TINY_MODEL

REPOSITORY = Path(__file__).resolve().parents[1]  # of a clone


def tiny_repository() -> Path:
    """The folder of the tiny model that comes along, complete wherever the package was installed.

    Raises:
        OSError: when its code has to be put into a cache that cannot be written.
    """
    return with_code(TINY_MODEL)


def load_model(
    path: str | Path | None = None,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load model and processor with the automatic classes of the installed transformers.

    Args:
        path: a folder or a Hub repository; None for the tiny one.
        device: where to put the model; default: a GPU if there is one.
        dtype: as `from_pretrained` takes it. On a CPU, "auto" means float32.

    Raises:
        OSError: when there is no such model.
    """
    path = path or tiny_repository()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto" and device == "cpu":
        dtype = torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        str(path), trust_remote_code=True, dtype=dtype
    )
    return model.to(device).eval(), load_processor(path)


def load_processor(path: str | Path) -> ProcessorMixin:
    """The processor of a folder or a Hub repository, which pads prompts on the left.

    Raises:
        OSError: when there is no such repository.
    """
    processor = AutoProcessor.from_pretrained(str(path), trust_remote_code=True)
    processor.tokenizer.padding_side = "left"
    return processor


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep transformers from warning of what is meant so: new weights, types it does not know."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def chat(question: str, with_image: bool = True) -> list[dict]:
    """One user message with a question and, ahead of it, an image, for `apply_chat_template`."""
    content = [{"type": "image"}] if with_image else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def prepare(
    processor: ProcessorMixin, images: list | None, questions: list[str], prefix=None
) -> dict:
    """Model inputs of one question a row, left-padded; with an image each, or none at all.

    Args:
        prefix: what the model's `look` returned of the questions' image, which is not read again.
    """
    texts = prompt_texts(processor, questions, images is not None or prefix is not None)
    over = {} if prefix is None else {"prefix": prefix}
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **over)


def prompt_texts(
    processor: ProcessorMixin, questions: list[str], with_images: bool = True
) -> list[str]:
    """The chat template's prompts, one image placeholder in each of them or none."""
    return [
        processor.apply_chat_template(
            chat(question, with_images), add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
