"""Stage 1 over looks: each page once for all that asks about it, and the same is learned."""

import json
from pathlib import Path

import pytest
import torch
from double_precision import as_double, in_double_precision
from safetensors.torch import load_file
from stage1_data import (
    GLIMPSE,
    assert_same_step,
    collate,
    recipe_of,
    step,
    trainer_that_learns,
    write_page,
)
from torch.utils.flop_counter import FlopCounterMode

from glimpseprune.training.stage1 import train_stage1

EARLY = GLIMPSE | {"prune_layer": 0, "glimpse_lora_rank": 2, "stale_rank": 2}
BARE = {"answer_weight": 0.0}
DISTILS = {"grounding_weight": 0.0, "distillation_weight": 1.0, "mask_temperature": 0.6}
# What the glimpse is, what it learns by, and whether a late glimpse teaches it.
CASES = {
    "in place": (GLIMPSE, {}, False),
    "no answers": (GLIMPSE, BARE, False),
    "own weights": (GLIMPSE | {"glimpse_lora_rank": 2}, BARE, False),
    "read ahead": (EARLY, BARE, False),
    "read ahead, with a teacher": (EARLY, BARE | {"late_weight": 0.5}, True),
    "distillation": (GLIMPSE, DISTILS, False),
    "distillation, read ahead": (EARLY, DISTILS, False),
    "everything": (GLIMPSE, {"distillation_weight": 0.5, "late_weight": 0.5}, True),
    "two columns": (GLIMPSE | {"num_glimpse_tokens": 2, "attention_layers": [0, 1]}, {}, False),
}


@pytest.fixture(scope="module")
def bare_data(data):
    """The questions, most of them without an answer."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines[1:]:
        line["answer"] = None
    path = data.with_name("mostly_bare.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_whole_prompts(base, data, late, case):
    glimpse, settings, taught = CASES[case]
    trainer = trainer_that_learns(base, glimpse, settings, late if taught else None)
    batch = collate(data, trainer.processor, [1, 0, 3, 4, 5])  # of pages of three sizes
    assert not batch["attention_mask"][:, 0].all()
    expected, found = (step(trainer, batch, look_once) for look_once in (False, True))
    assert_same_step(found, expected)
    trained = {name for name, each in trainer.model.named_parameters() if each.requires_grad}
    assert found[1].keys() == trained and all(each.any() for each in found[1].values())


@pytest.mark.parametrize("case", ["distillation", "distillation, read ahead"])
def test_double_precision_is_exact(base, data, case):
    """Of the losses that are not computed in float32."""
    glimpse, settings, _ = CASES[case]
    trainer = trainer_that_learns(base, glimpse, settings)
    in_double_precision(trainer.model)
    batch = collate(data, trainer.processor, [1, 0, 3])
    batch["visuals"] = {name: as_double(value) for name, value in batch["visuals"].items()}
    expected, found = (step(trainer, batch, look_once) for look_once in (False, True))
    assert expected[0].dtype == torch.float64
    assert abs(found[0] - expected[0]) < 1e-10
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() < 1e-10, name


@pytest.mark.parametrize("case", ["in place", "read ahead", "distillation"])
def test_checkpointing_over_looks_changes_nothing(base, data, case):
    glimpse, settings, _ = CASES[case]
    trainer = trainer_that_learns(base, glimpse, settings)
    batch = collate(data, trainer.processor, [0, 1, 4])
    expected = step(trainer, batch, True)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(trainer, batch, True), expected)


@torch.no_grad()
@pytest.mark.parametrize("case", ["in place", "distillation", "read ahead, with a teacher"])
def test_evaluations_are_those_of_whole_prompts(base, data, late, case):
    glimpse, settings, taught = CASES[case]
    trainer = trainer_that_learns(base, glimpse, settings, late if taught else None)
    model, batch = trainer.model.eval(), collate(data, trainer.processor, [0, 1, 3, 4])
    expected = trainer.compute_loss(model, batch)
    trainer.args.look_once = True
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, atol=1e-5, rtol=1e-5)


def test_the_bases_own_answers_come_over_the_look(base, bare_data, monkeypatch):
    trainer = trainer_that_learns(base, GLIMPSE, DISTILS | {"max_answer_tokens": 4})
    batch = collate(bare_data, trainer.processor, [0, 1, 2, 3])
    expected = step(trainer, batch, False)
    encoded = []
    trainer.model.model.visual.patch_embed.register_forward_hook(
        lambda _, args, __: encoded.append(len(args[0]))
    )
    assert_same_step(step(trainer, batch, True), expected)
    assert encoded == [len(batch["visuals"]["pixel_values"])]


def test_the_recipe_says_so(base, data, tmp_path):
    """Steps in proportion to gradients, so that weights are as near as those."""
    settings = {"training.optim": "sgd", "questions_per_image": 2}
    weights = []
    for look_once in (False, True):
        given = settings | {"training.look_once": look_once}
        recipe = recipe_of(base, data, tmp_path / f"looks_{look_once}", **given)
        assert train_stage1(recipe)["training"]["look_once"] is look_once
        weights.append(load_file(Path(recipe.output) / "model.safetensors"))
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=1e-5, rtol=1e-4)


# Decoder operations that a step over looks may take, as a share of those by whole prompts, and why.
# Eight questions share a page: of 66 tokens of a prompt 52 are the page's.
SHARES = {
    # Every layer runs (52 / 8 + 14 + glimpse and answer 3) / 69 = .34 of the tokens. What the
    # glimpse and the answer learn through is the same either way.
    "in place": 0.45,
    # The same of layers 0 and 1, where the glimpse ends.
    "no answers": 0.45,
    # Layers 0 and 1 run once a page, for glimpse, teacher and soft mask. Layer 2 runs for the two
    # latter, and backward for the soft mask, as before: about as much as is saved.
    "distillation": 0.7,
}


@pytest.mark.parametrize("case", SHARES)
def test_operations_that_looks_save(base, tmp_path, case):
    glimpse, settings, _ = CASES[case]
    trainer = trainer_that_learns(base, glimpse, settings)
    batch = collate(write_page(tmp_path), trainer.processor, list(range(8)))
    assert trainer.model.model.visual_counts(batch["input_ids"]) == [48] * 8
    assert batch["prompt_length"] == 66
    whole, looked = (operations(trainer, batch, look_once) for look_once in (False, True))
    assert looked < SHARES[case] * whole


def operations(trainer, batch, look_once) -> int:
    """Of a step, in decoder and glimpse token."""
    with FlopCounterMode(display=False) as counter:
        step(trainer, batch, look_once)
    of_modules = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    others = ("VisionEncoder", "glimpse.predictor")
    return of_modules["Global"] - sum(
        count for name, count in of_modules.items() if name.endswith(others)
    )
