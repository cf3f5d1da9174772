"""Look once: what is asked over a prefix equals the whole prompt asked afresh."""

import random

import pytest
import torch
from conftest import LOOK_LAYER as GLIMPSE_LAYER
from conftest import Batch, pad_together, sees_videos
from generation_checks import (
    assert_near,
    generate,
    threshold_that_keeps,
)
from generation_prompts import (
    FAMILY_NAMES,
    random_keep,
    random_prompts,
)

from modeling_glimpseprune.glimpse_prefix import GlimpsePrefix
from modeling_glimpseprune.stock import cache_of, given_cache

# Keys, states and scores of a few tokens come out of other sums than those of a whole prompt: some
# float32 roundings (6e-8 of the largest term) through five layers and the predictor.
ATOL = 1e-4
PROMPTS = {
    "one image": [[3, (3, 4), 4]],
    "several images": [[2, (2, 3), 1, (3, 1), 3]],
    "rows of different length": [[2, (2, 3), 1, (3, 1), 3], [5, (2, 2), 2], [1, (3, 4), 2]],
    "video": [[2, (2, 2, 3), 4]],
}
SETTINGS = {
    "threshold": {},
    "capped": {"max_keep_ratio": 0.34},
    "everything kept": {"prune_threshold": 0.0},
    "nothing pruned": {"prune": False},
}


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    callspec = getattr(request.node, "callspec", None)
    video = callspec and "video" in callspec.params.values()
    if video and not sees_videos(request.param):
        pytest.skip("CLIP sees no videos")
    return request.param


