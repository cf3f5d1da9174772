"""The generator of pages, the files it writes, and the tokenizer and processor for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from glimpseprune.cli import main
from glimpseprune.tiny_world.accuracy import chat_prompt, held_out_questions
from glimpseprune.tiny_world.asking import LONGEST_LIST, ask
from glimpseprune.tiny_world.cards import card_targets, character_targets
from glimpseprune.tiny_world.links import AheadHead, LinkHead, link_targets
from glimpseprune.tiny_world.pages import (
    KINDS,
    LETTERS,
    SPLITS,
    TOKEN,
    PageSettings,
    draw_page,
    make_page,
    page_generator,
    pair_split,
)
from glimpseprune.tiny_world.pixels import page_patches
from glimpseprune.tiny_world.vocabulary import WORDS, build_processor

SETTINGS = {
    "default": PageSettings(),
    "harder": PageSettings(grids=((9, 11), (16, 20)), smallest_text=10, noise=20, aligned=False),
}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def page_at(index, split="train", seed=0, settings=SETTINGS["default"]):
    return make_page(page_generator(seed, split, index), split, settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_page_is_a_pure_function_of_seed_split_and_index(name):
    first, again = (page_at(7, settings=SETTINGS[name]) for _ in range(2))
    assert first == again
    assert np.array_equal(draw_page(first), draw_page(again))
    assert first != page_at(8, settings=SETTINGS[name])
    assert first != page_at(7, seed=1, settings=SETTINGS[name])


def test_splits_never_share_a_pair_of_key_and_value():
    pairs = {
        split: {
            (label.key, label.value)
            for seed in range(3)
            for index in range(30)
            for label in page_at(index, split, seed).labels
        }
        for split in SPLITS
    }
    assert all(pair_split(*pair) == split for split in SPLITS for pair in pairs[split])
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="dev"):
        page_generator(0, "dev", 0)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"grids": ((1, 8),)}, "grids"),
        ({"smallest_text": 30}, "smallest_text"),
        ({"filled": (0.5, 1.2)}, "filled"),
        ({"kinds": ("value", "riddle")}, "riddle"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        PageSettings(**fields)


@pytest.mark.parametrize("name", SETTINGS)
def test_boxes_lie_inside_and_hold_exactly_the_ink_of_key_and_value(name):
    settings = replace(SETTINGS[name], noise=0.0)
    for index in range(4):
        page = page_at(index, settings=settings)
        pixels = draw_page(page).astype(int)
        assert pixels.shape == (page.height, page.width, 3)
        for number, label in list(enumerate(page.labels))[::4]:
            blank = [*page.labels]
            blank[number] = replace(label, marks=())
            without = draw_page(replace(page, labels=tuple(blank))).astype(int)
            rows, columns = np.nonzero(np.abs(pixels - without).max(-1) > 2)
            x0, y0, x1, y1 = label.box
            assert 0 <= x0 < x1 <= page.width and 0 <= y0 < y1 <= page.height
            assert x0 <= columns.min() <= x0 + 2 and x1 - 3 <= columns.max() < x1
            assert y0 <= rows.min() <= y0 + 2 and y1 - 3 <= rows.max() < y1


def test_text_sizes_span_a_factor_of_two_and_evidence_is_a_small_share():
    pages = [page_at(index, settings=PageSettings(grids=((12, 12),))) for index in range(40)]
    sizes = [label.text_size for page in pages for label in page.labels]
    assert max(sizes) >= 2 * min(sizes)
    shares = [_tokens_of(label.box) / 144 for page in pages for label in page.labels]
    assert 0.02 < np.mean(shares) < 0.06 and max(shares) < 0.11


def _tokens_of(box):
    x0, y0, x1, y1 = box
    return (-(-x1 // TOKEN) - x0 // TOKEN) * (-(-y1 // TOKEN) - y0 // TOKEN)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_question_is_answered_by_its_boxes(kind):
    for index in range(10):
        page = page_at(index)
        for question in ask(page, kind, 4, page_generator(1, "train", index)):
            labels = [label for label in page.labels if label.box in question.boxes]
            assert question.kind == kind and len(labels) == len(question.boxes)
            assert bool(labels) == (kind != "none")
            if kind == "value":
                assert labels[0].key in question.text and question.answer == labels[0].value
            if kind == "colour":
                assert labels[0].key in question.text and question.answer == labels[0].colour
            if kind == "compare":
                assert question.answer == max(labels, key=lambda label: int(label.value)).key
            if kind == "pair":
                first, second = (
                    label for box in question.boxes for label in labels if label.box == box
                )
                assert question.text.endswith(f" {first.key}, {second.key}?")
                assert question.answer == f"{first.value},{second.value}"
            if kind == "count":
                assert question.answer == str(len(labels))
                assert {label.colour in question.text for label in labels} == {True}


def test_an_absent_key_is_none_of_the_page():
    for index in range(10):
        page = page_at(index)
        asked = ask(page, "none", 6, page_generator(1, "train", index))
        keys = {question.text.removeprefix("What is the value of ")[:2] for question in asked}
        assert len(keys) == 6 and not keys & {label.key for label in page.labels}
        assert {question.answer for question in asked} == {"none"}


def test_a_neighbour_lies_in_the_next_slot_of_the_row():
    asked = 0
    for index in range(10):
        page = page_at(index)
        by_key = {label.key: label for label in page.labels}
        for question in ask(page, "neighbour", 4, page_generator(1, "train", index)):
            label = by_key[question.text.removeprefix("What is the label of ")[:2]]
            left = by_key[question.answer]
            assert question.boxes == (left.box, label.box)
            assert 0 <= label.tile[0] - left.tile[2] <= 4
            assert abs(label.tile[1] - left.tile[1]) <= 2
            asked += 1
    assert asked > 20


def test_a_list_names_all_labels_of_a_colour_in_reading_order():
    for index in range(10):
        page = page_at(index)
        for question in ask(page, "list", 8, page_generator(1, "train", index)):
            colour = question.text.removeprefix("Which labels are ").removesuffix("?")
            keys = [label.key for label in page.labels if label.colour == colour]
            assert question.answer.split(",") == keys and 0 < len(keys) <= LONGEST_LIST


def test_keys_of_a_page_differ():
    for index in range(20):
        keys = [label.key for label in page_at(index).labels]
        assert len(set(keys)) == len(keys)


def test_page_descriptions_hold_every_character_and_the_owner_of_its_token():
    page = page_at(3, settings=PageSettings(grids=((12, 12),)))
    written = sum(len(label.key) + len(label.value) for label in page.labels)
    assert 0.97 * written <= np.count_nonzero(character_targets(page)) <= written
    cards = card_targets(page).reshape(12, 12, -1)
    for label in page.labels:
        x, y = label.marks[2].centre
        card = cards[int(y // TOKEN), int(x // TOKEN)]
        assert [LETTERS[entry - 1] for entry in card[:2]] == list(label.key)
        assert card[2] == 1 + int(label.value[0])


def test_links_are_the_label_on_the_left():
    page = page_at(3, settings=PageSettings(grids=((12, 12),), filled=(1.0, 1.0)))
    links = link_targets(page).reshape(12, 12, 2)
    found = 0
    for number, label in enumerate(page.labels):
        x, y = label.marks[0].centre
        told = links[int(y // TOKEN), int(x // TOKEN)]
        key = [LETTERS[letter - 1] if letter else None for letter in told]
        assert key == (list(page.labels[number - 1].key) if number % 3 else [None, None])
        found += number % 3 > 0
    assert found == 12 and (links == -1).any()


def test_the_link_head_hears_the_letters_that_a_state_says():
    letters = torch.randn(len(LETTERS), 192, generator=torch.Generator().manual_seed(0))
    head = LinkHead(letters, seed=0)
    links = torch.tensor([[1, 2], [24, 24], [0, 0], [-1, -1]])
    states = head.codes[0, links[:, 0].clamp(min=0)] + head.codes[1, links[:, 1].clamp(min=0)]
    said = head.figures(states, links)
    assert said["left_accuracy"] == 1
    swapped = head.figures(states, links.flip(1))  # the two places have rotations of their own
    assert swapped["left_accuracy"] == 0.5 and swapped["link_loss"] > said["link_loss"]
    (letter,) = torch.autograd.grad(said["link_loss"], head.bias)
    assert letter.any()


def test_the_letter_after_the_next_is_read_where_a_key_begins():
    vectors = torch.randn(24, 192, generator=torch.Generator().manual_seed(0))
    letters = torch.arange(100, 124)
    head = AheadHead(vectors, letters, seed=0)
    # a value and its end; a key and its end; two keys with a comma between them
    labels = torch.tensor(
        [[-100, 7, 8, 1, -100], [101, 102, 1, -100, -100], [103, 104, 2, 105, 106]]
    )
    states = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(1))
    for row, place, letter in ((1, 0, 2), (2, 0, 4), (2, 3, 6)):
        states[row, place] = head.codes[letter]
    told = head.figures(states, labels)
    assert told["ahead_accuracy"] == 1 and told["ahead_loss"] < 0.1
    moved = head.figures(states.roll(1, 1), labels)
    assert moved["ahead_accuracy"] < 1 and moved["ahead_loss"] > 1
    none = head.figures(states[:1], labels[:1])
    assert none == {"ahead_loss": 0} and not list(head.parameters())


def test_make_pages_writes_what_datasets_reads(tmp_path, capsys):
    options = "--pages 5 --split test --seed 3 --grids 8x8 10x9 --kinds value count".split()
    assert main(["make-pages", "--output", str(tmp_path / "one"), *options]) == 0
    assert main(["make-pages", "--output", str(tmp_path / "two"), *options]) == 0
    one, two = ((tmp_path / name / "test.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two

    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    from PIL import Image

    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "one" / "test.jsonl"), cache_dir=str(tmp_path / "cache")
    )["train"]
    fields = {"question", "answer", "image", "bboxs", "dataset", "width", "height"}
    assert fields <= set(rows.column_names)
    assert {row["kind"] for row in rows} == {"value", "count"}
    for row in rows:
        image = Image.open(tmp_path / "one" / row["image"])
        assert image.size == (row["width"], row["height"])
        assert all(x1 <= row["width"] and y1 <= row["height"] for _, _, x1, y1 in row["bboxs"])


def test_words_capitals_and_digits_are_single_tokens(processor):
    for word in WORDS:
        assert len(processor.tokenizer(" " + word).input_ids) == 1
        assert len(processor.tokenizer(word).input_ids) == 1
    assert len(processor.tokenizer("KQ407").input_ids) == 5


@pytest.mark.parametrize("text", ["What is the value of KQ?", "héllo 数字\t\n<tag> 12.5 %", "🙂"])
def test_any_text_comes_back(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


@pytest.mark.parametrize("grid", [(4, 8), (8, 8), (10, 13), (16, 20)])
def test_processor_neither_resizes_nor_miscounts(processor, grid):
    page, question = next(held_out_questions("test", 0, PageSettings(), grid))
    prompt = chat_prompt(processor, question.text)
    pixels = draw_page(page)
    inputs = processor(text=[prompt], images=[pixels], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]]
    placeholders = inputs["input_ids"] == processor.image_token_id
    assert int(placeholders.sum()) == grid[0] * grid[1]
    torch.testing.assert_close(inputs["pixel_values"], page_patches(pixels), atol=2e-6, rtol=0)


def test_chat_template_takes_images_videos_and_several_turns(processor):
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "KQ"}]},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nAnswer.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>Which?<|im_end|>\n"
        "<|im_start|>assistant\nKQ<|im_end|>\n"
    )
