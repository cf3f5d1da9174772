"""The promises that hold for every model, prompt and mask; the references are in `reference.py`."""

import random
import threading

import pytest
import torch
from conftest import Models, sees_videos
from generation_checks import (
    assert_equals_reference,
    assert_near,
    assert_same_output,
    completion_of,
    decode,
    generate,
    second_turn,
    step_logits,
    threshold_that_keeps,
)
from generation_prompts import (
    GLIMPSE_VARIANTS,
    IMAGE_PROMPTS,
    PROMPTS,
    family,  # noqa: F401 (a fixture)
    random_mask,
    random_prompts,
)
from random_cases import random_cases
from reference import generate_hidden, run_hidden, score_slowly, select_slowly
from transformers import DynamicCache

from modeling_glimpseprune import decoder_layers
from modeling_glimpseprune.pruned_cache import PrunedLayer
from modeling_glimpseprune.stock import cache_of, given_cache

TEXT_ONLY = {"one": [[7]], "batch": [[3], [9], [5]]}


def random_models(build_models, chance: random.Random, seed: int) -> Models:
    num_layers = chance.randint(1, 5)
    heads, shared = chance.choice([(4, 2), (2, 1), (4, 4), (4, 1)])
    depth = chance.randint(1, 3)
    layer = chance.choice([0, num_layers - 1, chance.randrange(num_layers)])
    return build_models(
        seed,
        chance.choice(["sdpa", "sdpa", "eager"]),
        {"glimpse_layer": layer},
        hidden_size=heads * chance.choice([8, 16]),
        num_layers=num_layers,
        num_heads=heads,
        num_key_value_heads=shared,
        vision_depth=depth,
        window=chance.randint(2, 3),
        full_attention_blocks=(chance.randrange(depth),),
    )


# 1. Without pruning it is the stock model.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_prune_false_is_the_stock_model(shared_models, build_batch, name, attention):
    models, batch = shared_models(1, attention), build_batch(PROMPTS[name])
    expected = generate(models.stock, batch.inputs)
    assert_same_output(generate(models.pruned, batch.inputs, prune=False), expected)
    logits = models.pruned(**batch.inputs, prune=False).logits
    assert_near(logits, models.stock(**batch.inputs).logits, 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_keeping_every_token_is_the_stock_model(shared_models, build_batch, name, attention):
    models, batch = shared_models(1, attention), build_batch(PROMPTS[name])
    expected = generate(models.stock, batch.inputs)
    everything = torch.ones(batch.num_visual, dtype=torch.bool)
    for options in ({"visual_keep_mask": everything}, {"prune_threshold": 0.0}):
        output = generate(models.pruned, batch.inputs, **options)
        assert_same_output(output, expected)
        assert cache_of(output).glimpse.retention == 1.0


@torch.no_grad()
def test_sampling_without_pruning_is_the_stock_model(shared_models, build_batch):
    models, batch = shared_models(1), build_batch(PROMPTS["ragged_batch"])
    outputs = []
    for model, options in ((models.stock, {}), (models.pruned, {"prune": False})):
        torch.manual_seed(0)
        outputs.append(generate(model, batch.inputs, do_sample=True, **options))
    assert_same_output(*outputs)


@pytest.mark.parametrize("name", TEXT_ONLY)
@torch.no_grad()
def test_text_only_prompts_are_the_stock_model(shared_models, build_batch, name):
    models, batch = shared_models(2), build_batch(TEXT_ONLY[name])
    expected = generate(models.stock, batch.inputs)
    assert_same_output(generate(models.pruned, batch.inputs), expected, atol=0)
    assert torch.equal(models.pruned(**batch.inputs).logits, models.stock(**batch.inputs).logits)


# 2. A pruned run equals the stock model that may not look at the dropped tokens.


@pytest.mark.feature("eager, sdpa")
@pytest.mark.parametrize("seed", random_cases(42, at_once=14))
@torch.no_grad()
def test_pruned_equals_hidden(build_models, build_batch, seed):
    chance = random.Random(seed)
    models = random_models(build_models, chance, seed)
    for _ in range(5):
        batch = build_batch(random_prompts(chance), chance.randrange(1000))
        masks = [random_mask(chance, count) for count in batch.visual_counts]
        output = generate(models.pruned, batch.inputs, 3, visual_keep_mask=torch.cat(masks))
        assert torch.equal(cache_of(output).glimpse.keep_mask, torch.cat(masks))
        assert_equals_reference(models, batch, output, masks)


@pytest.mark.parametrize("seed", random_cases(12, at_once=4))
@torch.no_grad()
def test_own_choice_equals_hidden(build_models, build_batch, seed):
    chance = random.Random(1000 + seed)
    models = random_models(build_models, chance, seed)
    for _ in range(4):
        batch = build_batch(random_prompts(chance), chance.randrange(1000))
        importance = models.pruned.glimpse(**batch.inputs).importance
        settings = {
            "prune_threshold": threshold_that_keeps(importance, chance.random()),
            "min_keep_tokens": chance.choice([0, 1, 3]),
        }
        if chance.random() < 0.5:
            settings["max_keep_ratio"] = chance.uniform(0.1, 1.0)
        output = generate(models.pruned, batch.inputs, 3, **settings)
        record = cache_of(output).glimpse
        assert_near(record.importance, importance, 1e-5)
        masks = batch.split(record.keep_mask)
        for scores, mask in zip(batch.split(record.importance), masks, strict=True):
            ratio = settings.get("max_keep_ratio")
            expected = select_slowly(
                scores.tolist(), settings["prune_threshold"], ratio, settings["min_keep_tokens"]
            )
            assert mask.tolist() == expected
        assert_equals_reference(models, batch, output, masks)


@pytest.mark.parametrize("glimpse_layer", range(4))
@torch.no_grad()
def test_greedy_tokens_equal_a_full_rerun(build_models, build_batch, glimpse_layer):
    models = build_models(3, glimpse={"glimpse_layer": glimpse_layer}, num_layers=4)
    batch = build_batch(PROMPTS["ragged_batch"])
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(0)) < 0.4
    output = generate(models.pruned, batch.inputs, visual_keep_mask=keep)
    for row, (prompt, mask) in enumerate(zip(batch.rows, batch.split(keep), strict=True)):
        expected = generate_hidden(models.stock, prompt, mask, glimpse_layer, 6)
        assert torch.equal(completion_of(output, batch, row), expected)


