"""Stage 1 with redundant patches left out in front of the encoder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stage1_data import (
    GLIMPSE,
    assert_same_step,
    collate,
    recipe_of,
    step,
    trainer_that_learns,
)
from test_stage1_objectives import plain_inputs, plain_prompt

from glimpseprune.loading import load_model
from glimpseprune.training.base import load_for_training
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Config
from glimpseprune.training.stage1_losses import (
    answer_loss,
    bce_loss,
    dice_loss,
    distillation_loss,
)
from glimpseprune.training.stage1_trainer import Stage1Trainer

BLANK = 250
ROWS = [0, 1, 3, 5]  # two questions about one image, one about each of the others


@pytest.fixture(scope="module")
def blank_data(data, tmp_path_factory):
    """The same questions about images whose right part and last row are blank; so is evidence."""
    folder = tmp_path_factory.mktemp("blank")
    for path in data.parent.glob("*.png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:, pixels.shape[1] // 56 * 28 :] = BLANK
        pixels[-28:] = BLANK
        Image.fromarray(pixels).save(folder / path.name)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines[1::2]:
        line["bboxs"] = [[0, 0, line["width"], line["height"]]]
    path = folder / data.name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trainer_of(base, **settings) -> Stage1Trainer:
    torch.manual_seed(0)
    model, processor, _ = load_for_training(str(base), GLIMPSE | {"redundant_patches": 0})
    config = Stage1Config(output_dir="unused", bf16=False, use_cpu=True, **settings)
    trainer = Stage1Trainer(model, config)
    trainer.processor = processor
    return trainer


def parts_of(trainer, batch) -> dict:
    inputs = dict(batch)
    names, evidence = inputs.pop("names"), inputs.pop("evidence_mask")
    parts, record, _ = trainer._parts(trainer.model, inputs, evidence)
    assert len(names) == len(ROWS)
    return parts | {"record": record}


@torch.no_grad()
def test_grounding_is_of_what_was_encoded(base, blank_data):
    """As from pixels by `visual_encode_mask`: `test_before_encoder.py` holds it to a slow way."""
    trainer = trainer_of(base)
    model, batch = trainer.model.eval(), collate(blank_data, trainer.processor, ROWS)
    evidence, start = batch["evidence_mask"], batch["prompt_length"]
    found = parts_of(trainer, batch)
    encoded = found["record"].encoded
    assert 0.2 < encoded.float().mean() < 0.9 and evidence[~encoded].any()
    model.config.redundant_patches = None
    given = {"visual_encode_mask": encoded}
    record = model.glimpse(**plain_prompt(batch), **given)
    located = (record.importance[encoded], evidence[encoded], record.rows[encoded], len(ROWS))
    torch.testing.assert_close(found["dice_loss"], dice_loss(*located))
    torch.testing.assert_close(found["bce_loss"], bce_loss(*located))
    logits = model(**plain_inputs(batch), **given, in_place=True).logits[:, start - 1 : -1]
    expected = answer_loss(logits, batch["labels"][:, start:])
    torch.testing.assert_close(found["answer_loss"], expected.expand(len(ROWS)))


@torch.no_grad()
def test_a_student_without_them_learns_from_a_base_that_sees_everything(base, blank_data):
    settings = {"grounding_weight": 0.0, "distillation_weight": 1.0, "retention_weight": 0.0}
    trainer = trainer_of(base, **settings)
    model, batch = trainer.model.eval(), collate(blank_data, trainer.processor, ROWS)
    found = parts_of(trainer, batch)["distillation_loss"]
    inputs, start = plain_inputs(batch), batch["prompt_length"]
    teacher, student, whole = (
        model(**inputs, **settings).logits[:, start - 1 : -1]
        for settings in ({"prune": False}, {}, {"redundant_patches": False})
    )
    labels = batch["labels"][:, start:]
    torch.testing.assert_close(found, distillation_loss(teacher, student, labels))
    assert (found - distillation_loss(teacher, whole, labels)).abs().max() > 1e-4


@pytest.mark.parametrize("taught", [False, True], ids=["distillation", "late teacher"])
def test_over_looks_it_learns_the_same(base, blank_data, late, taught):
    """Teachers, and the base's own answers, see everything there, too."""
    weights = {"late_weight": 0.5} if taught else {"distillation_weight": 1.0}
    settings = {"answer_weight": 0.0, "max_answer_tokens": 4} | weights
    settings |= {"grounding_weight": float(taught)}
    glimpse = GLIMPSE | {"redundant_patches": 0, "prune_layer": 0}  # in place needs whole images
    trainer = trainer_that_learns(base, glimpse, settings, late if taught else None)
    batch = collate(blank_data, trainer.processor, ROWS)
    batch["labels"][0] = -100
    expected, found = (step(trainer, dict(batch), look_once) for look_once in (False, True))
    assert_same_step(found, expected)


