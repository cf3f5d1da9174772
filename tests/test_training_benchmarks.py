"""The rules by which the benchmarks of training choose and sum up."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import stage1_objectives
from glimpseprune.training.stage1_config import Stage1Config


@pytest.mark.parametrize(
    ("accuracies", "wanted", "chosen", "tried"),
    [
        ({0.5: 0.8, 0.2: 0.9}, 0.85, 0.2, 2),  # the highest that is good enough
        (
            {0.05: 0.7, 0.0005: 0.7},
            0.85,
            0.05,
            7,
        ),  # none is: the most accurate, of equals the higher
    ],
)
def test_threshold_is_the_highest_that_is_accurate(monkeypatch, accuracies, wanted, chosen, tried):
    def measure(model, processor, rows, prune_threshold):
        return {"accuracy": accuracies.get(prune_threshold, 0.1)}

    monkeypatch.setattr(stage1_objectives, "measure", measure)
    threshold, curve = stage1_objectives.choose_threshold(None, None, [], wanted)
    assert threshold == chosen and len(curve) == tried


def test_objectives_share_all_but_their_weights(tmp_path):
    arguments = Namespace(steps=200, images=2, seed=42, work=tmp_path)
    configs = {
        name: stage1_objectives.recipe_of(name, Path("base"), arguments).training_config()
        for name in stage1_objectives.OBJECTIVES
    }
    parts = {name: set(config.loss_weights()) for name, config in configs.items()}
    assert parts["grounding"] == {"dice_loss", "bce_loss", "answer_loss"}
    assert parts["distillation"] == {"distillation_loss", "retention_loss"}
    assert parts["both"] == {"dice_loss", "bce_loss", *parts["distillation"]}
    shared = {
        (config.max_steps, config.learning_rate, config.seed, config.per_device_train_batch_size)
        for config in configs.values()
    }
    assert len(shared) == 1 and isinstance(configs["both"], Stage1Config)


def test_table_of_plus_pairs_questions_with_the_base():
    plus_tiny = pytest.importorskip("benchmarks.plus_tiny", reason="stage 2 trains with trl")
    measured = {
        plus_tiny.BASE: [{"scores": [1.0, 0.0, 0.0, 1.0], "retention": 1.0}],
        "plus": [
            {"scores": [1.0, 1.0, 0.0, 1.0], "retention": 0.2},
            {"scores": [1.0, 1.0, 0.0, 0.0], "retention": 0.4},
        ],
    }
    row = plus_tiny.table(measured)["plus"]
    assert row["seeds"] == [0.75, 0.5] and row["accuracy"] == 0.625
    assert row["difference"] == 0.125 and row["of_base"] == 1.25
    assert row["retention"] == pytest.approx(0.3)
    # Over the questions, means of the seeds less the base: 0, 1, 0, -0.5.
    assert row["difference_error"] == pytest.approx((1.1875 / 3) ** 0.5 / 2)
    assert plus_tiny.table(measured)[plus_tiny.BASE]["difference_error"] == 0


def test_rows_of_plus_are_kept_in_files_of_their_own(tmp_path):
    plus_tiny = pytest.importorskip("benchmarks.plus_tiny", reason="stage 2 trains with trl")
    arms = list(plus_tiny.arms(plus_tiny.parse(["--work", str(tmp_path)])))
    assert len({arm.key for arm in arms}) == len(arms) == 2 + 3 * (1 + 2 * 3 + 2)
