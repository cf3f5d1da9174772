"""Images so narrow that no patch of their high-resolution view is left (LLaVA-NeXT).

The view has a side of 0 then. Of a tall strip the newline tokens of its rows remain, of a wide one
nothing; which of them there are depends on whether the tower sees an odd or an even number of rows.
`test_invariants.py` has strips beside other images.
"""

import json

import pytest
import torch
from conftest import FAMILIES, randomise
from llava_prompts import PINPOINTS, TILE, next_config_fields
from PIL import Image
from test_llava import GLIMPSE, TEMPLATE, build_tokenizer
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from glimpseprune.cli import main
from glimpseprune.loading import prepare
from glimpseprune.training.base import load_for_training
from glimpseprune.training.recipe import read_recipe
from glimpseprune.training.repository import write_repository
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Recipe

STRIPS = {  # (width, height), patch size: the grid of the high-resolution view
    ((7, 1000), 4): (3, 0),
    ((7, 1000), 3): (4, 0),
    ((1000, 7), 3): (0, 8),
}


@pytest.fixture(params=STRIPS, ids=str)
def case(request):
    return request.param


@pytest.fixture
def strip(case):
    return Image.effect_noise(case[0], 100).convert("RGB")


@pytest.fixture
def base(case, tmp_path):
    """A folder with a tiny stock model and its processor."""
    _, patch_size = case
    fields = next_config_fields(264, 0, patch_size=patch_size) | {"image_token_index": 3}
    fields["text_config"] |= {"bos_token_id": 1, "eos_token_id": 2}
    classes = FAMILIES["llava_next"]
    stock = classes.stock_class(classes.stock_config_class(**fields)).eval()
    randomise(stock, 0)
    stock.lm_head.weight.data[:4] = 0  # answers are text
    stock.save_pretrained(tmp_path / "base")
    sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sizes),
        tokenizer=build_tokenizer(),
        patch_size=patch_size,
        chat_template=TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def loaded(base):
    model, processor, _ = load_for_training(str(base), GLIMPSE)
    model.model.glimpse.trained.fill_(True)
    return model.eval(), processor


@torch.no_grad()
def test_a_strip_is_answered_as_by_stock(case, base, loaded, strip):
    model, processor = loaded
    stock = FAMILIES["llava_next"].stock_class.from_pretrained(base, dtype=torch.float32).eval()
    inputs = prepare(processor, [strip], ["What?"])
    expected = stock.generate(**inputs, max_new_tokens=4, do_sample=False)
    keep_all = torch.ones(sum(model.model.visual_counts(**inputs)), dtype=torch.bool)
    for options in ({"prune": False}, {"visual_keep_mask": keep_all}, {"max_keep_ratio": 1.0}):
        options = options | {"prune_threshold": 0.0, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), expected)


@torch.no_grad()
def test_the_record_says_that_a_view_has_no_tokens(case, loaded, strip):
    model, processor = loaded
    inputs = prepare(processor, [strip], ["What?"])
    base_view, grid = model.glimpse(**inputs, min_keep_tokens=2).visuals
    assert (base_view.kind, grid.kind, grid.row) == ("base_view", "image", 0)
    assert grid.grid == (1, *STRIPS[case])
    assert (grid.total, grid.kept, grid.retention) == (0, 0, 1.0)
    assert len(grid.importance) == len(grid.keep_mask) == 0
    assert base_view.kept >= 2 and base_view.total == base_view.grid[1] * base_view.grid[2]
    model.config.anchor_corners = ["top_left", "bottom_right"]
    base_view, grid = model.glimpse(**inputs, prune_threshold=1.0).visuals
    assert base_view.keep_mask[[0, -1]].all() and grid.total == 0


@torch.no_grad()
def test_the_layout_is_what_the_model_sees(case, loaded, strip):
    model, processor = loaded
    inputs = prepare(processor, [strip], ["What?"])
    layout = processor.image_layouts(inputs)[0]
    assert layout.placeholders == int((inputs["input_ids"] == 3).sum())
    assert layout.grids == [visual.grid[1:] for visual in model.glimpse(**inputs).visuals]


def test_strips_are_drawn_evaluated_and_trained_on(base, loaded, strip, tmp_path, capsys):
    write_repository(*loaded, tmp_path / "model", torch.float32, {})
    page, picture = tmp_path / "strip.png", tmp_path / "picture.png"
    strip.save(page)
    model = ["--model", str(tmp_path / "model")]
    drawn = ["ask", *model, "--image", str(page), "--output", str(picture)]
    assert main([*drawn, "--max-new-tokens", "2"]) == 0
    assert Image.open(picture).size == (2 * strip.width, strip.height)  # the base view's row alone

    line = {"question": "Which?", "answer": "7", "image": page.name, "bboxs": [[1, 2, 5, 6]],
            "dataset": "test", "width": strip.width, "height": strip.height}  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(line) + "\n" + json.dumps(line | {"answer": "8"}) + "\n")
    results = tmp_path / "results.json"
    assert main(["evaluate", *model, "--data", str(data), "--output", str(results)]) == 0
    pruned = json.loads(results.read_text())["results"]["pruned, max_keep_ratio 0.111"]["all"]
    assert pruned["questions"] == 2 and 0 < pruned["retention"] < 1

    training = {"bf16": False, "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    fields = {"base": str(base), "data": str(data), "output": str(tmp_path / "out")}
    overrides = {f"glimpse.{name}": value for name, value in GLIMPSE.items()}
    overrides |= {f"training.{name}": value for name, value in training.items()}
    recipe = read_recipe(Stage1Recipe, None, fields | overrides)
    assert train_stage1(recipe)["steps"] == 1
