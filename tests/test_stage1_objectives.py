"""Stage 1's objectives: distillation without boxes and answers, retention, and what stops a run."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from double_precision import as_double, in_double_precision
from safetensors.torch import load_file
from stage1_data import GLIMPSE, collate, recipe_of

from glimpseprune.data.visual_cot import VisualCoTError
from glimpseprune.data.visual_cot_collator import IGNORED_LABEL, repeat_visuals
from glimpseprune.training import stage1_losses
from glimpseprune.training.base import load_for_training
from glimpseprune.training.checkpoints import last_checkpoint
from glimpseprune.training.run_plot import PLOT, plot_run
from glimpseprune.training.soft_mask import annealed, log_keep_probability, logistic_noise
from glimpseprune.training.stage1 import train_stage1
from glimpseprune.training.stage1_config import Stage1Config
from glimpseprune.training.stage1_losses import distillation_loss, retention_loss
from glimpseprune.training.stage1_trainer import LossNotFinite, Stage1Trainer, with_completions

DISTILLATION = {"training.grounding_weight": 0.0, "training.distillation_weight": 1.0}
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(scope="module")
def bare_data(data):
    """The same questions without boxes and answers, but for the answers of the first image."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for number, line in enumerate(lines):
        del line["bboxs"]
        if number > 1:
            line["answer"] = ""
    path = data.with_name("bare.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_trainer(base, **settings) -> Stage1Trainer:
    torch.manual_seed(0)
    model, processor, _ = load_for_training(str(base), GLIMPSE)
    settings = {"grounding_weight": 0.0, "distillation_weight": 1.0} | settings
    config = Stage1Config(output_dir="unused", bf16=False, use_cpu=True, **settings)
    trainer = Stage1Trainer(model, config)
    trainer.processor = processor
    return trainer


# Losses and masks


def test_distillation_loss_equals_a_slow_formula():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    labels = torch.tensor([[1, 2, -100, -100], [3, 0, 0, 4], [-100] * 4])
    found = distillation_loss(teacher, student, labels).tolist()
    for row in range(3):
        divergences = [0.0] if row == 2 else []
        for place in range(4):
            if labels[row, place] == -100:
                continue
            p, q = (each[row, place].exp() for each in (teacher, student))
            p, q = ((each / each.sum()).tolist() for each in (p, q))
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        assert found[row] == pytest.approx(sum(divergences) / len(divergences), abs=1e-6)
    assert distillation_loss(teacher, teacher, labels).abs().max() < 1e-6


def test_retention_loss_is_a_price_or_a_target():
    importance = torch.tensor([20.0, -20.0, -20.0, 20.0, 0.0])
    rows = torch.tensor([0, 0, 0, 1, 1])
    price = retention_loss(importance, rows, 2, None)
    assert torch.allclose(price, torch.tensor([1 / 3, 0.75]), atol=1e-6)
    mean = (1 / 3 + 0.75) / 2
    for target in (0.1, 0.9):
        expected = (mean - target) ** 2 / target
        assert torch.allclose(retention_loss(importance, rows, 2, target), torch.tensor(expected))


def test_noisy_masks_keep_as_often_as_importance_says():
    torch.manual_seed(0)
    importance = torch.tensor([-3.0, -1.0, 0.0, 2.0]).repeat(20_000, 1)
    for temperature in (1.0, 0.05):
        drawn = log_keep_probability(importance, temperature, logistic_noise(importance))
        kept = (drawn > math.log(0.5)).float().mean(0)
        assert torch.allclose(kept, importance[0].sigmoid(), atol=0.01)
    assert ((drawn > -0.1) | (drawn < -3)).float().mean() > 0.9  # nearly hard
    assert drawn.max() <= 0 and drawn.isfinite().all()


def test_without_noise_it_is_the_probability_and_sharpens():
    importance = torch.linspace(-4, 4, 9)
    assert torch.allclose(log_keep_probability(importance).exp(), importance.sigmoid())
    sharp = log_keep_probability(importance, 0.01).exp()
    assert torch.allclose(sharp[importance != 0], (importance > 0).float()[importance != 0])


def test_temperature_falls_from_start_to_end():
    found = [annealed(1.0, 0.01, progress) for progress in (0.0, 0.5, 1.0, 1.5)]
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.01])


# The trainer


def plain_inputs(batch: dict) -> dict:
    """What the model takes of a batch without the trainer's help."""
    inputs = {name: batch[name] for name in TEXT if name in batch}
    visuals = repeat_visuals(batch["visuals"], batch["image_index"])
    return inputs | visuals | {"prompt_length": batch["prompt_length"]}


