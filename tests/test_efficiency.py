"""The efficiency benchmark on tiny models: what it measures is measured, and the page shows it."""

import time

import pytest
import torch

from benchmarks.efficiency.measurement import CLOCKS, StepClock, clocked_module
from benchmarks.efficiency.page import write_page
from benchmarks.efficiency.points import Centre, Point, measure, points_of
from benchmarks.efficiency.workload import REAL, SCALED, Pair, build_config, build_prompt
from glimpseprune.prefill_cost import (
    OFFICIAL_PREDICTOR_7B,
    QWEN2_5_VL_7B,
    pruned_prefill,
    stock_prefill,
)

CENTRE = Centre("tests", torch.device("cpu"), torch.float32, "sdpa", 5, 1)


def measured(models, **changes) -> dict:
    layer = models.pruned.config.glimpse_layer
    for model in models:
        model.requires_grad_(False)  # torch's counter follows gradients where there could be any
    point = Point(**({"sweep": "centre", "visual_tokens": 24, "retention": 0.25, "batch": 2,
                      "new_tokens": 3, "glimpse_layer": layer} | changes))  # fmt: skip
    return measure(CENTRE, point, Pair(*models))


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def family(request):
    return request.param


def test_a_point(build_models):
    models = build_models(hidden_size=64)
    result = measured(models)
    visual, kept, text = result["visual"], result["kept"], result["text"]
    assert kept == visual // 4 and text >= 5
    held = result["cache bytes after the prefill"]
    assert held["pruned"] / held["stock"] == pytest.approx((text + kept) / (text + visual))
    below = models.pruned.config.glimpse_layer + 1
    average = (below * visual + (3 - below) * kept) / 3
    assert result["average visual tokens a layer"] == pytest.approx(average)
    stock, pruned = (result["operations"][name] for name in ("stock", "pruned"))
    assert stock["vision"] == pruned["vision"] > 0 == stock["predictor"] < pruned["predictor"]
    assert pruned["decoder above P"] < stock["decoder above P"]
    for seconds in ("seconds to the first token", "seconds a decode step"):
        assert set(result[seconds]) == {"stock", "pruned", "unpruned", "equal cache"}
        assert min(result[seconds].values()) > 0
    assert set(result["profiles"]) == {"stock", "pruned", "pruned decode step"}
    assert "decode step" not in measured(models, new_tokens=1, sweep="new_tokens")["ratios"]


class Waits(torch.nn.Module):
    def forward(self):
        time.sleep(0.2)


def test_waiting_is_on_the_wall_clock_alone():
    seconds = {}
    for name, clock in CLOCKS.items():
        module = Waits()
        with clocked_module(module, torch.device("cpu"), clock) as of_module:
            steps = StepClock(torch.device("cpu"), clock)
            module()
            steps(torch.zeros(1, 1), None)
        seconds[name] = [*of_module, *steps.seconds]
    assert min(seconds["wall"]) >= 0.2 > max(seconds["processor"])


def test_page(build_models, tmp_path):
    models = build_models()
    points = [measured(models), measured(models, sweep="retention", retention=0.5)]
    results = {"machine": {"device": "a machine"}, "settings": {}, "points": points}
    write_page(results, tmp_path / "efficiency.md")
    page = (tmp_path / "efficiency.md").read_text()
    assert "a machine" in page and (tmp_path / "efficiency_retention.png").stat().st_size > 1000
    for point in points:
        assert f"{point['ratios']['decoder operations']:.3f}" in page
    paper = pruned_prefill(QWEN2_5_VL_7B, OFFICIAL_PREDICTOR_7B, 18, 60, 5074, 202)
    assert f"it is\n{paper / stock_prefill(QWEN2_5_VL_7B, 5134):.4f}." in page


def test_sweeps_change_one_setting_of_the_centre():
    points = points_of({
        "visual_tokens": [9, 5], "retention": [0.1], "batch": [1, 2, 4], "new_tokens": [2],
        "glimpse_layer": [3, 1], "prune_layer": [None],
    })  # fmt: skip
    assert points[0] == Point("centre", 9, 0.1, 1, 2, 3, 3)
    assert [(point.sweep, point.visual_tokens, point.batch) for point in points[1:]] == [
        ("visual_tokens", 5, 1), ("batch", 9, 2), ("batch", 9, 4), ("glimpse_layer", 9, 1),
    ]  # fmt: skip
    assert (points[-1].glimpse_layer, points[-1].prune_layer) == (1, 1)


def test_prune_layers_are_swept_at_every_prompt_length_and_never_above_the_glimpse():
    points = points_of({
        "visual_tokens": [9, 5], "retention": [0.1], "batch": [1], "new_tokens": [2],
        "glimpse_layer": [3, 1], "prune_layer": [3, 2],
    })  # fmt: skip
    swept = [(point.visual_tokens, point.glimpse_layer, point.prune_layer) for point in points]
    assert swept == [(9, 3, 3), (5, 3, 3), (9, 1, 1), (9, 3, 2), (5, 3, 2)]


def test_an_early_point_is_measured_beside_the_late_one(build_models, tmp_path):
    models = build_models()
    early = measured(models, sweep="prune_layer", prune_layer=0)
    late = measured(models)
    for name in ("decoder operations", "peak memory"):
        assert early["ratios"][f"{name}, P = K"] == late["ratios"][name]
    assert early["ratios"]["decoder operations"] < late["ratios"]["decoder operations"]
    assert len(early["every time"]["first token"]["at K"]) == early["repetitions"]
    ratios = early["ratios"]
    cell = f"{ratios['first token']:.3f} ({ratios['first token, P = K']:.3f})"
    both = {"machine": {"device": "another"}, "settings": {}, "points": [late, early]}
    write_page(both, tmp_path / "efficiency.md")
    assert cell in (tmp_path / "efficiency.md").read_text()
    without = {"machine": {"device": "a machine"}, "settings": {}, "points": [late]}
    write_page(without, tmp_path / "efficiency.md")
    assert cell not in (tmp_path / "efficiency.md").read_text()
    write_page(without, tmp_path / "efficiency.md", both)
    page = (tmp_path / "efficiency.md").read_text()
    assert cell in page and "another" in page and "a machine" in page


@pytest.mark.parametrize("geometry", [*REAL, SCALED])
def test_geometries(geometry):
    config = build_config(geometry, 5)
    assert config["glimpse_layer"] == 5 and config["attention_layers"] == [5]
    with pytest.raises(ValueError, match="geometry must be one of"):
        build_config("other", None)


def test_prompts_are_near_the_wanted_size(build_models):
    model = build_models().pruned
    prompt = build_prompt(model, 2, 30, 7, torch.float32)
    counts = model.model.visual_counts(**prompt.inputs)
    assert counts == [prompt.visual] * 2 and abs(prompt.visual - 30) <= 15
    assert prompt.inputs["input_ids"].shape == (2, prompt.visual + prompt.text)