def test_a_glimpse_in_place_cannot_look_at_parts(base):
    """Said before the first step, by a trainer; by a recipe before data and weights are read."""
    with pytest.raises(ValueError, match="look_once with redundant_patches needs a glimpse beside"):
        trainer_of(base, look_once=True)
    trainer_of(base, look_once=False)
    asked = {"glimpse.redundant_patches": 0, "training.look_once": True}
    refused = recipe_of(base, "/nowhere", "/nowhere/out", **asked)
    with pytest.raises(ValueError, match="look_once with redundant_patches needs a glimpse beside"):
        train_stage1(refused)
    for beside in ({"glimpse.prune_layer": 0}, {"glimpse.glimpse_lora_rank": 2}):
        given = asked | beside | {"training.answer_weight": 0.0}
        with pytest.raises(FileNotFoundError):
            train_stage1(recipe_of(base, "/nowhere/data.jsonl", "/nowhere/out", **given))


@pytest.mark.parametrize("weights", [{}, {"distillation_weight": 1.0}])
def test_gradients_are_numbers(base, blank_data, weights):
    trainer = trainer_of(base, **weights)
    model, batch = trainer.model.train(), collate(blank_data, trainer.processor, ROWS)
    trainer.compute_loss(model, batch).backward()
    gradients = {name: each.grad for name, each in model.model.glimpse.named_parameters()}
    assert all(each is None or each.isfinite().all() for each in gradients.values())
    assert gradients["token.embeddings"].abs().max() > 0


@pytest.mark.parametrize(
    "objective",
    [{}, {"training.grounding_weight": 0.0, "training.distillation_weight": 1.0}],
    ids=["grounding", "distillation"],
)
def test_a_recipe_trains_with_it_and_its_repository_goes_on(base, blank_data, tmp_path, objective):
    recipe = recipe_of(
        base, blank_data, tmp_path / "out", **{"glimpse.redundant_patches": 0}, **objective
    )
    summary = train_stage1(recipe)
    assert np.isfinite(summary["metrics"]["loss"])
    assert json.loads((tmp_path / "out/config.json").read_text())["redundant_patches"] == 0
    model, _ = load_model(tmp_path / "out", "cpu")
    assert model.config.redundant_patches == 0
    at_parts = recipe_of(
        tmp_path / "out", "/nowhere", "/nowhere/out", **{"training.look_once": True}
    )
    with pytest.raises(ValueError, match="look_once with redundant_patches"):  # as it was trained
        train_stage1(at_parts)
    goes_on = {"glimpse.redundant_patches": 16.0}
    other = recipe_of(tmp_path / "out", blank_data, tmp_path / "more", **goes_on, **objective)
    train_stage1(other)
    assert json.loads((tmp_path / "more/config.json").read_text())["redundant_patches"] == 16
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "more"))
    assert not torch.equal(*(each["model.glimpse.token.embeddings"] for each in (before, after)))