def plain_prompt(batch: dict) -> dict:
    inputs = plain_inputs(batch)
    start = inputs.pop("prompt_length")
    return inputs | {name: inputs[name][:, :start] for name in TEXT if name in inputs}


@torch.no_grad()
def test_evaluation_measures_the_hard_mask(base, data):
    trainer = make_trainer(base, retention_weight=0.0)
    model, batch = trainer.model.eval(), collate(data, trainer.processor, [0, 1, 3, 5])
    assert 0 < model.glimpse(**plain_prompt(batch)).retention < 0.9
    found = trainer.compute_loss(model, batch)
    inputs, start = plain_inputs(batch), batch["prompt_length"]
    logits = [model(**inputs, **{"prune": keep_all}).logits for keep_all in (False, True)]
    teacher, student = (each[:, start - 1 : -1] for each in logits)
    expected = distillation_loss(teacher, student, batch["labels"][:, start:])
    torch.testing.assert_close(found, expected.mean())
    assert found > 1e-3


def test_gradients_equal_finite_differences(base, data):
    """Of the whole objective by weights of token and predictor, noise included, in float64."""
    trainer = make_trainer(base, retention_weight=0.7, retention_target=0.2, mask_temperature=0.6)
    model = in_double_precision(trainer.model.train())
    trainer.state.max_steps = 10
    batch = collate(data, trainer.processor, [0, 1, 3, 4])
    batch["visuals"] = {name: as_double(value) for name, value in batch["visuals"].items()}

    def loss():
        torch.manual_seed(5)  # the same noise
        return trainer.compute_loss(model, batch)

    glimpse = dict(model.model.glimpse.named_parameters())
    loss().backward()
    for name in ("token.embeddings", "token.norm.weight", "predictor.output_projection.bias"):
        weight = glimpse[name]
        entry = weight.grad.abs().argmax()
        gradient, flat = weight.grad.flatten()[entry].item(), weight.data.view(-1)
        values = []
        for step in (1e-5, -2e-5):
            flat[entry] += step
            with torch.no_grad():
                values.append(loss().item())
        flat[entry] += 1e-5
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient, rel=1e-4), name
        assert abs(gradient) > 1e-7, name
    frozen = [weight.grad for name, weight in model.named_parameters() if "glimpse" not in name]
    assert not any(gradient is not None for gradient in frozen)


def test_both_objectives_add_up(base, data):
    losses = {}
    for grounding, distillation in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):
        trainer = make_trainer(
            base, grounding_weight=grounding, distillation_weight=distillation, mask_noise=False
        )
        batch = collate(data, trainer.processor, [0, 3])
        losses[grounding, distillation] = trainer.compute_loss(trainer.model.train(), batch).item()
    expected = 0.5 * losses[1.0, 0.0] + 2 * losses[0.0, 1.0]
    assert losses[0.5, 2.0] == pytest.approx(expected, rel=1e-5)


def test_a_row_without_an_answer_takes_the_models_own(base, bare_data):
    trainer = make_trainer(base, max_answer_tokens=5)
    rows = [0, 2, 3, 5]
    batch = collate(bare_data, trainer.processor, rows)
    start, given = batch["prompt_length"], batch["labels"]
    filled = trainer._with_own_answers(batch)
    labels = filled["labels"][:, start:]
    model = trainer.model.eval()
    for place, row in enumerate(rows):
        found = labels[place][labels[place] != IGNORED_LABEL]
        if place == 0:
            assert found.tolist() == given[0][given[0] != IGNORED_LABEL].tolist()
            continue
        alone = collate(bare_data, trainer.processor, [row])
        options = {"prune": False, "do_sample": False, "max_new_tokens": 5}
        sequence = model.generate(**plain_prompt(alone), **options)[0, alone["prompt_length"] :]
        assert found.tolist() == sequence.tolist()
        assert filled["attention_mask"][place, start:].sum() == len(sequence)
    assert filled["input_ids"].shape == filled["labels"].shape == filled["attention_mask"].shape


