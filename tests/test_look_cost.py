"""Counted costs of a look and of questions over it, held to torch's counter."""

import math

import pytest
import torch
from conftest import TEXT_INPUTS, build_batch, build_models
from test_cost import GRID, TEXT, VISION_TOKENS, count_flops, geometry, rotary_flops, run

from benchmarks.efficiency.measurement import peak_bytes
from benchmarks.prefill_flops import MODELS, many_questions
from glimpseprune.look_cost import (
    look,
    look_numbers,
    question_over_look,
    stale_keys_and_values,
    stock_question,
)
from glimpseprune.prefill_cost import Additions
from modeling_glimpseprune.look_ahead import LookAhead
from modeling_glimpseprune.stock import cache_of, given_cache

PREFIX = TEXT[0] + VISION_TOKENS + math.prod(GRID)
FIELDS = {"glimpse_layer": 3, "vision_layers": [2, 1]}


@pytest.fixture(scope="module")
def batch():
    return build_batch([[TEXT[0], GRID, TEXT[1]]])


def build(**fields):
    models = build_models(hidden_size=64, num_layers=6, glimpse=FIELDS | fields)
    for model in models:
        model.requires_grad_(False)  # torch's counter follows gradients where there could be any
    return models


def over(model, batch, cache, **settings):
    """A forward of what stands behind the image, over a cache of what stands before it."""
    ids, mask = (batch.inputs[name] for name in ("input_ids", "attention_mask"))
    return model(
        input_ids=ids[:, PREFIX:],
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=1,
        **given_cache(cache),
        **settings,
    )


@pytest.mark.parametrize("ranks", [(0, 0), (4, 2)])
@pytest.mark.parametrize("prune_layer", [0, 1, 3])
@torch.no_grad()
def test_formulas_agree_with_the_counter(batch, prune_layer, ranks):
    model = build(glimpse_lora_rank=ranks[0], stale_rank=ranks[1], prune_layer=prune_layer).pruned
    decoder, predictor = geometry(model)
    images = (batch.inputs["pixel_values"], batch.inputs["image_grid_thw"])
    visual, question = math.prod(GRID), TEXT[1]
    looking = count_flops(lambda: model.look(**batch.inputs))
    looking -= count_flops(lambda: model.model.visual(*images))
    expected = look(decoder, predictor, PREFIX, visual, prune_layer)
    assert looking == expected + rotary_flops(model, PREFIX)
    prefix = model.look(**batch.inputs)
    assert prefix.get_seq_length() == PREFIX
    settings = {"prune_threshold": 0.0, "max_keep_ratio": 0.1}
    kept = cache_of(over(model, batch, prefix, **settings)).glimpse.kept
    asking = count_flops(lambda: over(model, batch, prefix, **settings))
    expected = question_over_look(
        decoder, predictor, 3, PREFIX, question, visual, kept, prune_layer, Additions(*ranks)
    )
    head = 2 * model.lm_head.weight.numel()
    short = PREFIX - visual + question + kept
    # Angles of the question, of all tokens where they look ahead, and of those that go on.
    turned = question + 1 + short + (PREFIX + question if prune_layer < 3 else 0)
    assert asking == expected + head + rotary_flops(model, turned)


@torch.no_grad()
def test_a_stock_question_costs_what_the_formula_says(batch):
    model = build().stock
    begun = dict(batch.inputs)
    for name in begun.keys() & set(TEXT_INPUTS):
        begun[name] = begun[name][:, :PREFIX]
    cache = cache_of(model(**begun, use_cache=True))
    positions = torch.arange(PREFIX, PREFIX + TEXT[1]).expand(3, 1, -1)
    asking = count_flops(lambda: over(model, batch, cache, position_ids=positions))
    decoder = geometry(build().pruned)[0]
    expected = stock_question(decoder, PREFIX, TEXT[1]) + 2 * model.lm_head.weight.numel()
    assert asking == expected + rotary_flops(model, TEXT[1])


@torch.no_grad()
def test_what_a_look_holds(batch):
    model = build(prune_layer=1).pruned
    decoder, predictor = geometry(model)
    numbers = look_numbers(decoder, predictor, PREFIX, math.prod(GRID), prune_layer=1)
    assert model.look(**batch.inputs).nbytes == 4 * numbers


@torch.no_grad()
@pytest.mark.parametrize("prune_layer", [0, 1, 2])
def test_what_a_look_could_hold_of_stale_states(batch, prune_layer, monkeypatch):
    model, made, counted = build(prune_layer=prune_layer).pruned, [], []
    original = LookAhead._of_stale

    def counting(*args):
        counted.append(count_flops(lambda: made.append(original(*args))))
        return made[-1]

    prefix = model.look(**batch.inputs)
    monkeypatch.setattr(LookAhead, "_of_stale", counting)
    over(model, batch, prefix, prune_threshold=0.0)
    expected = stale_keys_and_values(geometry(model)[0], 3, prune_layer, math.prod(GRID))
    assert (sum(counted), sum(each.numel() for each in made)) == expected


@torch.no_grad()
def test_looking_takes_no_more_memory_than_a_prefill():
    """What is in flight is at its most in the vision encoder and layers 0..P, which both run."""
    model = build().pruned
    batch = build_batch([[3, (24, 24), 4]])
    whole = peak_bytes(lambda: run(model, batch, max_keep_ratio=0.1), model)
    assert peak_bytes(lambda: model.look(**batch.inputs), model) <= whole


def test_questions_over_a_look_of_7b():
    """Figures of another count, at 5,074 visual tokens of which 202 stay, P = K = 18."""
    with_vision = many_questions("qwen2_5_vl_7b", 18, 16, 44, 5074, 202)
    assert with_vision.looking / 1e12 == pytest.approx(34.71 + 50.09, abs=0.01)
    assert with_vision.asking / 1e12 == pytest.approx(2.044, abs=1e-3)
    assert with_vision.asking_stock / 1e12 == pytest.approx(0.665, abs=1e-3)
    for questions, share in ((1, 0.999), (4, 0.267), (8, 0.145), (16, 0.085), (32, 0.054)):
        fresh = with_vision.pruned_fresh(questions)
        assert with_vision.looked(questions) / fresh == pytest.approx(share, abs=1e-3)
    assert with_vision.break_even == pytest.approx(19.4, abs=0.1)
    assert with_vision.looked(19) < with_vision.stock_cached(19)
    assert with_vision.looked(20) > with_vision.stock_cached(20)


@pytest.mark.parametrize("name", MODELS)
def test_one_question_over_a_look_costs_about_a_fresh_prompt(name):
    """Its glimpse runs for the question alone; a look has no part in it."""
    for prune_layer in (MODELS[name][2], 5):
        law = many_questions(name, prune_layer, 16, 44, 2000, 80, with_vision=False)
        assert 0.99 < law.looked(1) / law.pruned_fresh(1) <= 1.001
