"""`glimpseprune calibrate`: thresholds, agreement with the late glimpse, and the choice."""

import json
import math

import pytest
import torch
from PIL import Image

from glimpseprune import calibration
from glimpseprune.calibration import (
    Calibration,
    LayerFigures,
    candidate_layers,
    threshold_for,
    top_overlap,
)
from glimpseprune.cli import main


def figures(layer: int, accuracy: float | None, agreement: float, cost: float) -> LayerFigures:
    return LayerFigures(layer, (1.0, 1.0, 1.0), None, 0.5, 0.1, agreement, accuracy, cost)


def test_a_threshold_keeps_the_wanted_share_and_no_more():
    """A small prompt's tokens weigh as much together as a large one's."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, generator=generator) for n in (40, 100, 400)]
    for wanted in (0.05, 0.11, 0.5):
        threshold = threshold_for(rows, wanted)
        kept = sum((row.sigmoid() > threshold).float().mean().item() for row in rows) / len(rows)
        # One token more would exceed it: at most 1/40 of the smallest prompt, a third of the mean.
        assert wanted - 1 / 40 / 3 - 1e-6 <= kept <= wanted + 1e-6
    assert threshold_for(rows, 1.0) == 0.0


def test_overlap_of_the_best_scored():
    late = torch.tensor([9.0, 8, 1, 0, 0, 0, 0, 0, 0, 0])
    early = torch.tensor([9.0, 0, 0, 8, 0, 0, 0, 0, 0, 0])
    assert top_overlap(late, late, 0.2) == 1.0
    assert top_overlap(early, late, 0.2) == 0.5
    assert top_overlap(early, late, 0.01) == 1.0  # at least one token
    left_out = torch.tensor([-math.inf, 2.0, 1.0, -math.inf])
    assert top_overlap(left_out, left_out.flip(0), 1.0) == 1.0  # of the two that were encoded


@pytest.mark.parametrize(
    "glimpse_layer, wanted, layers",
    [(3, None, [3, 2, 1, 0]), (18, None, [18, 15, 12, 9, 6, 3, 0]), (5, [0, 2], [5, 2, 0])],
)
def test_candidates_begin_with_the_glimpse_layer(glimpse_layer, wanted, layers):
    assert candidate_layers(glimpse_layer, wanted) == layers


@pytest.mark.parametrize("accuracies", [(0.9, 0.895, 0.6), (None, None, None)])
def test_the_cheapest_that_is_good_enough_is_chosen(accuracies):
    agreements, costs = (0.95, 0.945, 0.7), (0.67, 0.3, 0.1)
    layers = [figures(*each) for each in zip((4, 2, 0), accuracies, agreements, costs, strict=True)]
    calibrated = Calibration(layers, 100, None, 0.11)
    assert calibrated.choose(0.01).prune_layer == 2
    assert calibrated.choose(0.001).prune_layer == 4
    assert calibrated.choose(0.5).prune_layer == 0


@pytest.fixture
def tiny_copy(tmp_path):
    from glimpseprune.loading import load_model

    model, processor = load_model(calibration_model())
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def calibration_model():
    from glimpseprune.loading import TINY_MODEL

    return TINY_MODEL


def test_the_choice_is_written_and_used(tiny_copy, tmp_path, capsys):
    output = tmp_path / "out" / "calibration.json"
    arguments = ["--model", str(tiny_copy), "--questions", "12", "--tolerance", "1"]
    assert main(["calibrate", *arguments, "--output", str(output), "--write"]) == 0
    printed = capsys.readouterr().out
    assert "chosen: prune_layer 0" in printed  # the cheapest, where everything is good enough
    written = json.loads(output.read_text())
    assert [each["prune_layer"] for each in written["calibration"]["layers"]] == [1, 0]
    late, early = written["calibration"]["layers"]
    assert late["late_recall"] == [1.0, 1.0, 1.0] and early["cost"] < late["cost"]
    assert all(0 < each["retention"] <= 0.11 + 1e-6 for each in (late, early))
    config = json.loads((tiny_copy / "config.json").read_text())
    assert config["prune_layer"] == 0 and config["prune_threshold"] == early["threshold"]
    from glimpseprune.loading import load_model, prepare

    model, processor = load_model(tiny_copy)
    page = Image.open(calibration_model() / "page.png").convert("RGB")
    record = model.glimpse(**prepare(processor, [page], ["What is the value of CS?"]))
    assert (record.prune_layer, record.glimpse_layer) == (0, 1)


def test_redundant_patches_are_left_out_and_written(tiny_copy, tmp_path, capsys):
    """The sweep leaves them out, says so, and so does a later one by what it wrote."""
    results = []
    for index, more in enumerate([[], ["--redundant-patches", "48", "--write"], []]):
        output = tmp_path / f"{index}.json"
        arguments = ["--model", str(tiny_copy), "--questions", "8", "--output", str(output)]
        assert main(["calibrate", *arguments, *more]) == 0
        printed = capsys.readouterr().out
        results.append(json.loads(output.read_text())["calibration"])
        encoded = results[-1]["encoded"]
        assert (f"redundant_patches 48: {encoded:.1%} of the tokens" in printed) == bool(index)
    off, on, written = results
    assert json.loads((tiny_copy / "config.json").read_text())["redundant_patches"] == 48
    assert off["redundant_patches"] is None and off["encoded"] == 1
    assert on["redundant_patches"] == written["redundant_patches"] == 48
    assert 0.5 < on["encoded"] == written["encoded"] < 1
    for without, left in zip(off["layers"], on["layers"], strict=True):
        assert left["cost"] < without["cost"]
        assert left["cost_with_encoder"] < without["cost_with_encoder"]
        assert left["retention"] <= 0.11 + 1e-6


def test_questions_and_images_suffice(tmp_path, capsys):
    Image.open(calibration_model() / "page.png").convert("RGB").save(tmp_path / "page.png")
    line = {"question": "What is the value of CS?", "image": "page.png", "dataset": "mine"}
    width, height = Image.open(tmp_path / "page.png").size
    lines = json.dumps(line | {"width": width, "height": height})
    (tmp_path / "data.jsonl").write_text(lines + "\n")
    assert main(["calibrate", "--data", str(tmp_path / "data.jsonl")]) == 0
    assert "accuracy -" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prune-layers", "2"], "prune layers must lie in 0..glimpse_layer (1): [2]"),
        (["--redundant-patches", "256"], "redundant_patches must be None, False, or grey levels"),
        (["--retention", "0"], "retention must lie in (0, 1], got 0.0"),
        (["--write", "--model", "somebody/something"], "--write needs a repository in a folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    assert main(["calibrate", "--questions", "2", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_without_images_are_refused():
    from glimpseprune.sample import Sample

    with pytest.raises(ValueError, match="calibration needs an image with every question"):
        calibration.calibrate(None, None, [Sample(None, "Why?", "")], [1, 0], 0.11)
    with pytest.raises(ValueError, match="there are no questions"):
        calibration.calibrate(None, None, [], [1, 0], 0.11)