def test_own_answers_stop_at_their_end():
    inputs = {
        "input_ids": torch.tensor([[7, 8, 1, 2, 3], [7, 8, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 1, 2, 3], [-100] * 5]),
        "prompt_length": 2,
    }
    own = torch.tensor([[4, 4, 4, 4], [5, 9, 9, 9]])
    filled = with_completions(inputs, own, torch.tensor([False, True]), [9])
    assert filled["input_ids"].tolist() == [[7, 8, 1, 2, 3, 0], [7, 8, 5, 9, 0, 0]]
    assert filled["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert filled["labels"][:, 2:].tolist() == [[1, 2, 3, -100], [5, 9, -100, -100]]


def logged(recipe) -> list[dict]:
    state = (last_checkpoint(recipe.checkpoint_folder) / "trainer_state.json").read_text()
    return [entry for entry in json.loads(state)["log_history"] if "loss" in entry]


def test_distillation_learns_without_boxes_and_answers(base, bare_data, tmp_path):
    settings = {"training.max_steps": 20, "training.max_answer_tokens": 4}
    settings["questions_per_image"] = 2
    recipe = recipe_of(base, bare_data, tmp_path / "trained", **DISTILLATION, **settings)
    summary = train_stage1(recipe)
    history = logged(recipe)
    assert {"distillation_loss", "retention_loss", "retention"} <= set(history[0])
    assert not {"dice_loss", "answer_loss", "iou", "recall"} & set(history[0])
    for name, factor in (("loss", 0.8), ("retention_loss", 0.5)):
        first, last = (sum(each[name] for each in part) for part in (history[:5], history[-5:]))
        assert last < factor * first, name
    trained = load_file(Path(recipe.output) / "model.safetensors")
    fresh = load_for_training(str(base), GLIMPSE)[0].state_dict()
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed and all(name.startswith("model.glimpse.") for name in changed)
    assert summary["questions"] == 6


def test_grounding_learns_on_request_that_nothing_is_to_be_seen(base, data, tmp_path):
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    emptied = data.with_name("emptied.jsonl")
    emptied.write_text("".join(json.dumps(line | {"bboxs": []}) + "\n" for line in lines))
    settings = {"training.max_steps": 20, "training.answer_weight": 0.0}
    with pytest.raises(VisualCoTError, match="bboxs is empty"):
        train_stage1(recipe_of(base, emptied, tmp_path / "refused", **settings))
    recipe = recipe_of(
        base, emptied, tmp_path / "taught", learn_rows_without_boxes=True, **settings
    )
    train_stage1(recipe)
    losses = [entry["dice_loss"] for entry in logged(recipe)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_grounding_wants_boxes_and_answers(base, bare_data, tmp_path):
    for weights, message in (
        ({"training.distillation_weight": 1.0}, "line 1: missing bboxs"),
        ({}, "line 1: missing bboxs"),
    ):
        recipe = recipe_of(base, bare_data, tmp_path / "trained", **weights)
        with pytest.raises(ValueError, match=message):
            train_stage1(recipe)


def test_a_loss_that_is_no_number_stops_the_run(base, data, tmp_path, monkeypatch):
    """It says at which step, in which part, and of which questions."""
    calls = []

    def broken(importance, evidence, rows, num_rows):
        calls.append(num_rows)
        losses = importance.new_zeros(num_rows)
        if len(calls) == 3:
            losses[1] = float("nan")
        return losses

    monkeypatch.setattr(stage1_losses, "bce_loss", broken)
    recipe = recipe_of(base, data, tmp_path / "trained", **{"training.save_steps": 1})
    message = r"at step 3 the loss is no finite number: bce_loss of .*[abc].png: 'What is the value"
    with pytest.raises(LossNotFinite, match=message) as caught:
        train_stage1(recipe)
    assert str(caught.value).count(".png") == 1
    assert last_checkpoint(recipe.checkpoint_folder).name == "checkpoint-2"
    assert not Path(recipe.output).exists()


# The plot, and the trackers


def test_plot_of_a_run(base, data, tmp_path):
    pytest.importorskip("matplotlib")
    validation = {"validation_data": str(data), "training.eval_steps": 2}
    recipe = recipe_of(base, data, tmp_path / "trained", **validation)
    train_stage1(recipe)
    assert (recipe.checkpoint_folder / PLOT).read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib_or_figures(tmp_path, monkeypatch, caplog):
    assert not plot_run([{"step": 3, "train_loss": 1.0}], tmp_path / PLOT)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_run([{"step": 3, "loss": 1.0}], tmp_path / PLOT)
    assert "matplotlib is not installed" in caplog.text
    assert not (tmp_path / PLOT).exists()


def test_tensorboard_is_told(base, data, tmp_path):
    pytest.importorskip("tensorboard")
    settings = {"training.report_to": "tensorboard", "training.max_steps": 1}
    recipe = recipe_of(base, data, tmp_path / "trained", **settings)
    train_stage1(recipe)
    assert list(recipe.checkpoint_folder.rglob("events.out.tfevents.*"))
