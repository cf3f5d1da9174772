"""Evaluation: batches, shared encodings, summaries."""

import pytest
import torch

from benchmarks.evaluate_by_image import compare
from glimpseprune.baselines.fastv import FastV
from glimpseprune.baselines.method import Method, OwnPruning, TextOnly
from glimpseprune.baselines.oracle_evidence import OracleEvidence
from glimpseprune.baselines.random_tokens import RandomTokens
from glimpseprune.baselines.resized_image import ResizedImage
from glimpseprune.baselines.scorer import AtGlimpseLayer
from glimpseprune.baselines.uniform_grid import UniformGrid
from glimpseprune.baselines.visionzip import VisionZip
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.evaluation import batches, evaluate, summarise
from glimpseprune.loading import TINY_MODEL, load_model, prepare
from glimpseprune.questions import Questions
from modeling_glimpseprune.stock import CACHE_NAME, ENCODES_FIRST

QUESTIONS = 6  # four about the first page, two about the second
METHODS = [
    Method(),
    OwnPruning(),
    OwnPruning("capped", 0.111),
    TextOnly(),
    ResizedImage(ratio=0.333),
    VisionZip(ratio=0.333),
    FastV(ratio=0.111),
]
OVER_A_LOOK = [
    OracleEvidence(),
    OwnPruning("early", 0.111, prune_threshold=0.0, prune_layer=0),
    AtGlimpseLayer("random", 0.111, scorer=RandomTokens()),
    AtGlimpseLayer("uniform grid", 0.111, scorer=UniformGrid()),
]


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


@pytest.fixture(scope="module")
def samples():
    return read_samples(None, None, QUESTIONS, seed=1)


@pytest.fixture(scope="module")
def evaluation(tiny, samples):
    return evaluate(*tiny, samples, METHODS, batch_size=4)


@pytest.mark.parametrize(
    ("index", "options"),
    [(0, {"prune": False}), (1, {}), (2, {"max_keep_ratio": 0.111})],
)
def test_answers_are_those_of_plain_generate(tiny, samples, evaluation, index, options):
    """One question at a time, from pixels."""
    model, processor = tiny
    answers = {answer.sample.number: answer for answer in evaluation.answers[index]}
    assert sorted(answers) == list(range(QUESTIONS))
    for sample in samples:
        inputs = prepare(processor, [sample.image], [sample.question])
        tokens = model.generate(**inputs, **options, max_new_tokens=16, do_sample=False)
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = answers[sample.number]
        assert answer.text == text.strip() and answer.score == (answer.text == sample.answer)
        assert answer.visual == model.model.visual_counts(**inputs)[0]
        assert answer.prompt + answer.visual == inputs["input_ids"].shape[1]


def test_visual_tokens_are_counted_by_layer(tiny, evaluation):
    model, _ = tiny
    layers, last_full = model.config.text_config.num_hidden_layers, model.config.glimpse_layer
    stock, own, capped, text, resized, *_ = evaluation.answers
    for answer in stock:
        assert answer.by_layer == (answer.visual,) * layers
        assert answer.kept == answer.over_layers == 1.0
    for answer in own + capped:
        assert answer.by_layer[: last_full + 1] == (answer.visual,) * (last_full + 1)
        assert 0 < answer.by_layer[-1] < answer.visual and answer.kept < answer.over_layers
    assert all(answer.kept <= 0.111 for answer in capped)
    assert all(answer.by_layer == (0,) * layers for answer in text)
    assert all(0.2 < answer.kept <= 0.333 for answer in resized)


def test_the_time_is_spent_in_the_model(evaluation):
    assert 0.5 < evaluation.seconds_in_model / evaluation.seconds <= 1


def test_summaries_count_every_question(evaluation):
    summary = summarise(evaluation.answers[1])
    groups = [figures for name, figures in summary.items() if name != "all"]
    assert summary["all"]["questions"] == sum(each["questions"] for each in groups) == QUESTIONS
    scores = torch.tensor([answer.score for answer in evaluation.answers[1]])
    assert summary["all"]["accuracy"] == pytest.approx(scores.mean().item())


def test_kinds_are_groups_where_there_are_several(tiny):
    kinds = ("value", "none")
    samples = read_samples(None, None, 8, 1, kinds)
    assert {sample.kind: bool(sample.boxes) for sample in samples} == {"value": True, "none": False}
    answers = evaluate(*tiny, samples, [Method()]).answers[0]
    summary = summarise(answers)
    assert [summary[kind]["questions"] for kind in kinds] == [4, 4]
    of_values = [answer.score for answer in answers if answer.sample.kind == "value"]
    assert summary["value"]["accuracy"] == sum(of_values) / 4
    only_values = [answer for answer in answers if answer.sample.kind == "value"]
    assert "value" not in summarise(only_values)


