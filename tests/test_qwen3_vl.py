"""What only Qwen3-VL promises, and its way from a stock folder to users' hands."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import IMAGE_TOKEN, TRANSFORMERS_5, build_batch, build_models
from fresh_process import run_fresh
from generation_checks import (
    assert_near,
    generate,
)
from PIL import Image
from qwen3_prompts import write_qwen3_base
from reference import added_between_layers
from stage1_data import (
    GLIMPSE,
    assert_same_step,
    collate,
    recipe_of,
    step,
    trainer_that_learns,
    write_data,
)
from test_llava import FRESH_PROCESS

from conversion.convert_stage1 import main as convert_stage1
from glimpseprune.families import family_of
from glimpseprune.hub.inspection import inspect_repository
from glimpseprune.hub.shards import ConversionError
from glimpseprune.loading import prepare
from glimpseprune.training.base import load_for_training
from glimpseprune.training.stage1 import train_stage1
from modeling_glimpseprune.layer_additions import LayerAdditions
from modeling_glimpseprune.row_boundaries import AlignedRows
from modeling_glimpseprune.stock import cache_of, given_cache

FAMILY = "qwen3_vl"
ADDED = 2  # layers of the tiny decoder that features are added behind
EARLY = {"glimpse.prune_layer": 0, "glimpse.glimpse_lora_rank": 2, "glimpse.stale_rank": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_qwen3_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """A repository that stage 1 wrote."""
    recipe = recipe_of(base, data, tmp_path_factory.mktemp("late") / "trained")
    train_stage1(recipe)
    return Path(recipe.output)


# Features between layers


def additions_of_two_kinds() -> LayerAdditions:
    """Of two rows: images in columns 1 and 2 of the first, a video in column 0 of the second."""
    images = torch.tensor([[False, True, True, False], [False] * 4])
    videos = torch.tensor([[False] * 4, [True, False, False, False]])
    of_images = [torch.full((2, 3), 1.0), torch.tensor([[2.0] * 3, [3.0] * 3])]
    of_videos = [torch.full((1, 3), 4.0), torch.full((1, 3), 5.0)]
    return LayerAdditions([images, videos], [of_images, of_videos])


def test_features_lie_where_their_placeholders_do():
    laid_out = additions_of_two_kinds().laid_out(torch.zeros(2, 4, 3))
    found = {layer: added[..., 0].tolist() for layer, added in laid_out.items()}
    assert found == {1: [[0, 1, 1, 0], [4, 0, 0, 0]], 2: [[0, 2, 3, 0], [5, 0, 0, 0]]}


def test_stock_models_are_given_the_same_features():
    where, what = additions_of_two_kinds().as_stock(torch.zeros(2, 4, 3))
    assert where.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert [layer[:, 0].tolist() for layer in what] == [[1, 1, 4], [2, 3, 5]]


def test_features_move_with_their_rows():
    """Nothing is added to what fills a moved row, though it repeats the row's ends."""
    rows = AlignedRows(torch.tensor([4, 2]), 4, None)
    moved = additions_of_two_kinds().moved(rows).laid_out(torch.zeros(2, 6, 3))
    assert moved[2][..., 0].tolist() == [[0, 2, 3, 0, 0, 0], [0, 0, 5, 0, 0, 0]]


@pytest.mark.parametrize("prune_layer", [0, 1, 2])
@torch.no_grad()
def test_features_matter_to_the_last_of_them(prune_layer, monkeypatch):
    """Those of each layer reach the kept tokens, also where they were dropped before."""
    models = build_models(5, glimpse={"glimpse_layer": 2}, family=FAMILY)
    batch = build_batch([[2, (3, 3), 3]], family=FAMILY)
    assert len(added_between_layers(models.stock, batch.rows[0])) == ADDED
    keep = torch.arange(batch.num_visual) % 2 == 0
    settings = {"visual_keep_mask": keep, "prune_layer": prune_layer}
    whole = models.pruned(**batch.inputs, **settings).logits[:, -1]
    laid_out = LayerAdditions.laid_out
    for missing in range(1, ADDED + 1):
        with monkeypatch.context() as patch:
            patch.setattr(
                LayerAdditions,
                "laid_out",
                lambda self, states, missing=missing: {
                    layer: added * (layer != missing)
                    for layer, added in laid_out(self, states).items()
                },
            )
            without = models.pruned(**batch.inputs, **settings).logits[:, -1]
        assert (without - whole).abs().max() > 1e-2, missing


@pytest.mark.parametrize("prune_layer", [0, 1, 2])
@torch.no_grad()
def test_a_prefix_holds_the_features_that_are_still_to_come(prune_layer, tmp_path):
    """Above P they wait for the question; a turn with an image of its own joins its own to them."""
    models = build_models(6, glimpse={"glimpse_layer": 2}, family=FAMILY)
    batch = build_batch([[2, (3, 3), 3, (2, 2), 4]], family=FAMILY)
    model, settings = models.pruned, {"prune_layer": prune_layer, "max_keep_ratio": 0.4}
    expected = generate(model, batch.inputs, **settings)
    first = batch.inputs["input_ids"][0].tolist().index(IMAGE_TOKEN)
    looked = batch.inputs | {"prefix_length": first + 9 + 1}
    prefix = model.look(**looked, prune_layer=prune_layer)
    assert sorted(prefix.held.additions) == list(range(prune_layer + 1, ADDED + 1))
    prefix.save(tmp_path / "prefix")
    reloaded = model.load_prefix(tmp_path / "prefix")
    assert reloaded.nbytes == prefix.nbytes
    for each in (prefix, reloaded):
        output = generate(model, batch.inputs, **given_cache(each), max_keep_ratio=0.4)
        assert torch.equal(output.sequences, expected.sequences)
        assert_near(torch.stack(output.logits), torch.stack(expected.logits))
        assert torch.equal(cache_of(output).glimpse.keep_mask, cache_of(expected).glimpse.keep_mask)