@torch.no_grad()
def test_long_prompts_run_in_parts(shared_models, build_batch, monkeypatch):
    """The MLPs of a long prefill see a few tokens at a time."""
    models, batch = shared_models(5), build_batch(PROMPTS["ragged_batch"])
    longest = []
    for layer in models.pruned.model.language_model.layers:
        monkeypatch.setattr(layer.mlp, "forward", noting(layer.mlp.forward, longest))
    monkeypatch.setattr(decoder_layers, "MLP_CHUNK", 7)
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(1)) < 0.5
    output = generate(models.pruned, batch.inputs, visual_keep_mask=keep)
    assert max(longest) == 7
    assert_equals_reference(models, batch, output, batch.split(keep))


def noting(forward, sizes: list[int]):
    def noted(states):
        sizes.append(states[..., 0].numel())
        return forward(states)

    return noted


@torch.no_grad()
def test_reference_tells_neighbouring_layers_and_masks_apart(shared_models, build_batch):
    """The comparison above could not pass with the wrong layer, or one wrong token."""
    models, batch = shared_models(3, num_layers=4), build_batch(PROMPTS["one_image"])
    keep = torch.arange(batch.num_visual) % 3 == 0
    completion = torch.tensor([5, 6])

    def logits(mask, layer):
        return run_hidden(models.stock, batch.rows[0], completion, mask, layer).logits[-3:]

    other_mask = keep.clone()
    other_mask[1] = True
    variants = [logits(keep, layer) for layer in range(4)] + [logits(other_mask, 1)]
    for i, first in enumerate(variants):
        for second in variants[:i]:
            assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("variant", GLIMPSE_VARIANTS)
@torch.no_grad()
def test_importance_equals_the_slow_score(build_models, build_batch, variant, family):  # noqa: F811
    models = build_models(4, glimpse=GLIMPSE_VARIANTS[variant], num_layers=4)
    prompts = [[2, (3, 4), 2], [1, (2, 3), 1, (3, 1), 3]]
    if variant == "default":
        prompts += [[5]] + [[3, (2, 3, 3), 2]] * sees_videos(family)
    batch = build_batch(prompts)
    importance = models.pruned.glimpse(**batch.inputs).importance
    assert importance.std() > 0.05
    for prompt, scores in zip(batch.rows, batch.split(importance), strict=True):
        if len(scores):
            glimpse, config = models.pruned.model.glimpse, models.pruned.config
            assert_near(scores, score_slowly(models.stock, glimpse, config, prompt))


@pytest.mark.feature("video")
@pytest.mark.feature("batches, left padding, several images, text-only rows")
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_every_kind_of_prompt_equals_hidden(shared_models, build_batch, name):
    models, batch = shared_models(5), build_batch(PROMPTS[name])
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(1)) < 0.5
    output = generate(models.pruned, batch.inputs, visual_keep_mask=keep)
    assert_equals_reference(models, batch, output, batch.split(keep))


