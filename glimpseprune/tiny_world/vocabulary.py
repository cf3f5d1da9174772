"""The tokenizer and the processor of the tiny model: Qwen2.5-VL's classes, a tiny vocabulary.

The vocabulary is the whole byte alphabet (so any text tokenises), one token for each common
word of the questions, and Qwen's special tokens; digits and capitals are bytes, hence single
tokens. Files are written by hand in the layout that transformers 4.57 and 5 both read.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLProcessor

WORDS = (
    "user assistant system What Which How many is are the of or in a value colour larger labels"
    " label red orange yellow green blue purple pink white Answer page"
).split()
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SMALLEST_PIXELS = 4 * 28 * 28
LARGEST_PIXELS = 1280 * 28 * 28
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_processor() -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor over the tiny vocabulary; small pages are never resized."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    with TemporaryDirectory() as folder:
        _write_tokenizer_files(Path(folder))
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    pixels = {"min_pixels": SMALLEST_PIXELS, "max_pixels": LARGEST_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids of the ordinary tokens, and the byte-pair merges that build the words.

    A word is built letter by letter from its front, then the space before it is joined on.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(WORDS, key=len, reverse=True):
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    for word in WORDS:
        merges["\u0120", word] = None
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return vocabulary, list(merges)


def _byte_symbols() -> list[str]:
    """The 256 printable symbols that stand for bytes in byte-level BPE, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)
    ]


def _write_tokenizer_files(folder: Path) -> None:
    vocabulary, merges = vocabulary_and_merges()
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        str(len(vocabulary) + offset): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for offset, token in enumerate(SPECIAL_TOKENS)
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": special,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
