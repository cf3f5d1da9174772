"""Assisted decoding: drafts that would hold image placeholders, and drafts over a kept cache."""

import copy
from itertools import count

import pytest
import torch
from conftest import FIRST_SPECIAL_TOKEN, IMAGE_TOKEN, Batch
from generation_checks import (
    assert_same_output,
    generate,
)
from generation_prompts import (
    ONE,
    family,  # noqa: F401 (a fixture)
)
from test_turns import TURNS, follow
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from modeling_glimpseprune.stock import cache_of

# 4.57 needs an end token; nothing but it is suppressed, so drafts may hold placeholders.
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": 199, "suppress_tokens": [199]}
PLAIN = {"suppress_tokens": [199]}
PRUNED = {"max_keep_ratio": 0.4}


@pytest.fixture
def drafts(monkeypatch) -> list[list[int]]:
    """What stock prompt look-up drafts."""
    heard, look_up = [], PromptLookupCandidateGenerator.get_candidates

    def listening(drafter, input_ids, *args, **kwargs):
        candidates = look_up(drafter, input_ids, *args, **kwargs)
        heard.append(candidates[0][0, input_ids.shape[1] :].tolist())
        return candidates

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", listening)
    return heard


def drafter_of(model):
    """A draft model that is right now and then."""
    drafter = copy.deepcopy(model)
    weight = drafter.lm_head.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data[:FIRST_SPECIAL_TOKEN] += 0.1 * noise[:FIRST_SPECIAL_TOKEN]
    drafter.generation_config.num_assistant_tokens = 4
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    return drafter


def looking_back(batch: Batch, before: int) -> dict:
    """A prompt whose last two tokens stand right before its image, too."""
    inputs = dict(batch.inputs)
    inputs["input_ids"] = ids = inputs["input_ids"].clone()
    ids[:, -2:] = ids[:, before - 2 : before]
    return inputs


@pytest.mark.feature("assisted decoding by prompt look-up")
@pytest.mark.parametrize("settings", [PRUNED, {"prune": False}], ids=["pruned", "unpruned"])
@pytest.mark.parametrize("before", [4, 3])
@torch.no_grad()
def test_drafts_end_before_placeholders(shared_models, build_batch, drafts, settings, before):
    """Where the stock model raises, as it takes a drafted placeholder for another image's."""
    models, batch = shared_models(8), build_batch([[4, (3, 4), 6]])
    inputs = looking_back(batch, before)
    expected = generate(models.pruned, inputs, 8, **PLAIN, **settings)
    with pytest.raises((ValueError, IndexError)):
        generate(models.stock, inputs, 8, **LOOKUP)
    drafts.clear()
    drafted = generate(models.pruned, inputs, 8, **LOOKUP, **settings)
    assert IMAGE_TOKEN in drafts[0]
    assert_same_output(drafted, expected, 1e-4)


@pytest.mark.feature("assisted decoding with a draft model")
@torch.no_grad()
def test_a_draft_model_may_say_placeholders(shared_models, build_batch):
    models, batch = shared_models(21), build_batch(ONE)
    drafter, calls = copy.deepcopy(models.pruned), count()
    drafter.generation_config.num_assistant_tokens = 4
    drafter.generation_config.num_assistant_tokens_schedule = "constant"

    def say_an_image_now_and_then(module, inputs, logits):
        if next(calls) % 3 == 2:
            logits[..., IMAGE_TOKEN] = 1e4

    drafter.lm_head.register_forward_hook(say_an_image_now_and_then)
    drafting = {"assistant_model": drafter, "eos_token_id": 199}
    drafted = generate(models.pruned, batch.inputs, 12, **drafting, **PLAIN, **PRUNED)
    assert_same_output(drafted, generate(models.pruned, batch.inputs, 12, **PLAIN, **PRUNED), 1e-4)
    sampling = {"do_sample": True, "temperature": 1.2}
    sampled = generate(models.pruned, batch.inputs, 12, **drafting, **PLAIN, **PRUNED, **sampling)
    assert sampled.sequences.shape[1] == batch.inputs["input_ids"].shape[1] + 12


@pytest.mark.feature("assisted decoding over a kept cache")
@pytest.mark.parametrize("kept", ["pruned", "unpruned"])
@pytest.mark.parametrize("name", ["image after image", "image after text", "text after an image"])
@torch.no_grad()
def test_drafts_over_a_kept_cache_change_nothing(shared_models, build_batch, drafts, name, kept):
    models = shared_models(30, glimpse={"glimpse_layer": 1})
    turns = TURNS | {"text after an image": ([[3, (2, 3), 4]], [[5]])}
    first, second = (build_batch(turn, seed) for seed, turn in enumerate(turns[name]))
    settings = PRUNED if kept == "pruned" else {"prune": False}
    start = generate(models.pruned, first.inputs, 6, **settings)
    inputs = follow(first, second, start, second)
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, :2]  # something to find
    expected = generate(models.pruned, copy.deepcopy(inputs), 12, **PLAIN, **settings)
    drafted = generate(models.pruned, copy.deepcopy(inputs), 12, **LOOKUP, **settings)
    assert any(drafts)
    assert_same_output(drafted, expected, 1e-4)
    held = [cache_of(output).get_seq_length() for output in (drafted, expected)]
    assert held[0] == held[1] == expected.sequences.shape[1] - 1
    drafting = {"assistant_model": drafter_of(models.pruned), "eos_token_id": 199}
    if second.num_visual:
        with pytest.raises(ValueError, match="a draft model cannot follow a turn that brings"):
            generate(models.pruned, inputs, 12, **drafting, **PLAIN, **settings)
        return
    drafted = generate(models.pruned, inputs, 12, **drafting, **PLAIN, **settings)
    assert_same_output(drafted, expected, 1e-4)


@pytest.mark.feature("assisted decoding over a kept cache")
@torch.no_grad()
def test_ids_that_the_cache_holds_may_not_be_left_out(shared_models, build_batch):
    model, first = shared_models(30).pruned, build_batch(ONE)
    start = generate(model, first.inputs, 3, **PRUNED)
    second = build_batch([[40]])
    inputs = follow(first, second, start, second)
    for left_out in (slice(start.sequences.shape[1], None), slice(0, start.sequences.shape[1] - 1)):
        some = inputs | {"input_ids": inputs["input_ids"][:, left_out]}
        with pytest.raises(ValueError, match="takes the ids of the whole conversation"):
            generate(model, some, 3, **LOOKUP)
