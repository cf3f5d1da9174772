"""Masks drawn at random, and stage 2 that learns from their rewards."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage1_data import write_page
from stage2_data import (
    PROMPTS,
    compare_with_generation,
    history,
    learned,
    share,
    something_to_learn,
)
from torch.distributions import Bernoulli
from torch.utils.flop_counter import FlopCounterMode

from glimpseprune.cli import main
from glimpseprune.hub.shards import GLIMPSE_WEIGHTS
from glimpseprune.training.base import load_for_training
from glimpseprune.training.merging import merge_stage2
from glimpseprune.training.rollout import SharedPrompts, completion_logits
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


def masks_of(model, prompts, copies):
    """Prompts with a mask drawn for each copy, always the same ones."""
    with torch.no_grad():
        record = glimpse_at(model, prompts, list(range(len(prompts.image_index))))
    torch.manual_seed(1)
    masks = draw_masks(record, model.config, prompts.visual_counts, copies)
    return prompts.repeated(copies).with_masks(masks)


@torch.no_grad()
def test_masks_of_a_prompt_are_sampled_and_scored_over_one_look(loaded, data):
    model, _ = loaded
    prompts, copies = share(loaded, data, PROMPTS), [0, 0, 1, 1, 1, 2]
    expected = glimpse_at(model, prompts, [2, 0])
    looked = prompts.looked_at(model)
    found = glimpse_at(model, looked, [2, 0])
    # Scores of a few tokens come out of other sums than those of a whole prompt.
    torch.testing.assert_close(found.importance, expected.importance, atol=1e-5, rtol=1e-5)
    repeated = masks_of(model, looked, copies)
    used = compare_with_generation(model, repeated, list(range(6)))
    assert repeated.prefix is not None and used.prefix is None
    plain = masks_of(model, prompts, copies)
    assert all(map(torch.equal, used.keep_masks, plain.keep_masks))
    ids = torch.arange(12).view(6, 2)
    logits = [
        completion_logits(model, each, list(range(6)), ids, torch.ones_like(ids))
        for each in (plain, plain.looked_at(model))
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_over_a_look_are_those_of_whole_prompts(loaded, data, checkpointing):
    """Of completions under three masks and of the masks themselves, by every weight."""
    model, _ = loaded
    masks = masks_of(model, share(loaded, data, [0, 3]), [0, 0, 0, 1])
    rows, ids = [0, 1, 2, 3], torch.arange(8).view(4, 2)

    def gradients(prompts):
        model.zero_grad()
        logits = completion_logits(model, prompts, rows, ids, torch.ones_like(ids))
        record = glimpse_at(model, prompts, [0, 3])
        sizes = [prompts.visual_counts[row] for row in (0, 3)]
        log_probs = mask_log_probs(record, model.config, sizes, [0, 0, 0, 1], prompts.keep_masks)
        (logits.square().mean() + log_probs.sum()).backward()
        return {
            name: each.grad.clone()
            for name, each in model.named_parameters()
            if each.grad is not None
        }

    model.requires_grad_(True)
    model.model.visual.requires_grad_(False)
    try:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train().model.glimpse.eval()
        expected, found = gradients(masks), gradients(masks.looked_at(model))
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
        model.requires_grad_(False)
    assert found.keys() == expected.keys() and len(found) > 40
    largest = max(each.abs().max() for each in expected.values())
    for name, gradient in expected.items():
        # A hundred float32 roundings of the largest one, as sums are cut in two.
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_operations_that_a_look_saves(loaded, tmp_path):
    """Eight masks of one prompt of 48 visual tokens and 18 of text, prefilled.

    Layer 0 and the attention of layer 1, 24.6 thousand operations a token, run over it once in
    place of eight times, and over its last token for each mask. The rest, 30.7 thousand, runs over
    the text alone either way, as the masks are empty: (66 / 8 + 1) * 24.6 + 18 * 30.7 over
    66 * 24.6 + 18 * 30.7 is .36.
    """
    model = loaded[0].requires_grad_(False)
    prompts, counted = share(loaded, write_page(tmp_path), [0]), []
    assert prompts.visual_counts == [48] and prompts.inputs["input_ids"].shape[1] == 66
    masks = prompts.repeated([0] * 8)
    masks = masks.with_masks(torch.zeros(8 * 48, dtype=torch.bool))
    ids = torch.zeros(8, 1, dtype=torch.long)
    for look_once in (False, True):
        with FlopCounterMode(display=False) as counter:
            asked = masks.looked_at(model) if look_once else masks
            completion_logits(model, asked, list(range(8)), ids, torch.ones_like(ids))
        counted.append(counter.get_total_flops())
    assert counted[1] < 0.42 * counted[0]


def test_looks_change_nothing_that_is_learned(make_stage2_recipe, monkeypatch):
    """Steps in proportion to gradients, so that weights are as near as those."""
    with something_to_learn("sampled") as settings:
        settings |= {"masks_per_prompt": 2, "training.optim": "sgd", "training.max_grad_norm": 0.0}
        recipes = [make_stage2_recipe(name, **settings) for name in ("looked", "whole")]
        train_stage2(recipes[0])
        monkeypatch.setattr(SharedPrompts, "looked_at", lambda prompts, model: prompts)
        train_stage2(recipes[1])
    found, expected = map(learned, recipes)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)


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