def asked(batch: Batch, num_questions: int, seed: int = 0) -> list[dict]:
    """Rows that begin with the first row of a batch, each with a question of its own behind it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_questions):
        row, length = dict(batch.rows[0]), 2 + (index * 2 + 1) % 4
        question = torch.randint(1, 150, (1, length), generator=generator)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in row:
                behind = {"input_ids": question}.get(name)
                if behind is None:
                    behind = torch.full_like(question, name == "attention_mask")
                row[name] = torch.cat([row[name], behind.to(row[name])], dim=1)
        rows.append(row)
    return rows


def without_pixels(inputs: dict) -> dict:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def laid_out(prefix: GlimpsePrefix, inputs: dict) -> dict:
    return prefix.prompts(inputs["input_ids"], inputs["attention_mask"])


def assert_equals_fresh(over, fresh, atol: float = ATOL) -> None:
    """Two results of `generate`: answers, logits, record, and the whole of the caches."""
    new = len(fresh.logits)
    assert torch.equal(over.sequences[:, -new:], fresh.sequences[:, -new:])
    for ours, expected in zip(over.logits, fresh.logits, strict=True):
        assert_near(ours, expected, atol)
    assert_same_records(cache_of(over).glimpse, cache_of(fresh).glimpse, atol)
    assert_same_caches(cache_of(over), cache_of(fresh), atol)


def assert_same_records(record, expected, atol: float = ATOL) -> None:
    assert torch.equal(record.keep_mask, expected.keep_mask)
    assert torch.equal(record.rows, expected.rows)
    assert torch.equal(record.geometry, expected.geometry)
    assert torch.equal(record.item_rows, expected.item_rows)
    assert record.kinds == expected.kinds and record.sizes == expected.sizes
    assert (record.importance is None) == (expected.importance is None)
    if expected.importance is not None:
        assert_near(record.importance, expected.importance, atol)


def assert_same_caches(cache, expected, atol: float) -> None:
    """Real slots hold the same keys and values; padding may stand elsewhere."""
    for ours, other in zip(cache.layers, expected.layers, strict=True):
        batch = len(ours.keys)
        for row in range(batch):
            real, also = (_real_slots(layer, row) for layer in (ours, other))
            for name in ("keys", "values"):
                assert_near(
                    getattr(ours, name)[row][:, real], getattr(other, name)[row][:, also], atol
                )
        lengths = ours.get_seq_length(), other.get_seq_length()
        next_positions = [
            layer.position_delta + length
            for layer, length in zip((ours, other), lengths, strict=True)
        ]
        assert torch.equal(*next_positions)


def _real_slots(layer, row: int) -> torch.Tensor:
    real = torch.ones(layer.physical_length, dtype=torch.bool)
    if layer.prompt_mask is not None:
        real[: layer.prompt_slots] = layer.prompt_mask[row]
    return real


def tensors_of(prefix: GlimpsePrefix) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in prefix.parts()[0].items()}


def assert_unchanged(prefix: GlimpsePrefix, before: dict[str, torch.Tensor]) -> None:
    after = prefix.parts()[0]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.feature("prefixes: look once, ask often")
@pytest.mark.parametrize("prune_layer", [GLIMPSE_LAYER, 1, 0])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_a_question_over_a_prefix_equals_the_whole_prompt(
    make_model, build_batch, name, setting, prune_layer
):
    model, batch, settings = make_model(prune_layer), build_batch(PROMPTS[name]), SETTINGS[setting]
    if setting == "threshold":
        scores = model.glimpse(**batch.inputs).importance
        settings = {"prune_threshold": threshold_that_keeps(scores, 0.4)}
    prefix = model.look(**batch.inputs)
    before = tensors_of(prefix)
    fresh = generate(model, batch.inputs, 4, **settings)
    if setting == "nothing pruned":  # the stock path keeps no record: everything kept equals it
        keep = torch.ones(batch.num_visual, dtype=torch.bool)
        fresh = generate(model, batch.inputs, 4, visual_keep_mask=keep)
    inputs = batch.inputs
    if len(batch.rows) > 1:
        inputs = laid_out(prefix, inputs)
    over = generate(model, inputs | given_cache(prefix), 4, **settings)
    assert_equals_fresh(over, fresh)
    assert_unchanged(prefix, before)


@pytest.mark.feature("prefixes: look once, ask often")
@pytest.mark.parametrize("seeds", [8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prune_layer", [GLIMPSE_LAYER, 1])
@torch.no_grad()
def test_random_prompts_over_prefixes(build_models, build_batch, prune_layer, seeds):
    """Random prompts, weights and masks, as far as a question stands behind every image."""
    asked = 0
    for seed in range(seeds):
        chance = random.Random(seed)
        fields = {"glimpse_layer": 2, "prune_layer": min(2, prune_layer)}
        model = build_models(seed, glimpse=fields, num_layers=4).pruned
        batch = build_batch(random_prompts(chance), seed)
        if not all(batch.visual_counts):
            continue
        keep = random_keep(batch, seed, share=chance.random())
        prefix = model.look(**batch.inputs)
        try:
            inputs = laid_out(prefix, batch.inputs)
        except ValueError as error:  # a prompt that ends in an image has no question
            assert "all prefix" in str(error)
            continue
        over = generate(model, inputs | given_cache(prefix), 3, visual_keep_mask=keep)
        assert_equals_fresh(over, generate(model, batch.inputs, 3, visual_keep_mask=keep))
        asked += 1
    assert asked >= seeds // 4


@pytest.mark.feature("prefixes: look once, ask often")
@pytest.mark.parametrize("prune_layer", [GLIMPSE_LAYER, 1])
@torch.no_grad()
def test_questions_of_different_length_share_one_row(make_model, build_batch, prune_layer):
    model = make_model(prune_layer)
    rows = asked(build_batch([[3, (3, 4), 1, (2, 2), 1]]), 4)
    batch = pad_together(rows)
    prefix = model.look(**rows[0])
    assert prefix.batch_size == 1
    fresh = generate(model, batch, 4, max_keep_ratio=0.4)
    over = generate(model, without_pixels(batch) | given_cache(prefix), 4, max_keep_ratio=0.4)
    assert over.sequences.shape == fresh.sequences.shape
    assert_equals_fresh(over, fresh)
    scored = model.glimpse(**without_pixels(batch), **given_cache(prefix), max_keep_ratio=0.4)
    assert_same_records(scored, cache_of(fresh).glimpse)


@torch.no_grad()
def test_the_predictor_may_score_rows_in_parts(make_model, build_batch, monkeypatch):
    model = make_model(1)
    batch = pad_together(asked(build_batch([[3, (3, 4), 1, (2, 2), 1]]), 4))
    expected = model.glimpse(**batch)
    monkeypatch.setattr("modeling_glimpseprune.choosing.SCORED_AT_ONCE", 20)
    calls = []
    forward = type(model.model.glimpse).forward
    monkeypatch.setattr(
        type(model.model.glimpse),
        "forward",
        lambda self, *args: calls.append(len(args[0])) or forward(self, *args),
    )
    assert_same_records(model.glimpse(**batch), expected)
    assert len(calls) > 1 and max(calls) <= 20
