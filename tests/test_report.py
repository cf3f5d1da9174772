"""The report's statistics, counted costs and page."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
from test_cost import geometry

from benchmarks.report.costs import PrefillCosts
from benchmarks.report.figures import Figures
from benchmarks.report.page import write_page
from benchmarks.report.records import Record, append_records, read_records
from benchmarks.report.run import run_methods
from benchmarks.report.statistics import Bootstrap
from glimpseprune.baselines.catalogue import (
    compared_methods,
    label,
    own_pruning,
    read_ahead,
    without_redundant_patches,
)
from glimpseprune.baselines.fastv import FastV
from glimpseprune.baselines.method import Method, OwnPruning, TextOnly
from glimpseprune.baselines.random_tokens import RandomTokens
from glimpseprune.baselines.scorer import AtGlimpseLayer, BeforeDecoder
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.loading import REPOSITORY, TINY_MODEL, load_model
from glimpseprune.metrics import exact_match
from glimpseprune.prefill_cost import VisionEncoder, pruned_prefill, stock_prefill

LAYERS, K, TEXT, VISUAL = 6, 1, 19, 100


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


@pytest.fixture(scope="module")
def costs(tiny):
    return PrefillCosts(tiny[0].config)


def record(method: Method, by_layer, number=0, score=1.0, page="page", evidence=0.1) -> Record:
    return Record(
        method.name, method.ratio, method.seed, number, page, "group", evidence, "", score, VISUAL,
        TEXT, tuple(by_layer), by_layer[0],
    )  # fmt: skip


def test_counted_costs_follow_the_tokens_of_each_layer(tiny, costs):
    decoder, predictor = geometry(tiny[0])
    random = RandomTokens()

    def flops(method: Method, by_layer) -> int:
        return costs.flops(method, record(method, by_layer))

    assert flops(Method(), [VISUAL] * LAYERS) == stock_prefill(decoder, TEXT + VISUAL)
    assert flops(TextOnly(), [0] * LAYERS) == stock_prefill(decoder, TEXT)
    before = BeforeDecoder("", 0.1, scorer=random)
    assert flops(before, [10] * LAYERS) == stock_prefill(decoder, TEXT + 10)
    pruned = [VISUAL] * (K + 1) + [10] * (LAYERS - K - 1)
    ours = pruned_prefill(decoder, predictor, K, TEXT, VISUAL, 10)
    assert flops(OwnPruning(), pruned) == ours
    at_layer = flops(AtGlimpseLayer("", 0.1, scorer=random), pruned)
    full, short = TEXT + VISUAL, TEXT + 10
    expected = K * decoder.layer(full) + decoder.attention(full, full) + decoder.mlp(short)
    assert at_layer == expected + (LAYERS - K - 1) * decoder.layer(short)
    assert at_layer < ours < flops(Method(), [VISUAL] * LAYERS)
    whole_layers = flops(FastV(ratio=0.1), pruned)
    reading = 2 * decoder.hidden * (decoder.hidden + full)
    assert whole_layers == at_layer + decoder.mlp(full) - decoder.mlp(short) + reading


def test_the_encoder_is_counted_over_what_it_saw(tiny, costs):
    encoder = VisionEncoder.of(tiny[0].config)
    (left_out,) = without_redundant_patches(16)
    parts = {Method(): VISUAL, TextOnly(): 0, left_out: 60}
    records = [record(method, [seen] * (K + 1) + [10] * 4) for method, seen in parts.items()]
    records[0] = record(Method(), [VISUAL] * LAYERS)
    lines = Figures(records, [*parts], costs).lines
    decoder, predictor = geometry(tiny[0])
    stock = stock_prefill(decoder, TEXT + VISUAL)
    pruned = pruned_prefill(decoder, predictor, K, TEXT, 60, 10)
    pruned += predictor.conditions(VISUAL - 60)
    line = lines[left_out.name]
    assert line.flops == pytest.approx(pruned / stock)
    whole = (pruned + encoder.cost(60)) / (stock + encoder.cost(VISUAL))
    assert line.with_encoder == pytest.approx(whole)
    assert lines["all tokens"].with_encoder == 1
    assert lines["text only"].with_encoder < lines["text only"].flops


def test_counted_costs_follow_the_prune_layer_of_the_call_and_the_repository(tiny, costs):
    (ahead,) = read_ahead(0, (0.1,))
    pruned = record(ahead, [VISUAL] + [10] * (LAYERS - 1))
    decoder, predictor = geometry(tiny[0])
    expected = pruned_prefill(decoder, predictor, K, TEXT, VISUAL, 10, 0)
    assert costs.flops(ahead, pruned) == expected < costs.flops(OwnPruning(), pruned)
    early = copy.copy(tiny[0].config)
    early.prune_layer = 0
    trained = own_pruning("early", (0.1,))
    methods = [Method(), ahead, *trained]
    records = [record(Method(), [VISUAL] * LAYERS)]
    records += [record(method, pruned.by_layer) for method in methods[1:]]
    others = {"early": PrefillCosts(early)}  # for one of the two
    lines = Figures(records, methods, costs, others).lines
    share = expected / stock_prefill(decoder, TEXT + VISUAL)
    assert lines["early"].flops == lines[label(ahead)].flops == pytest.approx(share)
    assert lines["early, capped, 10.0%"].flops > share


def test_bootstrap_resamples_pages():
    """Questions that agree within pages say less than as many independent ones."""
    generator = np.random.default_rng(0)
    by_page = generator.integers(0, 2, 50)
    values = np.repeat(by_page, 4).astype(float)
    together = Bootstrap(np.repeat(np.arange(50), 4)).estimate(values)
    apart = Bootstrap(np.arange(200)).estimate(values)
    assert together.mean == apart.mean == values.mean()
    assert together.low < apart.low < together.mean < apart.high < together.high
    expected = 1.96 * values.std() / np.sqrt(50)
    assert (together.high - together.low) / 2 == pytest.approx(expected, rel=0.15)
    assert Bootstrap(["page"] * 3).estimate([1.0, 1.0, 0.0]).low == pytest.approx(2 / 3)


def test_bootstrap_over_some_questions_knows_no_others():
    pages, values = np.repeat(np.arange(30), 2), np.arange(60) % 7 / 6
    chosen = np.arange(60) % 2 == 0
    some = Bootstrap(pages).estimate_where(np.where(chosen, values, np.nan), chosen)
    assert some == Bootstrap(pages[chosen]).estimate(values[chosen])


def test_records_are_read_as_written(tmp_path):
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    records = [record(OwnPruning(), [3, 2], number) for number in range(3)]
    append_records(path, records[:2])
    append_records(path, records[2:])
    assert read_records(path) == records


def test_gains_are_paired_and_seeds_averaged(costs):
    pages = [f"page {number // 2}" for number in range(8)]
    methods = [Method(), *(AtGlimpseLayer("random", 0.1, seed) for seed in (0, 1))]
    scores = {0: [1, 1, 0, 0, 1, 1, 0, 0], 1: [0, 0, 0, 0, 1, 1, 0, 0]}
    pruned = [VISUAL] * (K + 1) + [10] * (LAYERS - K - 1)
    records = [record(methods[0], [VISUAL] * LAYERS, n, 1.0, pages[n]) for n in range(8)]
    for method in methods[1:]:
        method_scores = scores[method.seed]
        records += [record(method, pruned, n, method_scores[n], pages[n]) for n in range(8)]
    figures = Figures(records, [Method(), *replace_scorers(methods[1:])], costs)
    line = figures.lines["random, 10.0%"]
    assert line.seeds == 2 and line.accuracy.mean == 3 / 8 and line.gain.mean == -5 / 8
    assert line.scores == (0.5, 0.5, 0, 0, 1, 1, 0, 0)
    assert line.kept == 0.1 and line.over_layers == pytest.approx((2 + 4 * 0.1) / 6)
    assert line.tokens_a_layer == pytest.approx(40.0) and 0 < line.flops < 1
    assert figures.lines["all tokens"].gain.low == figures.lines["all tokens"].gain.high == 0
    chosen = [number < 2 for number in range(8)]
    assert figures.accuracy_where("random, 10.0%", chosen) == (0.5, 2)


def replace_scorers(methods):
    return [AtGlimpseLayer(each.name, each.ratio, each.seed, RandomTokens()) for each in methods]


def test_an_interrupted_run_goes_on(tiny, tmp_path):
    """The second run answers only what the file lacks, and ends with the same records."""
    samples = read_samples(None, None, 4, seed=2)
    methods = [Method(), OwnPruning()]
    shape = (2, 8, exact_match)
    run_methods(*tiny, samples, methods, tmp_path / "whole.jsonl", *shape)
    whole = read_records(tmp_path / "whole.jsonl")
    append_records(tmp_path / "part.jsonl", whole[:4])  # one batch of two
    run_methods(*tiny, samples, methods, tmp_path / "part.jsonl", *shape)
    assert read_records(tmp_path / "part.jsonl") == whole and len(whole) == 8


def test_page_shows_every_method_and_both_retentions(costs):
    methods = compared_methods(ratios=(0.111,), seeds=(0, 1))
    records = [
        record(
            method,
            [VISUAL] * 2 + [10 + number] * 4,
            number,
            float(number < 3),
            f"p{number}",
            0.1 + number / 100,
        )
        for method in methods
        for number in range(4)
    ]
    figures = Figures(records, methods, costs)
    page = write_page("Title", "command", {"model": "tiny"}, figures, {}, [], [])
    for method in methods:
        assert f"| {method.name}" in page
    assert "| kept | over layers | tokens a layer | prefill | with encoder |" in page
    assert "answered (3) | not answered (1)" in page
    assert label(OwnPruning()) == "GlimpsePrune"


@pytest.mark.slow
def test_one_command_writes_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.report", "--output", str(tmp_path)]
    command += ["--questions", "8", "--kind-questions", "4", "--batch-size", "8"]
    command += ["--prune-layer", "0", "--early", str(TINY_MODEL), "--redundant-patches", "48"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    page = (tmp_path / "README.md").read_text()
    pictures = [line.split("](")[1].rstrip(")") for line in page.splitlines() if "![" in line]
    assert len(pictures) >= 4 and all((tmp_path / name).is_file() for name in pictures)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["lines"]) == 6 + 3 * 14 + 1
    assert all(len(seed) == 8 for seeds in figures["scores"].values() for seed in seeds)
