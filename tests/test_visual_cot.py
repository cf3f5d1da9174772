"""The Visual-CoT reader, evidence masks and the training collator."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from glimpseprune.data.visual_cot import (
    VisualCoTDataset,
    VisualCoTError,
    VisualCoTRow,
    evidence_mask,
    read_visual_cot,
)
from glimpseprune.data.visual_cot_collator import VisualCoTCollator
from glimpseprune.tiny_world.vocabulary import build_processor
from modeling_glimpseprune.processing_glimpseprune import GlimpsePruneQwen2_5_VLProcessor
from modeling_glimpseprune.stock import TRANSFORMERS_5

ROW = {
    "question": "What is the value of KQ?",
    "answer": "417",
    "image": "page.png",
    "bboxs": [[10, 20, 60, 40]],
    "dataset": "test",
    "width": 112,
    "height": 84,
}


@pytest.fixture(scope="module")
def processor():
    stock = build_processor()
    return GlimpsePruneQwen2_5_VLProcessor(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        video_processor=stock.video_processor,
        chat_template=stock.chat_template,
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with images of 4 x 3, 2 x 2 and 5 x 2 visual tokens (columns x rows)."""
    generator = np.random.default_rng(0)
    for name, width, height in (("page", 112, 84), ("small", 56, 56), ("wide", 140, 56)):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def write_lines(folder, *rows):
    path = folder / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_row(folder, name="page", boxes=((10, 20, 60, 40),), **fields):
    size = {"page": (112, 84), "small": (56, 56), "wide": (140, 56)}[name]
    values = {"question": "What is the value of KQ?", "answer": "417", "dataset": "test"}
    return VisualCoTRow(
        image=folder / f"{name}.png", boxes=boxes, width=size[0], height=size[1], **values | fields
    )


def slow_evidence_mask(boxes, width, height, grid):
    """Every cell with every box: is their intersection's area positive?"""
    rows, columns = grid
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    mask = []
    for row, column in cells:
        top, bottom = row * height / rows, (row + 1) * height / rows
        left, right = column * width / columns, (column + 1) * width / columns
        mask.append(
            any(
                min(right, x1) - max(left, x0) > 1e-9 and min(bottom, y1) - max(top, y0) > 1e-9
                for x0, y0, x1, y1 in boxes
            )
        )
    return torch.tensor(mask)


@pytest.mark.parametrize("seed", range(20))
def test_evidence_mask_equals_slow_formula(seed):
    generator = np.random.default_rng(seed)
    width, height = generator.integers(20, 500, 2).tolist()
    grid = tuple(generator.integers(1, 12, 2).tolist())
    boxes = []
    for _ in range(generator.integers(0, 4)):
        x0, y0 = generator.integers(0, width), generator.integers(0, height)
        x1, y1 = generator.integers(x0 + 1, width + 1), generator.integers(y0 + 1, height + 1)
        boxes.append((int(x0), int(y0), int(x1), int(y1)))
    expected = slow_evidence_mask(boxes, width, height, grid)
    assert evidence_mask(boxes, width, height, grid).tolist() == expected.tolist()


def test_evidence_mask_at_cell_edges():
    one_cell = evidence_mask([(28, 28, 56, 56)], 84, 84, (3, 3))
    assert one_cell.nonzero().flatten().tolist() == [4]
    one_pixel_more = evidence_mask([(28, 28, 57, 56)], 84, 84, (3, 3))
    assert one_pixel_more.nonzero().flatten().tolist() == [4, 5]
    tiny = evidence_mask([(83.5, 0, 84, 0.1)], 84, 84, (2, 3))
    assert tiny.nonzero().flatten().tolist() == [2]
    assert evidence_mask([(0, 0, 84, 84)], 84, 84, (5, 7)).all()
    assert not evidence_mask([], 84, 84, (5, 7)).any()


def test_reads_rows_in_order(folder):
    second = ROW | {"question": "And of AB?", "image": "wide.png", "width": 140, "height": 56}
    rows = read_visual_cot(write_lines(folder, ROW, "", second | {"split": "train"}))
    assert [row.question for row in rows] == [ROW["question"], "And of AB?"]
    assert rows[0].image == folder / "page.png"
    assert rows[0].boxes == ((10, 20, 60, 40),)
    assert (rows[1].width, rows[1].height, rows[1].dataset) == (140, 56, "test")


