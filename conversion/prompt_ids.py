"""Whether a repository turns prompts into the same token ids as its base."""

import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from glimpseprune.families import Family
from glimpseprune.hub.shards import ConversionError
from glimpseprune.loading import errors_only
from glimpseprune.portable import make_processor_portable
from glimpseprune.tokenizer_files import read_as_filed
from modeling_glimpseprune.stock import TRANSFORMERS_5

QUESTION = "What is written here?"
IMAGE = np.zeros((56, 56, 3), dtype=np.uint8)
# `{image}` stands for the placeholder; what lies next to it is where tokenizers differ.
PROMPTS = (
    "{image}\n" + QUESTION,
    "{image}" + QUESTION,
    "See {image}  it:\n\n 1. 413 + 7 = 420;",
    "Wo liegt Køge?  \tOr \u201cnowhere\u201d \U0001f600.",
)

ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError)
SMALL_FILES = (".json", ".jinja", ".txt", ".model")

logger = logging.getLogger(__name__)


def check_prompt_ids(folder: Path, base: Path, family: Family, config: PretrainedConfig) -> None:
    """Compare a repository's ids of a few prompts with those of its base's processor.

    Both are of the family's class, which computes as the stock one; which tokenizer each takes is
    transformers' choice, by the model types in their configurations, their class names and files.
    Nothing is compared where the base holds no tokenizer. A release of transformers that reads the
    base's tokenizer otherwise than its file says is told of in a warning, and the file counts.

    Args:
        folder: the repository, with its processor's files.
        base: a stock base, or a repository of ours.
        config: the repository's configuration.

    Raises:
        ConversionError: when a processor cannot be loaded, or ids differ.
    """
    if not (base / "tokenizer_config.json").exists():
        return
    with errors_only():
        ours = _load(family.processor_class, folder, "repository")
        theirs = _load_base(family.processor_class, base)
        found, expected = _all_ids(ours, config, "repository"), _all_ids(theirs, config, "base")
        rebuilt = TRANSFORMERS_5 and type(theirs.tokenizer) is not PreTrainedTokenizerFast
        if found != expected and family.tokenizer_as_filed and rebuilt:
            theirs.tokenizer = read_as_filed(str(base))
            expected = _all_ids(theirs, config, "base")
            logger.warning(
                "transformers %s itself reads the base's tokenizer otherwise than tokenizer.json "
                "says; the repository follows the file",
                transformers.__version__,
            )
    for prompt, ids in expected.items():
        if found[prompt] != ids:
            raise ConversionError(
                f"the repository's tokenizer is not its base's: {prompt!r} becomes "
                f"{found[prompt]} instead of {ids}"
            )


def placeholder(processor: ProcessorMixin, config: PretrainedConfig) -> str:
    """The text that stands for an image in a prompt."""
    fields = config.to_dict()
    around = [fields.get(f"vision_{side}_token_id") for side in ("start", "end")]
    start, end = ("" if i is None else processor.tokenizer.convert_ids_to_tokens(i) for i in around)
    return f"{start}{processor.image_token}{end}"


def chat_prompt(processor: ProcessorMixin) -> str:
    """The chat template's prompt of an image and a question."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def _all_ids(
    processor: ProcessorMixin, config: PretrainedConfig, what: str
) -> dict[str, list[int]]:
    """Ids of every prompt, by how it is named in messages."""
    image = placeholder(processor, config)
    prompts = {prompt: prompt.replace("{image}", image) for prompt in PROMPTS}
    try:
        if processor.chat_template:
            prompts["chat template"] = chat_prompt(processor)
        return {name: _ids(processor, prompt) for name, prompt in prompts.items()}
    except ERRORS as error:
        raise ConversionError(f"the {what}'s processor takes no prompt: {error}") from error


def _ids(processor: ProcessorMixin, prompt: str) -> list[int]:
    images = [IMAGE] if processor.image_token in prompt else None
    return list(processor(text=[prompt], images=images)["input_ids"][0])


def _load_base(processor_class: type, base: Path) -> ProcessorMixin:
    """The base's processor; on transformers 4 also one that transformers 5 wrote."""
    if TRANSFORMERS_5:
        return _load(processor_class, base, "base")
    with tempfile.TemporaryDirectory() as scratch:
        for file in base.iterdir():
            if file.suffix in SMALL_FILES:
                shutil.copyfile(file, Path(scratch, file.name))
        make_processor_portable(Path(scratch))
        return _load(processor_class, Path(scratch), "base")


def _load(processor_class: type, folder: Path, what: str) -> ProcessorMixin:
    try:
        return processor_class.from_pretrained(str(folder), trust_remote_code=False)
    except ERRORS as error:
        raise ConversionError(f"the {what}'s processor cannot be loaded: {error}") from error