# Frames that lie apart


@torch.no_grad()
def test_a_video_is_one_entry_though_its_frames_lie_apart(base):
    model, processor, _ = load_for_training(str(base))
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    video = {"videos": [list(map(Image.fromarray, frames))], "do_sample_frames": False}
    inputs = processor(text=[text], **video, return_tensors="pt")
    inputs = {name: each for name, each in inputs.items() if isinstance(each, torch.Tensor)}
    places = (inputs["input_ids"][0] == model.config.video_token_id).nonzero()[:, 0]
    assert (places.diff() > 1).sum() == 1  # two frames, with a time between them
    model.eval().model.glimpse.trained.fill_(True)
    record = model.glimpse(**inputs)
    (entry,) = record.visuals
    assert entry.grid[0] == 2 and record.total == len(places) == np.prod(entry.grid)
    output = generate(model, inputs, 3, max_keep_ratio=0.3)
    assert cache_of(output).glimpse.kept <= 0.3 * record.total


# From a stock folder to users' hands


def load_in_a_fresh_process(folder: Path, page: Path, tmp_path: Path):
    """Scores and mask of a question, as a process without this package finds them."""
    auto_class = "AutoModelForImageTextToText" if TRANSFORMERS_5 else "AutoModelForVision2Seq"
    arguments = [folder, page, auto_class, tmp_path / "scores.pt"]
    site = str(Path(transformers.__file__).parents[1])
    variables = {"PYTHONPATH": site, "HF_HOME": str(tmp_path / "cache")}
    completed = run_fresh("-c", FRESH_PROCESS, *arguments, cwd=tmp_path, env=os.environ | variables)
    assert completed.returncode == 0, completed.stderr
    return torch.load(tmp_path / "scores.pt")


@pytest.mark.parametrize("overrides", [{}, EARLY | {"training.answer_weight": 0}])
def test_stage_1_ends_in_a_repository_that_a_fresh_process_loads(base, data, tmp_path, overrides):
    """The pipeline answers there, too."""
    recipe = recipe_of(base, data, tmp_path / "trained", **overrides)
    assert train_stage1(recipe)["steps"] == 4
    fresh = load_for_training(str(base), recipe.glimpse)[0].state_dict()
    model, processor, _ = load_for_training(recipe.output)
    after = model.state_dict()
    changed = {name for name in fresh if not torch.equal(fresh[name], after[name])}
    assert changed and all(name.startswith("model.glimpse.") for name in changed)
    page = data.parent / "a.png"
    with Image.open(page) as image:
        inputs = prepare(processor, [image.convert("RGB")], ["What?"])
    expected = model.eval().glimpse(**inputs)
    importance, keep_mask = load_in_a_fresh_process(Path(recipe.output), page, tmp_path)
    torch.testing.assert_close(importance, expected.importance)
    assert torch.equal(keep_mask, expected.keep_mask)


@pytest.mark.parametrize("objective", ["in place", "read ahead", "distillation"])
def test_stage_1_over_looks_learns_the_same(base, data, objective):
    """The prune layer lies among those that features are added behind, or above them."""
    glimpse, settings = GLIMPSE, {}
    if objective == "read ahead":
        glimpse, settings = GLIMPSE | {"prune_layer": 0}, {"answer_weight": 0.0}
    elif objective == "distillation":
        settings = {"grounding_weight": 0.0, "distillation_weight": 1.0}
    trainer = trainer_that_learns(base, glimpse, settings)
    batch = collate(data, trainer.processor, [1, 0, 3, 4])
    expected, found = (step(trainer, batch, look_once) for look_once in (False, True))
    assert_same_step(found, expected)


@pytest.mark.parametrize("glimpse_only", [False, True])
@torch.no_grad()
@pytest.mark.newest
def test_a_published_repository_scores_as_the_run(trained, base, data, tmp_path, glimpse_only):
    """Complete, or with the glimpse alone; a fresh process loads either."""
    output = tmp_path / "published"
    given = ["--run", str(trained), "--base", str(base), "--base-name", str(base), "--no-verify"]
    given += ["--glimpse-only"] * glimpse_only
    assert convert_stage1([*given, "--output", str(output)]) == 0
    report = inspect_repository(output)
    assert (report.family, report.base_included) == (FAMILY, not glimpse_only)
    model, processor, _ = load_for_training(str(trained))
    page = data.parent / "b.png"
    with Image.open(page) as image:
        inputs = prepare(processor, [image.convert("RGB")], ["What?"])
    importance, _ = load_in_a_fresh_process(output, page, tmp_path)
    torch.testing.assert_close(importance, model.eval().glimpse(**inputs).importance)


def test_the_mixture_of_experts_is_refused():
    with pytest.raises(
        ConversionError, match="'qwen3_vl_moe' model, which is not supported: .*MLP"
    ):
        family_of({"model_type": "qwen3_vl_moe"}, "here")