def test_image_folder_stands_in_for_the_files_own(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_lines(elsewhere, ROW)
    assert read_visual_cot(path, image_folder=folder)[0].image == folder / "page.png"
    with pytest.raises(VisualCoTError, match="line 1: there is no image"):
        read_visual_cot(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object but a list"),
        ({k: v for k, v in ROW.items() if k not in ("answer", "bboxs")}, "missing answer, bboxs"),
        (ROW | {"answer": 417}, "answer must be a string, got 417"),
        (ROW | {"width": 0}, "width must be a positive whole number, got 0"),
        (ROW | {"height": "84"}, "height must be a positive whole number, got '84'"),
        (ROW | {"bboxs": "none"}, "bboxs must be a list of boxes, got 'none'"),
        (ROW | {"bboxs": [[1, 2, 3]]}, r"four numbers \[x0, y0, x1, y1\], got \[1, 2, 3\]"),
        (ROW | {"bboxs": [[1, 2, "3", 4]]}, "four numbers"),
        (ROW | {"bboxs": [[1, 2, float("nan"), 4]]}, "four numbers"),
        (ROW | {"bboxs": [[10, 20, 10, 40]]}, r"\[10, 20, 10, 40\] is empty or inverted"),
        (ROW | {"bboxs": [[60, 20, 10, 40]]}, "empty or inverted"),
        (ROW | {"bboxs": [[10, 20, 113, 40]]}, "outside the image of 112 x 84 pixels"),
        (ROW | {"bboxs": [[-1, 20, 10, 40]]}, "outside the image"),
        (ROW | {"bboxs": []}, "bboxs is empty"),
        (ROW | {"kind": 3}, "kind must be a string, got 3"),
        (ROW | {"image": "nowhere.png"}, "there is no image .*nowhere.png"),
    ],
)
def test_bad_lines_name_file_and_line(folder, row, message):
    path = write_lines(folder, ROW, "", row)
    with pytest.raises(VisualCoTError, match=rf"data.jsonl, line 3: .*{message}"):
        read_visual_cot(path)


def test_rows_without_boxes_are_skipped_on_request(folder):
    path = write_lines(folder, ROW | {"bboxs": []}, ROW)
    assert len(read_visual_cot(path, skip_rows_without_boxes=True)) == 1


def test_kinds_are_read_where_they_are_told(folder):
    rows = read_visual_cot(write_lines(folder, ROW | {"kind": "count"}, ROW))
    assert [row.kind for row in rows] == ["count", None]


def test_boxes_and_answers_may_be_left_out_on_request(folder):
    bare = {name: value for name, value in ROW.items() if name not in ("answer", "bboxs")}
    path = write_lines(folder, bare, ROW | {"answer": "", "bboxs": []}, ROW | {"answer": None}, ROW)
    rows = read_visual_cot(path, need_boxes=False, need_answers=False)
    assert [row.answer for row in rows] == [None, None, None, ROW["answer"]]
    assert [len(row.boxes) for row in rows] == [0, 0, 1, 1]
    with pytest.raises(VisualCoTError, match="line 1: missing answer"):
        read_visual_cot(path, need_boxes=False)
    with pytest.raises(VisualCoTError, match="line 1: missing bboxs"):
        read_visual_cot(path, need_answers=False)
    with pytest.raises(VisualCoTError, match="line 1: answer must be a string, got 7"):
        wrong = write_lines(folder, ROW | {"answer": 7})
        read_visual_cot(wrong, need_answers=False)


def test_groups_share_an_image(folder):
    rows = [
        make_row(folder, name, question=str(number))
        for number, name in enumerate(["page", "small", "page", "page", "small", "page", "page"])
    ]
    dataset = VisualCoTDataset(rows, questions_per_image=3)
    questions = [[row.question for row in dataset[index]] for index in range(len(dataset))]
    assert questions == [["0", "2", "3"], ["5", "6"], ["1", "4"]]
    assert dataset.num_questions == 7
    assert all(len(group) == 1 for group in VisualCoTDataset(rows))
    with pytest.raises(ValueError, match="no questions"):
        VisualCoTDataset([])
    with pytest.raises(ValueError, match="questions_per_image must be 1 or more, got 0"):
        VisualCoTDataset(rows, questions_per_image=0)


