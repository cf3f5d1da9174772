"""Processors over a prefix: the ids of whole prompts, without reading an image again."""

import pytest
import torch
from test_processor_images import (
    family,  # noqa: F401
    picture,
    processors,  # noqa: F401
)

from glimpseprune.images import open_image
from glimpseprune.loading import load_model, prepare
from glimpseprune.package_files import SAMPLE_PAGE
from modeling_glimpseprune.glimpse_prefix import GlimpsePrefix
from modeling_glimpseprune.held_prompt import HeldPrompt
from modeling_glimpseprune.prefix_parts import PrefixOrigin
from modeling_glimpseprune.stock import given_cache

QUESTIONS = ("What is red?", "How many are there, and where?", "Why")


def prefix_of(rows: list[torch.Tensor]) -> GlimpsePrefix:
    """A prefix of which nothing but its ids is there, without padding."""
    ids, states = torch.stack(rows), torch.zeros(len(rows), len(rows[0]), 1)
    held = HeldPrompt(states, ids, torch.arange(len(rows)), None, [], 0)
    origin = PrefixOrigin(ids, torch.ones_like(ids, dtype=torch.bool), [{} for _ in rows], "")
    return GlimpsePrefix([], held, origin)


def text_of(processor, *parts: str | None) -> str:
    """A prompt with an image where a part is None."""
    content = "".join(processor.image_token if part is None else part for part in parts)
    return f"Look: {content}"


def end_of_first_image(processor, ids: torch.Tensor) -> int:
    """The number of ids up to the end of the first run of placeholders."""
    visual = (ids == processor.image_token_id).int()
    first = int(visual.argmax())
    return first + int((visual[first:] == 0).int().argmax())


class TestOverPrefix:
    @pytest.fixture
    def processor(self, processors):  # noqa: F811
        return processors[1]

    @pytest.fixture
    def prefix(self, processor):
        whole = processor(
            images=[picture()], text=text_of(processor, None, " a?"), return_tensors="pt"
        )
        ids = whole["input_ids"][0]
        return prefix_of([ids[: end_of_first_image(processor, ids)]])

    def test_questions_about_one_image(self, processor, prefix):
        texts = [text_of(processor, None, f" {question}") for question in QUESTIONS]
        over = processor(text=texts, prefix=prefix)
        assert over.keys() == {"input_ids", "attention_mask"}
        for row, text in enumerate(texts):
            alone = processor(images=[picture()], text=text, return_tensors="pt")["input_ids"][0]
            real = over["attention_mask"][row].bool()
            assert torch.equal(over["input_ids"][row][real], alone)
            assert real[: prefix.held.length].all()  # padding stands behind the prefix

    def test_images_behind_the_prefix(self, processor, prefix):
        text = text_of(processor, None, " and ", None, " or ", None, " what?")
        images = [picture(seed) for seed in range(3)]
        whole = processor(images=images, text=text, return_tensors="pt")
        over = processor(text=text, images=images[1:], prefix=prefix)
        assert torch.equal(over["input_ids"], whole["input_ids"])
        alone = processor.processed_images(images[1:])
        for name, expected in alone.items():
            assert torch.equal(torch.as_tensor(over[name]), torch.as_tensor(expected))

    @pytest.mark.parametrize("images", [1, 3])
    def test_images_and_placeholders_differ(self, processor, prefix, images):
        text = text_of(processor, None, " and ", None, " or ", None, " what?")
        with pytest.raises(ValueError, match="behind the prefix"):
            processor(text=text, images=[picture()] * images, prefix=prefix)

    def test_bad_input(self, processor, prefix):
        text = text_of(processor, None, " what?")
        with pytest.raises(ValueError, match="does not begin with the prefix"):
            processor(text=f"No! {text}", prefix=prefix)
        with pytest.raises(ValueError, match="is all prefix"):
            processor(text=text_of(processor, None), prefix=prefix)
        with pytest.raises(ValueError, match="return_tensors='pt', got 'np'"):
            processor(text=text, prefix=prefix, return_tensors="np")
        with pytest.raises(ValueError, match="give text"):
            processor(prefix=prefix)
        with pytest.raises(ValueError, match="no videos"):
            processor(text=text, videos=[[picture()]], prefix=prefix)


@torch.no_grad()
def test_the_tiny_model_answers_over_a_prefix():
    """As README shows it."""
    model, processor = load_model()
    page = open_image(SAMPLE_PAGE)
    questions = [f"What is the value of {label}?" for label in ("CS", "AB", "Q7")]
    fresh = model.generate(**prepare(processor, [page] * 3, questions), max_new_tokens=6)
    prefix = model.look(**prepare(processor, [page], questions[:1]))
    inputs = prepare(processor, None, questions, prefix=prefix)
    over = model.generate(**inputs, **given_cache(prefix), max_new_tokens=6)
    answers = [
        processor.batch_decode(ids[:, -6:], skip_special_tokens=True) for ids in (fresh, over)
    ]
    assert answers[0] == answers[1]
