"""Evaluation: batches, shared encodings, summaries."""

import pytest
import torch

from glimpseprune.baselines.fastv import FastV
from glimpseprune.baselines.method import Method, OwnPruning, TextOnly
from glimpseprune.baselines.resized_image import ResizedImage
from glimpseprune.baselines.visionzip import VisionZip
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.evaluation import evaluate, summarise
from glimpseprune.loading import TINY_MODEL, load_model, prepare

QUESTIONS = 6
METHODS = [
    Method(),
    OwnPruning(),
    OwnPruning("capped", 0.111),
    TextOnly(),
    ResizedImage(ratio=0.333),
    VisionZip(ratio=0.333),
    FastV(ratio=0.111),
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