@pytest.mark.feature("video")
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_record_describes_each_visual(shared_models, build_batch, name):
    models, batch = shared_models(5), build_batch(PROMPTS[name])
    record = models.pruned.glimpse(**batch.inputs, max_keep_ratio=0.5)
    found = [(visual.row, visual.kind, visual.grid) for visual in record.visuals]
    assert found == batch.visuals
    assert torch.equal(
        torch.cat([visual.importance for visual in record.visuals]), record.importance
    )
    assert torch.equal(torch.cat([visual.keep_mask for visual in record.visuals]), record.keep_mask)
    assert record.total == batch.num_visual == sum(visual.total for visual in record.visuals)
    assert record.kept == int(record.keep_mask.sum()) and 0 < record.retention <= 0.5


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_direct_forward_keeps_the_logical_layout(shared_models, build_batch, name):
    models, batch = shared_models(5), build_batch(PROMPTS[name])
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(1)) < 0.5
    logits = models.pruned(**batch.inputs, visual_keep_mask=keep).logits
    hidden = models.pruned.model(**batch.inputs, visual_keep_mask=keep).last_hidden_state
    assert logits.shape[:2] == hidden.shape[:2] == batch.inputs["input_ids"].shape
    assert_near(models.pruned.lm_head(hidden), logits, 1e-5)
    nothing = torch.empty(0, dtype=torch.long)
    for row, (prompt, mask) in enumerate(zip(batch.rows, batch.split(keep), strict=True)):
        layer = models.pruned.config.glimpse_layer
        expected = run_hidden(models.stock, prompt, nothing, mask, layer)
        of_row = logits[row, -prompt["input_ids"].shape[1] :]
        assert_near(of_row[expected.kept], expected.logits[expected.kept])
        assert not of_row[~expected.kept].any()


@pytest.mark.feature("later turns of text")
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("name", IMAGE_PROMPTS)
@torch.no_grad()
def test_second_turn_equals_hidden(shared_models, build_batch, name, interrupted):
    """The cache of an answer is kept; more text follows; the next answer still sees no more."""
    models, batch = shared_models(6), build_batch(PROMPTS[name])
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(2)) < 0.4
    first = generate(models.pruned, batch.inputs, 4, visual_keep_mask=keep)
    if interrupted:
        generate(models.pruned, build_batch([[(4, 4), 9]] * len(batch.rows)).inputs, 2)
    inputs = second_turn(batch, first, num_tokens=3)
    second = generate(models.pruned, inputs, 4)
    later = inputs["input_ids"].shape[1] - batch.inputs["input_ids"].shape[1]
    assert_equals_reference(models, batch, second, batch.split(keep), first_step=later)


# 3. Rows of a batch, and generations on one model, do not disturb one another.