def test_prompt_equals_the_processors(folder, processor):
    batch = VisualCoTCollator(processor)([[make_row(folder)]])
    content = [{"type": "image"}, {"type": "text", "text": ROW["question"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    with Image.open(folder / "page.png") as image:
        expected = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
    length = batch["prompt_length"]
    assert batch["input_ids"][0, :length].tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(batch["visuals"]["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
    completion = processor.tokenizer.decode(batch["input_ids"][0, length:])
    assert completion == "417<|im_end|>"
    if TRANSFORMERS_5:
        types = batch["mm_token_type_ids"][0]
        assert types[:length].tolist() == expected["mm_token_type_ids"][0].tolist()
        assert not types[length:].any()


def test_batch_layout(folder, processor):
    groups = [
        [
            make_row(folder, answer="4", boxes=((0, 0, 28, 28),)),
            make_row(folder, answer="41798", question="What?", boxes=((90, 60, 112, 84),)),
        ],
        [make_row(folder, "small", answer="12", boxes=((0, 30, 56, 56),))],
    ]
    batch = VisualCoTCollator(processor)(groups)
    length = batch["prompt_length"]
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape == labels.shape == (3, length + 6)
    for row, answer in enumerate(("4", "41798", "12")):
        real = mask[row].nonzero().flatten()
        assert real.tolist() == list(range(int(real[0]), int(real[-1]) + 1))
        assert int(real[0]) < length <= int(real[-1])
        completion = ids[row, length : int(real[-1]) + 1]
        assert processor.tokenizer.decode(completion) == f"{answer}<|im_end|>"
        assert (ids[row][mask[row] == 0] == processor.tokenizer.pad_token_id).all()
        supervised = labels[row] != -100
        assert supervised.nonzero().flatten().tolist() == list(range(length, int(real[-1]) + 1))
        assert torch.equal(labels[row][supervised], completion)
    assert mask[:, :length].sum(1).max() == length
    assert batch["image_index"].tolist() == [0, 0, 1]
    assert batch["image_grid_thw"].tolist() == [[1, 6, 8], [1, 6, 8], [1, 4, 4]]
    assert len(batch["visuals"]["pixel_values"]) == 6 * 8 + 4 * 4
    evidence = batch["evidence_mask"].split([12, 12, 4])
    assert [part.nonzero().flatten().tolist() for part in evidence] == [[0], [11], [2, 3]]
    assert ("mm_token_type_ids" in batch) == TRANSFORMERS_5


def test_boxes_follow_a_resized_image(folder, processor):
    row = make_row(folder, "wide", boxes=((0, 0, 14, 28), (112, 29, 140, 56)))
    batch = VisualCoTCollator(processor, max_pixels=6 * 28 * 28)([[row]])
    _, height, width = (batch["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    assert (height, width) == (1, 3)
    assert batch["evidence_mask"].tolist() == [True, False, True]


def test_collator_errors(folder, processor):
    with pytest.raises(ValueError, match="min_pixels must be positive and at most max_pixels"):
        VisualCoTCollator(processor, min_pixels=100, max_pixels=50)
    (folder / "broken.png").write_bytes(b"no image")
    row = make_row(folder)
    broken = VisualCoTRow(**{**row.__dict__, "image": folder / "broken.png"})
    with pytest.raises(ValueError, match="cannot read the image .*broken.png"):
        VisualCoTCollator(processor)([[broken]])
    twice = make_row(folder, question="What is <|image_pad|>?")
    with pytest.raises(ValueError, match="must hold <|image_pad|> once"):
        VisualCoTCollator(processor)([[twice]])


def conversation(name="page.png", box="[10, 20, 60, 40]", **fields) -> dict:
    """An entry as the published training set and benchmark hold it."""
    turns = [
        (
            "human",
            "<image>\nWho? Please provide the bounding box coordinate of the region that ...",
        ),
        ("gpt", "[0.1, 0.2, 0.5, 0.4]"),
        ("human", "<image>"),
        ("gpt", "A. C. Monk"),
    ]
    return {
        "dataset": "docvqa",
        "image": [name, f"{name}###{box}"],
        "conversations": [{"from": role, "value": value} for role, value in turns],
    } | fields


def write_json(folder, *entries):
    path = folder / "docvqa.json"
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return path


def test_reads_published_conversations(folder):
    path = write_json(
        folder, conversation(), conversation("wide.png", "[-3, 1.5, 150, 30]", dataset="gqa")
    )
    first, second = read_visual_cot(path)
    assert first == VisualCoTRow(
        "Who?", "A. C. Monk", folder / "page.png", ((10, 20, 60, 40),), 112, 84, "docvqa"
    )
    assert second.boxes == ((0, 1.5, 140, 30),)  # cut to the image
    assert (second.width, second.height, second.dataset) == (140, 56, "gqa")


def test_conversations_without_a_box(folder):
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Me"}]
    entry = {"image": "page.png", "conversations": turns}
    path = write_json(folder, entry, conversation())
    with pytest.raises(VisualCoTError, match=r"docvqa\.json, entry 0: .*bboxs is empty"):
        read_visual_cot(path)
    rows = read_visual_cot(path, skip_rows_without_boxes=True)
    assert [row.answer for row in rows] == ["A. C. Monk"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (conversation("missing.png"), "entry 1: there is no image .*missing.png"),
        (conversation("docvqa.json"), "entry 1: cannot read the image"),
        (conversation(box="[60, 20, 10, 40]"), "entry 1: .*empty or inverted"),
        (conversation(box="[200, 20, 300, 40]"), "entry 1: .*empty or inverted"),
        (conversation(image=[]), "entry 1: image must name"),
        (conversation(conversations=[{"value": "Who?"}]), "entry 1: conversations must hold"),
        (conversation(conversations=[{"value": 1}, {}]), "entry 1: every turn"),
        ("text", "entry 1: not a JSON object"),
    ],
)
def test_bad_conversations_name_file_and_entry(folder, entry, message):
    with pytest.raises(VisualCoTError, match=message):
        read_visual_cot(write_json(folder, conversation(), entry))


@pytest.mark.parametrize(("text", "message"), [("[", "not JSON"), ("{}", "not a list")])
def test_files_that_are_no_list_of_conversations(folder, text, message):
    path = folder / "docvqa.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(VisualCoTError, match=message):
        read_visual_cot(path)
