"""Masks drawn at random, and stage 2 that learns from their rewards."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage2_data import PROMPTS, compare_with_generation, history, share
from torch.distributions import Bernoulli

from glimpseprune.cli import main
from glimpseprune.hub.shards import GLIMPSE_WEIGHTS
from glimpseprune.training.base import load_for_training
from glimpseprune.training.merging import merge_stage2
from glimpseprune.training.sampled_masks import (
    draw_masks,
    glimpse_at,
    mask_log_probs,
    share_masks,
)
from glimpseprune.training.stage2 import train_stage2

SETTINGS = SimpleNamespace(
    prune_threshold=0.2, max_keep_ratio=None, min_keep_tokens=0, anchor_corners=[]
)


def record_of(*importance: float, height: int = 1) -> SimpleNamespace:
    """Prompts' visual tokens in one image of that many rows."""
    width = len(importance) // height
    geometry = [(0, i // width, i % width, 1, height, width) for i in range(len(importance))]
    return SimpleNamespace(
        importance=torch.tensor(importance), geometry=torch.tensor(geometry), encoded=None
    )


def test_tokens_are_kept_as_often_as_their_probability_says():
    """Around the threshold 0.2; of two prompts, the second's masks are asked for more often."""
    record = record_of(-3.0, -1.4, 0.0, 2.0, 1.0)
    copies = [0, 1, 1] * 4000
    masks = draw_masks(record, SETTINGS, [2, 3], copies).split([2, 3, 3] * 4000)
    expected = (record.importance - torch.tensor(0.2).logit()).sigmoid()
    first = torch.stack(masks[::3]).float().mean(0)
    second = torch.stack(masks[1::3] + masks[2::3]).float().mean(0)
    assert torch.allclose(first, expected[:2], atol=0.03)
    assert torch.allclose(second, expected[2:], atol=0.03)


def test_bounds_and_corners_hold_for_draws():
    record = record_of(*[-20.0] * 6, height=2)
    settings = SimpleNamespace(**vars(SETTINGS) | {"anchor_corners": ["top_left", "bottom_right"]})
    assert draw_masks(record, settings, [6], [0]).tolist() == [True, *[False] * 4, True]
    settings = SimpleNamespace(**vars(SETTINGS) | {"min_keep_tokens": 2})
    assert draw_masks(record, settings, [6], [0]).sum() == 2
    settings.max_keep_ratio, record.importance = 0.5, -record.importance
    assert draw_masks(record, settings, [6], [0]).sum() == 3


def test_log_probabilities_equal_those_of_independent_draws():
    record = record_of(-3.0, -1.4, 0.0, 2.0)
    masks = [torch.tensor(each).bool() for each in ([1, 0], [1, 1], [0, 1])]
    found = mask_log_probs(record, SETTINGS, [2, 2], [1, 0, 1], masks)
    probability = (record.importance - torch.tensor(0.2).logit()).sigmoid()
    for row, prompt in enumerate([1, 0, 1]):
        expected = Bernoulli(probability[2 * prompt : 2 * prompt + 2]).log_prob(masks[row].float())
        assert found[row] == pytest.approx(expected.mean().item(), abs=1e-6)


def test_tokens_that_always_stay_take_no_part_in_log_probabilities():
    record = record_of(-3.0, 1.0, 2.0)
    record.importance.requires_grad_(True)
    settings = SimpleNamespace(**vars(SETTINGS) | {"anchor_corners": ["top_left"]})
    mask_log_probs(record, settings, [3], [0], [torch.ones(3).bool()]).sum().backward()
    assert record.importance.grad[0] == 0 and (record.importance.grad[1:] > 0).all()


def test_what_was_not_encoded_is_never_drawn_and_takes_no_part():
    record = record_of(0.0, -math.inf, 2.0)
    settings = SimpleNamespace(**vars(SETTINGS) | {"min_keep_tokens": 3})
    assert draw_masks(record, settings, [3], [0]).tolist() == [True, False, True]
    mask = torch.tensor([True, False, True])
    record.encoded = mask
    record.importance.requires_grad_(True)
    found = mask_log_probs(record, SETTINGS, [3], [0], [mask])
    found.sum().backward()
    logits = torch.tensor([0.0, 2.0]) - torch.tensor(0.2).logit()
    assert found.item() == pytest.approx(logits.sigmoid().log().sum().item() / 3)
    assert record.importance.grad.isfinite().all() and record.importance.grad[1] == 0


@pytest.mark.parametrize(
    ("masks", "prompts", "dealt"),
    [
        (None, [4, 4, 7, 7, 7], [0, 1, 2, 3, 4]),
        (2, [4, 4, 7, 7, 7], [0, 1, 2, 2, 3]),
        (1, [4, 4, 7], [0, 0, 1]),
        (5, [4, 7, 4], [0, 1, 2]),
    ],
)
def test_completions_of_a_prompt_share_masks_evenly(masks, prompts, dealt):
    of_masks, found = share_masks(prompts, masks)
    assert found == dealt
    assert [of_masks[mask] for mask in found] == prompts


def test_completions_are_scored_over_their_own_masks(loaded, data):
    """Two masks of each of the prompts, all different, within 1e-4 of generation."""
    model, _ = loaded
    prompts = share(loaded, data, PROMPTS)
    with torch.no_grad():
        record = glimpse_at(model, prompts, [0, 1, 2])
    copies = [0, 0, 1, 1, 2, 2]
    masks = draw_masks(record, model.config, prompts.visual_counts, copies)
    repeated = prompts.repeated(copies).with_masks(masks)
    for first, second in zip(repeated.keep_masks[::2], repeated.keep_masks[1::2], strict=True):
        assert not torch.equal(first, second)
    compare_with_generation(model, repeated, [0, 1, 2, 3, 4, 5])


def test_a_glimpse_in_training_is_the_one_of_generation(loaded, data):
    model, _ = loaded
    prompts = share(loaded, data, PROMPTS)
    record = glimpse_at(model, prompts, [0, 2])
    for place, prompt in enumerate([0, 2]):
        alone = model.glimpse(**prompts.model_inputs([prompt]))
        assert torch.allclose(record.visuals[place].importance, alone.importance, atol=1e-5)


def test_the_glimpse_learns_to_keep_what_is_rewarded(make_stage2_recipe, glimpsing, tmp_path):
    """With a reward for dropping alone, fewer tokens are kept; merging brings the glimpse along."""
    recipe = make_stage2_recipe(
        mask="sampled", rewards={"retention": 1.0}, masks_per_prompt=2,
        **{"training.max_steps": 12, "training.learning_rate": 0.02, "training.beta": 0.0,
           "training.max_completion_length": 1, "training.lr_scheduler_type": "constant"},
    )  # fmt: skip
    train_stage2(recipe)
    shares = [entry["retention"] for entry in history(recipe)]
    assert sum(shares[-3:]) < 0.7 * sum(shares[:3])
    assert all("mask_log_prob" in entry for entry in history(recipe))
    learned = load_file(Path(recipe.output) / GLIMPSE_WEIGHTS)
    merge_stage2(recipe.output, None, tmp_path / "merged")
    before, after = (
        load_for_training(str(folder))[0].model.glimpse.state_dict()
        for folder in (glimpsing, tmp_path / "merged")
    )
    assert before.keys() == after.keys() == learned.keys()
    assert all(torch.equal(after[name], learned[name]) for name in learned)
    assert any(not torch.equal(after[name], before[name]) for name in learned)


def test_the_glimpse_has_a_learning_rate_of_its_own(make_stage2_recipe, glimpsing):
    settings = {"training.max_steps": 2, "training.glimpse_learning_rate": 0.0}
    recipe = make_stage2_recipe(mask="sampled", rewards={"retention": 1.0}, **settings)
    train_stage2(recipe)
    learned = load_file(Path(recipe.output) / GLIMPSE_WEIGHTS)
    before = load_for_training(str(glimpsing))[0].model.glimpse.state_dict()
    assert all(torch.equal(learned[name], before[name]) for name in learned)
    adapter = load_file(Path(recipe.output) / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)


def test_other_masks_leave_the_glimpse_alone(make_stage2_recipe):
    recipe = make_stage2_recipe(**{"training.max_steps": 1})
    train_stage2(recipe)
    assert not (Path(recipe.output) / GLIMPSE_WEIGHTS).exists()


def test_a_glimpse_that_does_not_fit_is_not_merged(make_stage2_recipe, tmp_path, capsys):
    recipe = make_stage2_recipe(mask="sampled", **{"training.max_steps": 1})
    train_stage2(recipe)
    path = Path(recipe.output) / GLIMPSE_WEIGHTS
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path)
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", recipe.output, "--output", str(merged)]) == 2
    assert "does not fit the base's glimpse" in capsys.readouterr().err and not merged.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.num_iterations": 2}, "sampled masks need one update a round"),
        ({"training.steps_per_generation": 2}, "sampled masks need one update a round"),
        ({"masks_per_prompt": 0}, "masks_per_prompt takes a positive number"),
        ({"mask": "model", "masks_per_prompt": 2}, "masks_per_prompt takes a positive number"),
    ],
)
def test_settings_that_cannot_be_are_refused(make_stage2_recipe, settings, message):
    with pytest.raises(ValueError, match=message):
        train_stage2(make_stage2_recipe(**{"mask": "sampled"} | settings))


def test_a_threshold_at_the_end_of_its_range_is_refused(make_stage2_recipe, glimpsing):
    path = glimpsing / "config.json"
    content = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(content) | {"prune_threshold": 0.0}))
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            train_stage2(make_stage2_recipe(mask="sampled"))
    finally:
        path.write_text(content)