@pytest.mark.feature("batches, left padding, several images, text-only rows")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "max_keep_ratio": 0.2}])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_a_batch_equals_its_rows_alone(shared_models, build_batch, name, options):
    models, batch = shared_models(7), build_batch(PROMPTS[name])
    importance = models.pruned.glimpse(**batch.inputs).importance
    options = {"prune_threshold": threshold_that_keeps(importance, 0.5)} | options
    together = generate(models.pruned, batch.inputs, 5, **options)
    scores = batch.split(importance)
    for row, prompt in enumerate(batch.rows):
        alone = generate(models.pruned, prompt, 5, **options)
        expected = alone.sequences[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(completion_of(together, batch, row), expected)
        if "num_beams" not in options:
            assert_near(step_logits(together, row), step_logits(alone, 0))
        if len(scores[row]) and "num_beams" not in options:
            assert_near(cache_of(alone).glimpse.importance, scores[row])


@pytest.mark.feature("beam search")
@torch.no_grad()
def test_beams_share_the_callers_mask(shared_models, build_batch):
    models, batch = shared_models(7), build_batch(PROMPTS["ragged_batch"])
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(3)) < 0.4
    together = generate(models.pruned, batch.inputs, 5, num_beams=3, visual_keep_mask=keep)
    for row, (prompt, mask) in enumerate(zip(batch.rows, batch.split(keep), strict=True)):
        alone = generate(models.pruned, prompt, 5, num_beams=3, visual_keep_mask=mask)
        expected = alone.sequences[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(completion_of(together, batch, row), expected)


@pytest.mark.feature("several returned sequences")
@torch.no_grad()
def test_returned_sequences_share_the_glimpse(shared_models, build_batch):
    models, batch = shared_models(7), build_batch(PROMPTS["ragged_batch"])
    greedy = generate(models.pruned, batch.inputs, 1, max_keep_ratio=0.3)
    torch.manual_seed(0)
    sampled = generate(
        models.pruned, batch.inputs, 1, do_sample=True, num_return_sequences=2, max_keep_ratio=0.3
    )
    assert_near(sampled.logits[0], greedy.logits[0].repeat_interleave(2, dim=0))


@pytest.mark.feature("assisted decoding by prompt look-up")
@pytest.mark.parametrize("own_choice", [False, True])
@torch.no_grad()
def test_drafted_tokens_change_nothing(shared_models, build_batch, monkeypatch, own_choice):
    """Prompt lookup drafts tokens, and crops the cache where the model would not say them."""
    models, batch = shared_models(8), build_batch([[90, (3, 4), 60]])
    if own_choice:
        settings = {"max_keep_ratio": 0.4}
    else:
        settings = {"visual_keep_mask": torch.arange(batch.num_visual) % 3 == 0}
    expected = generate(models.pruned, batch.inputs, 30, **settings)
    lengths = []
    crop = PrunedLayer.crop

    def counting_crop(layer, *args):
        before = layer.keys.shape[-2]
        crop(layer, *args)
        lengths.append(before - layer.keys.shape[-2])

    monkeypatch.setattr(PrunedLayer, "crop", counting_crop)
    drafting = {"prompt_lookup_num_tokens": 3, "eos_token_id": 199}  # 4.57 needs the latter
    drafted = generate(models.pruned, batch.inputs, 30, **drafting, **settings)
    assert max(lengths) > 0
    assert torch.equal(drafted.sequences, expected.sequences)
    assert_near(torch.stack(drafted.logits), torch.stack(expected.logits))


@pytest.mark.feature("use_cache=False")
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_cached_equals_uncached(shared_models, build_batch, name):
    """Without a cache every step runs the prompt again, and must prune it as the first did."""
    model, batch = shared_models(8).pruned, build_batch(PROMPTS[name])
    importance = model.glimpse(**batch.inputs).importance
    settings = {"prune_threshold": threshold_that_keeps(importance, 0.4)}
    expected = generate(model, batch.inputs, **settings)
    assert_same_output(generate(model, batch.inputs, use_cache=False, **settings), expected, 1e-4)
    given = generate(model, batch.inputs, **given_cache(DynamicCache()), **settings)
    assert_same_output(given, expected)


@torch.no_grad()
def test_a_prompt_without_padding_needs_no_attention_mask(shared_models, build_batch):
    model, batch = shared_models(8).pruned, build_batch(PROMPTS["several_images"])
    inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
    expected = model(**batch.inputs, max_keep_ratio=0.4).logits
    assert_near(model(**inputs, max_keep_ratio=0.4).logits, expected, 1e-5)
    assert_same_output(
        generate(model, inputs, max_keep_ratio=0.4),
        generate(model, batch.inputs, max_keep_ratio=0.4),
    )


@pytest.mark.parametrize("explicit_positions", [True, False])
@torch.no_grad()
def test_interleaved_decoding_loops(shared_models, build_batch, explicit_positions):
    model = shared_models(9).pruned
    batches = [build_batch(PROMPTS["one_image"]), build_batch(PROMPTS["ragged_batch"], 1)]
    settings = {"max_keep_ratio": 0.4}
    expected = [generate(model, batch.inputs, 5, **settings).logits for batch in batches]
    loops = [decode(model, batch.inputs, 5, explicit_positions, **settings) for batch in batches]
    for step, both in enumerate(zip(*loops, strict=True)):
        for logits, of_loop in zip(both, expected, strict=True):
            assert_near(logits, of_loop[step])


def wait_at(barrier: threading.Barrier) -> None:
    barrier.wait(timeout=60)


class MeetAtEveryStep:
    """A logits processor that waits for the other generation."""

    def __init__(self, barrier: threading.Barrier):
        self.barrier = barrier

    def __call__(self, input_ids, scores):
        wait_at(self.barrier)
        return scores


@pytest.mark.feature("threads")
@torch.no_grad()
def test_threads_share_a_model(shared_models, build_batch):
    """Two generations in lockstep: both inside the vision encoder, then one token each in turn."""
    model = shared_models(9).pruned
    batches = [build_batch([[3, (3, 4), 4]]), build_batch([[5, (4, 3), 1, (2, 2), 2]], 1)]
    settings = {"max_keep_ratio": 0.4, "max_new_tokens": 5}
    expected = [generate(model, batch.inputs, **settings) for batch in batches]
    barrier, outputs = threading.Barrier(2), [None, None]
    meeting_place = model.model.tapped_modules()[0]
    hook = meeting_place.register_forward_pre_hook(lambda *args: wait_at(barrier))

    def run(index: int) -> None:
        with torch.no_grad():
            meet = [MeetAtEveryStep(barrier)]
            inputs = batches[index].inputs
            outputs[index] = generate(model, inputs, logits_processor=meet, **settings)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    for output, alone in zip(outputs, expected, strict=True):
        assert output is not None
        assert_same_output(output, alone)
        scores = cache_of(output).glimpse.importance
        assert_near(scores, cache_of(alone).glimpse.importance, 1e-5)
