"""Measured generation over looks, and lmms-eval's requests grouped by image."""

import importlib.util
import random

import pytest

from glimpseprune.commands.evaluate import read_samples
from glimpseprune.harness.measured_generation import LookedPrompts, generate_measured
from glimpseprune.loading import TINY_MODEL, load_model, prepare, prompt_texts

CAP = 0.111
OPTIONS = {"max_keep_ratio": CAP, "max_new_tokens": 8}
TASK = "pages"


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY_MODEL)


@pytest.fixture(scope="module")
def samples():
    """Eight questions about two pages."""
    return read_samples(None, None, 8, seed=1)


@pytest.mark.parametrize("settings", [{}, {"prune_layer": 0}])
def test_costs_say_what_part_was_the_look(tiny, samples, settings):
    model, processor = tiny
    options = OPTIONS | settings
    about_one = samples[:4]
    assert len({id(sample.image) for sample in about_one}) == 1
    questions = [sample.question for sample in about_one]
    whole = prepare(processor, [sample.image for sample in about_one], questions)
    fresh, costs = generate_measured(model, processor, whole, **options)
    assert all(cost.seconds_of_look == 0 for cost in costs)
    one = prepare(processor, [about_one[0].image], questions[:1])
    looked = LookedPrompts(prompt_texts(processor, questions), [0] * 4)
    answers, others = generate_measured(model, processor, one, looked, **options)
    assert answers == fresh
    for cost, expected in zip(others, costs, strict=True):
        assert 0 < cost.seconds_of_look < cost.seconds_to_first_token
        for name in ("prompt_tokens", "visual_tokens", "kept_visual_tokens", "output_tokens"):
            assert getattr(cost, name) == getattr(expected, name)


def test_without_pruning_looks_leave_nothing_out(tiny, samples, monkeypatch):
    """Whatever the configuration says: the stock model's answers."""
    model, processor = tiny
    questions = [sample.question for sample in samples[:4]]
    one = prepare(processor, [samples[0].image], questions[:1])
    looked = LookedPrompts(prompt_texts(processor, questions), [0] * 4)
    whole = prepare(processor, [samples[0].image] * 4, questions)
    options = {"prune": False, "max_new_tokens": 8}
    expected, _ = generate_measured(model, processor, whole, **options)
    monkeypatch.setattr(model.config, "redundant_patches", 48)
    assert (model.look(**one).held.tokens.encoded == 0).any()
    for inputs, of_prompts in ((whole, None), (one, looked)):
        found, costs = generate_measured(model, processor, inputs, of_prompts, **options)
        assert found == expected
        assert all(cost.kept_visual_tokens == cost.visual_tokens for cost in costs)


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
def test_lmms_eval_asks_by_image(samples, monkeypatch):
    """Requests come shuffled; answers go back in their order, each page is looked at once."""
    from lmms_eval.api.instance import Instance

    from glimpseprune.harness import lmms_eval_model

    order = list(range(len(samples)))
    random.Random(0).shuffle(order)

    def messages_of(sample):
        image = {"type": "image", "url": sample.image}
        content = [image, {"type": "text", "text": sample.question}]
        return [{"role": "user", "content": content}]

    requests = [
        Instance(
            "generate_until",
            ("", messages_of, {"max_new_tokens": 8}, number, TASK, "test"),
            0,
            {"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number in order
    ]
    results, looks = {}, []
    for by_image in (True, False):
        asked = lmms_eval_model.GlimpsePrune(
            str(TINY_MODEL), max_keep_ratio=CAP, batch_size=4, by_image=by_image
        )
        asked.task_dict = {TASK: {"test": samples}}
        look = type(asked.model).look

        def noted(self, input_ids, *args, look=look, **kwargs):
            looks.append(len(input_ids))
            return look(self, input_ids, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(asked.model), "look", noted)
            results[by_image] = asked.generate_until(requests)
    assert looks == [1, 1]
    for ours, fresh in zip(results[True], results[False], strict=True):
        assert ours.text == fresh.text
        assert (
            ours.token_counts.cost.kept_visual_tokens == fresh.token_counts.cost.kept_visual_tokens
        )
        counts = ours.token_counts.to_dict()
        assert 0 < counts["seconds_of_look"] < counts["seconds_to_first_token"]
        assert fresh.token_counts.to_dict()["seconds_of_look"] == 0
    right = [
        result.text.strip() == samples[number].answer
        for result, number in zip(results[True], order, strict=True)
    ]
    assert sum(right) >= 6  # answers of other questions would be wrong
