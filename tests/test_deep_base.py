"""The benchmark of the deeper base: what it counts by kind, and where it says that a base looks."""

from dataclasses import replace

import pytest
import torch
from transformers import PretrainedConfig

from benchmarks.deep_base.__main__ import highest, trained_early
from benchmarks.deep_base.curves import curve
from benchmarks.deep_base.curves import table as curves_table
from benchmarks.deep_base.looking import _recall, by_place
from benchmarks.deep_base.rows import Row, evidence_share, size_of, table, table_of_sizes
from benchmarks.deep_base.seeds import table as seeds_table
from benchmarks.report.statistics import Bootstrap
from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.evaluation import Answer
from glimpseprune.sample import Sample

SAMPLES = [
    Sample(None, "?", "1", kind="value", boxes=((0, 0, 5, 5),), size=(10, 10)),
    Sample(None, "?", "2", kind="value", boxes=((0, 0, 10, 5),), size=(10, 10)),
    Sample(None, "?", "none", kind="none", size=(10, 10)),
]


def answers(scores, kept):
    return [
        Answer(sample, "", score, 10, 5, (10, count), 10)
        for sample, score, count in zip(SAMPLES, scores, kept, strict=True)
    ]


def test_figures_are_by_kind_and_over_the_base():
    base = Row.of(Method(), answers([1.0, 1.0, 1.0], [10, 10, 10]))
    keep = [torch.tensor([True, False]), torch.tensor([True, True]), torch.tensor([False, False])]
    evidence = [torch.tensor([True, True]), torch.tensor([True, True]), torch.tensor([False] * 2)]
    row = Row.of(OwnPruning(), answers([1.0, 0.0, 1.0], [3, 5, 1]), keep, evidence)
    figures = row.figures(base, Bootstrap(["a", "a", "b"]))
    assert figures["accuracy"]["value"]["mean"] == 0.5
    assert figures["accuracy"]["none"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "questions": 1}
    assert figures["over_base"]["all"]["mean"] == pytest.approx(-1 / 3)
    assert figures["kept"]["value"]["mean"] == pytest.approx(0.4)
    assert figures["evidence_kept"]["value"]["mean"] == 0.75
    assert "none" not in figures["evidence_kept"]
    assert figures["kept_with_evidence"] == pytest.approx(1.0, abs=0.02)  # .3, .5, .1: .25, .5, 0
    assert [evidence_share(sample) for sample in SAMPLES] == [0.25, 0.5, 0.0]
    shown = table({"rows": {row.name: figures}}).splitlines()[-1]
    assert shown.startswith(
        "| GlimpsePrune | 0.667 (0.75) | 1.000 | 0.500 (0.75) | 0.300 | 0.100 |"
    )


def test_figures_are_by_size_of_page():
    sizes = [(112, 56), (112, 56), (224, 224)]
    samples = [replace(each, size=size) for each, size in zip(SAMPLES, sizes, strict=True)]
    assert [size_of(sample) for sample in samples] == ["2x4", "2x4", "8x8"]
    given = [
        Answer(sample, "", score, 10, 5, (10, count), 10)
        for sample, score, count in zip(samples, (1.0, 0.0, 1.0), (4, 2, 1), strict=True)
    ]
    row = Row.of(Method(), given)
    figures = row.figures(row, Bootstrap(["a", "a", "b"]))
    assert figures["by_size"]["2x4"]["accuracy"]["value"]["questions"] == 2
    assert "value" not in figures["by_size"]["8x8"]["accuracy"]
    shown = table_of_sizes({"rows": {row.name: figures}}).splitlines()
    assert shown[0] == "| | 2x4 | 8x8 |"
    assert shown[-1] == "| all tokens | 0.500 (0.300) | 1.000 (0.100) |"


def test_the_best_scored_share_is_kept():
    assert highest(torch.tensor([0.1, 3.0, -1.0, 2.0]), 0.5).tolist() == [False, True, False, True]
    assert highest(torch.tensor([0.1, 3.0]), 0.1).sum() == 1


@pytest.mark.parametrize(("lora", "stale", "words"), [(0, 0, " without corrections"), (0, 8, "")])
def test_early_rows_say_whether_states_are_corrected(lora, stale, words):
    config = PretrainedConfig(glimpse_lora_rank=lora, stale_rank=stale)
    assert trained_early(config).format(2) == f"trained early{words}, read at 2"


def test_two_places_of_evidence_are_looked_for_one_by_one():
    first, second = (0, 0, 5, 5), (5, 5, 9, 9)
    pair = replace(SAMPLES[0], boxes=(first, second))
    named = by_place("pair", [pair])
    assert {name: samples[0].boxes for name, samples in named.items()} == {
        "pair": (first, second),
        "pair, place 1": (first,),
        "pair, place 2": (second,),
    }
    assert list(by_place("value", [pair, SAMPLES[0]])) == ["value"]


def test_recall_counts_evidence_among_the_best_attended():
    attention = torch.zeros(2, 20)
    attention[0, 3], attention[0, 4], attention[1, 5] = 1.0, 0.5, 1.0
    attention[1, 4] = 0.1
    evidence = torch.zeros(20, dtype=torch.bool)
    evidence[3:5] = True
    assert _recall(attention, evidence).tolist() == [1.0, 0.5]


def test_curves_average_the_steps_of_a_stage_that_asked_a_kind():
    steps = [
        {"step": 1, "stage": "a", "minutes": 0.1, "accuracy_of_value": 0.5, "accuracy": 0.5},
        {"step": 2, "stage": "a", "minutes": 0.2, "accuracy_of_value": float("nan"), "norm": 3.0},
        {"step": 3, "stage": "b", "minutes": 0.3, "accuracy_of_value": 1.0, "left_accuracy": 0.25},
    ]
    first, second = curve(steps)
    assert first == {
        "step": 2, "stage": "a", "minutes": 0.2, "accuracy_of_value": 0.5, "accuracy": 0.5
    }  # fmt: skip
    assert second["step"] == 3 and second["accuracy_of_value"] == 1.0
    assert curves_table([first, second]).splitlines()[2:] == [
        "| a | 2 | 0.50 |  |",
        "| b | 3 | 1.00 | 0.25 |",
    ]


def test_questions_may_be_about_pages_of_given_sizes():
    samples = read_samples(None, None, 40, 0, split="validation", grids=((6, 8), (16, 20)))
    assert {size_of(sample) for sample in samples} == {"6x8", "16x20"}


def test_seeds_show_mean_and_range_of_what_all_files_have():
    def report(score, questions=3, **more):
        row = Row.of(Method(), answers([score, 1.0, 1.0], [10, 5, 1]))
        figures = row.figures(row, Bootstrap(["a", "a", "b"]))
        return {"settings": {"questions": questions}, "rows": {"late": figures} | more}

    shown = seeds_table([report(0.0), report(1.0, early={})]).splitlines()
    assert shown[0] == "| 2 seeds | all | none | value | kept | kept by evidence, r |"
    assert shown[2].startswith("| late | 0.833 (0.667 to 1.000) | 1.000 | 0.750 (0.500 to 1.000) |")
    assert len(shown) == 3
    with pytest.raises(ValueError, match="not of the same questions"):
        seeds_table([report(0.0), report(1.0, questions=4)])