def test_a_look_changes_no_answer(tiny, samples, evaluation):
    """Nor how many tokens a layer works on, by methods over a look and by those that take none."""
    over = evaluate(*tiny, samples, OVER_A_LOOK, batch_size=6)
    fresh = evaluate(*tiny, samples, METHODS + OVER_A_LOOK, batch_size=6, fresh=True)
    for given, expected in zip(evaluation.answers + over.answers, fresh.answers, strict=True):
        assert given == expected


def test_held_prompts_change_no_answer(tiny, samples, evaluation):
    """Each question's own tokens but the last run once up to layer K, not once a method."""
    model, processor = tiny
    methods, tokens = METHODS[:3] + OVER_A_LOOK, []
    asked = Questions(model, processor, samples).ready(model.config.glimpse_layer).inputs
    own = asked["input_ids"].shape[1] - asked[CACHE_NAME].get_seq_length()
    counted = model.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda _, __, output: tokens.append(output.shape[0] * output.shape[1])
    )
    ran, answers = [], []
    for hold_prompts in (False, True):
        tokens.clear()
        given = evaluate(model, processor, samples, methods, 6, hold_prompts=hold_prompts).answers
        ran.append(sum(tokens))
        answers.append(given)
    counted.remove()
    assert answers[0] == answers[1] and answers[1][:3] == evaluation.answers[:3]
    # One of the seven has a prune layer, and a look, of its own; six share the other.
    assert ran[0] - ran[1] == QUESTIONS * (own - 1) * (6 - 1)


@pytest.mark.parametrize("fresh", [False, True])
def test_redundant_patches_are_left_out_for_the_model_alone(tiny, samples, evaluation, fresh):
    """As the call or the configuration says; other methods see everything all the same."""
    model, processor = tiny
    methods = [*METHODS, OwnPruning(redundant_patches=False), OwnPruning(redundant_patches=0)]
    model.config.redundant_patches = 48
    try:
        *found, off, exact = evaluate(*tiny, samples, methods, batch_size=4, fresh=fresh).answers
    finally:
        model.config.redundant_patches = None
    layers, last_full = model.config.text_config.num_hidden_layers, model.config.glimpse_layer
    for method, given, expected in zip(METHODS, found, evaluation.answers, strict=True):
        if not isinstance(method, OwnPruning):
            assert given == expected
            continue
        for answer in given:
            sample = answer.sample
            inputs = prepare(processor, [sample.image], [sample.question])
            options = {} if method.ratio is None else {"max_keep_ratio": method.ratio}
            record = model.glimpse(**inputs, **options, redundant_patches=48)
            assert answer.encoded == record.encoded.sum() < answer.visual
            assert answer.by_layer[: last_full + 1] == (answer.encoded,) * (last_full + 1)
            assert answer.by_layer[last_full + 1 :] == (record.kept,) * (layers - last_full - 1)
    assert off == exact == evaluation.answers[1]  # noise leaves no two patches alike


def test_each_image_is_looked_at_once(tiny, samples, monkeypatch):
    """Once for each prune layer, and encoded once for all of them and for whole prompts."""
    model, processor = tiny
    looks, encoded = [], []
    look, encode = type(model).look, type(model.model).encode_visual

    def noted_look(self, input_ids, *args, **kwargs):
        looks.append((kwargs["prune_layer"], len(input_ids)))
        return look(self, input_ids, *args, **kwargs)

    def noted_encode(self, kind, **inputs):
        encoded.append(len(inputs["image_grid_thw"]))
        return encode(self, kind, **inputs)

    monkeypatch.setattr(type(model), "look", noted_look)
    monkeypatch.setattr(type(model.model), "encode_visual", noted_encode)
    methods = [Method(), OwnPruning(), *OVER_A_LOOK, FastV(ratio=0.111)]
    evaluate(model, processor, samples, methods, batch_size=6)
    layer = model.config.glimpse_layer
    assert sorted(looks) == [(0, 2), (layer, 2)]
    assert encoded == [2] or not ENCODES_FIRST
    looks.clear()
    evaluate(model, processor, samples, methods, batch_size=6, fresh=True)
    assert not looks and encoded[-1] == 6


def test_questions_about_an_image_follow_one_another(samples):
    shuffled = [samples[index] for index in (4, 0, 5, 1, 2, 3)]
    pages = [[sample.path for sample in batch] for batch in batches(shuffled, 4)]
    flat = sum(pages, [])
    assert len(set(flat)) == 1 + sum(a != b for a, b in zip(flat, flat[1:], strict=False)) == 2


def test_both_ways_are_measured(tiny, samples):
    result = compare(*tiny, samples, [Method(), OwnPruning()], batch_size=6)
    assert result["equal answers"] == result["answers"] == 2 * QUESTIONS
    for name, seconds in result["seconds"].items():
        assert seconds == sum(result["seconds by batch"][name]) > 0
