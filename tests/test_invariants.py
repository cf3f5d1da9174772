"""The promises that hold for every model, prompt and mask; the references are in `reference.py`."""

import random
import threading

import pytest
import torch
from conftest import FAMILIES, TRANSFORMERS_5, Batch, Models, has_windows, sees_videos
from random_cases import random_cases
from reference import generate_hidden, run_hidden, score_slowly, select_slowly
from transformers import DynamicCache

from modeling_glimpseprune import decoder_layers
from modeling_glimpseprune.pruned_cache import PrunedLayer
from modeling_glimpseprune.stock import cache_of, given_cache

PROMPTS = {
    "one_image": [[3, (3, 4), 4]],
    "several_images": [[(2, 3), 2, (3, 2), 1, (1, 1), 3]],
    "ragged_batch": [[3, (2, 3), 4], [(4, 4), 2, (1, 2), 5], [2, (3, 3), (2, 2), 1]],
    "batch_with_text_only_row": [[6], [2, (3, 3), 3], [1, (2, 2), (2, 1), 2]],
    "strips_beside_photos": [[1, (9, 1), 2, (2, 3), 3], [(2, 2), (1, 9), 2], [2, (9, 1), 1]],
    "video": [[2, (2, 3, 4), 4]],
    "long_video": [[3], [2, (5, 1, 2), 4]],
    "images_and_videos": [[1, (2, 2), 2, (2, 2, 2), 3], [4, (2, 3, 1), 1, (3, 2), 2]],
}
IMAGE_PROMPTS = [
    "one_image",
    "several_images",
    "ragged_batch",
    "batch_with_text_only_row",
    "strips_beside_photos",
]
FAMILY_NAMES = tuple(FAMILIES)
TEXT_ONLY = {"one": [[7]], "batch": [[3], [9], [5]]}


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    """Every test here holds for every family; prompts with videos for those that see them."""
    callspec = request.node.callspec.params
    prompts, variant = callspec.get("name"), callspec.get("variant")
    if "video" in str(prompts) and not sees_videos(request.param):
        pytest.skip("CLIP sees no videos")
    if variant == "windowed" and not has_windows(request.param):
        pytest.skip("its vision encoder has no windows")
    return request.param


def generate(model, inputs: dict, num_tokens: int = 6, **options):
    """Greedy unless asked otherwise; ids, raw logits and the cache."""
    options = {"do_sample": False, "max_new_tokens": num_tokens} | options
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def step_logits(output, row: int) -> torch.Tensor:
    """`(steps, vocabulary)` logits of one row of a `generate` output."""
    return torch.stack(output.logits)[:, row]


def completion_of(output, batch: Batch, row: int) -> torch.Tensor:
    return output.sequences[row, batch.inputs["input_ids"].shape[1] :]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_output(actual, expected, atol: float = 1e-5) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert_near(torch.stack(actual.logits), torch.stack(expected.logits), atol)


def assert_equals_reference(
    models: Models, batch: Batch, output, masks: list[torch.Tensor], first_step: int = 0
) -> None:
    """Ids, logits and cache of a pruned generation against the reference of each row.

    Tokens were dropped at the prune layer that the output's record names.

    Args:
        masks: the keep mask of each row.
        first_step: tokens after the prompt that `output` was given and did not generate.
    """
    layer = cache_of(output).glimpse.prune_layer
    for row, (prompt, mask) in enumerate(zip(batch.rows, masks, strict=True)):
        completion = completion_of(output, batch, row)
        expected = run_hidden(models.stock, prompt, completion[:-1], mask, layer)
        logits = expected.logits[prompt["input_ids"].shape[1] - 1 + first_step :]
        assert_near(step_logits(output, row), logits)
        assert torch.equal(completion[first_step:], logits.argmax(-1))
        assert_cache_equals(cache_of(output), row, expected)


def assert_cache_equals(cache, row: int, expected) -> None:
    """Every layer holds the row's kept tokens, packed to the right, and nothing else of it."""
    length = int(expected.kept.sum())
    for layer, keys, values in zip(cache.layers, expected.keys, expected.values, strict=True):
        assert_near(layer.keys[row, :, -length:], keys[:, expected.kept])
        assert_near(layer.values[row, :, -length:], values[:, expected.kept])
        padding = 0 if layer.prompt_mask is None else int((~layer.prompt_mask[row]).sum())
        assert layer.keys.shape[-2] == length + padding


def threshold_that_keeps(importance: torch.Tensor, share: float) -> float:
    """A threshold that about this share exceeds, far from every score."""
    scores = torch.cat([torch.tensor([0.0, 1.0]), importance.sigmoid()]).sort().values
    gaps = scores.diff()
    middle = round((1 - share) * len(importance)) + 1
    nearby = range(max(0, middle - 2), min(len(gaps), middle + 2))
    widest = max(nearby, key=lambda i: gaps[i])
    return float(scores[widest] + gaps[widest] / 2)


def random_prompts(chance: random.Random) -> list[list]:
    """One to three prompts with up to three images each; the first has one at least."""
    prompts = []
    for row in range(chance.randint(1, 3)):
        parts = [chance.randint(0, 4)]
        for _ in range(chance.choice([0, 1, 1, 2, 3]) if row else chance.randint(1, 3)):
            parts += [(chance.randint(1, 3), chance.randint(1, 4)), chance.randint(0, 3)]
        prompts.append([*parts, chance.randint(1, 4)])
    return prompts


def random_mask(chance: random.Random, count: int) -> torch.Tensor:
    """`(count,)` bool: all, none, one, or each token by its own luck."""
    kind = chance.choice(["all", "none", "one", "some", "some", "some"])
    if kind == "one" and count:
        return torch.arange(count) == chance.randrange(count)
    share = {"all": 1.0, "none": 0.0}.get(kind, chance.random())
    return torch.tensor([chance.random() < share for _ in range(count)], dtype=torch.bool)


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


GLIMPSE_VARIANTS = {
    "default": {},
    "first_layer": {"glimpse_layer": 0},
    "last_layer": {"glimpse_layer": 3},
    "log_probabilities": {"attention_scores": "log_probabilities"},
    "two_attention_layers": {"glimpse_layer": 2, "attention_layers": [2, 0]},
    "attention_below": {"glimpse_layer": 3, "attention_layers": [1]},
    "two_tokens": {"num_glimpse_tokens": 2},
    "no_token": {"num_glimpse_tokens": 0},
    "some_embedding_layers": {"glimpse_embedding_layers": [0, 2], "glimpse_layer": 2},
    "layer_norm": {"glimpse_norm": "layer_norm"},
    "windowed": {"predictor_windowed": True},
    "without_vision": {"predictor_use_vision": False},
    "uneven_widths": {
        "predictor_hidden_size": 24,
        "predictor_condition_size": 40,
        "predictor_num_heads": 4,
    },
    "three_taps": {"vision_layers": [2, 0, 1]},
}


@pytest.mark.parametrize("variant", GLIMPSE_VARIANTS)
@torch.no_grad()
def test_importance_equals_the_slow_score(build_models, build_batch, variant, family):
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


def second_turn(batch: Batch, first, num_tokens: int) -> dict:
    """Inputs that continue an answer with `num_tokens` of text, over its cache."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(1, 150, (len(batch.rows), num_tokens), generator=generator)
    input_ids = torch.cat([first.sequences, text], dim=1)
    inputs = {"input_ids": input_ids, **given_cache(cache_of(first))}
    later = input_ids.shape[1] - batch.inputs["input_ids"].shape[1]
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in batch.inputs:
            inputs[name] = torch.nn.functional.pad(batch.inputs[name], (0, later), value=fill)
    return inputs


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


def decode(model, inputs: dict, num_tokens: int, explicit_positions: bool, **prefill):
    """Yield the logits of each greedy step, calling `forward` by hand."""
    outputs = model(**inputs, use_cache=True, **prefill)
    cache, mask = cache_of(outputs), inputs["attention_mask"]
    position = first_position(model, inputs)
    for _ in range(num_tokens):
        yield outputs.logits[:, -1]
        token = outputs.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = {} if TRANSFORMERS_5 else {"cache_position": torch.tensor([mask.shape[1] - 1])}
        if explicit_positions:
            step["position_ids"] = position
        position = position + 1
        outputs = model(
            input_ids=token, attention_mask=mask, **given_cache(cache), use_cache=True, **step
        )


def first_position(model, inputs: dict) -> torch.Tensor:
    """Rotary positions of the first answer token of each row: `(..., batch, 1)`."""
    if not model.model.positions_from_ids:
        return torch.full((len(inputs["input_ids"]), 1), inputs["input_ids"].shape[1])
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    arguments = {name: inputs[name] for name in names if name in inputs}
    _, delta = type(model.model).get_rope_index(model.model, **arguments)
    if TRANSFORMERS_5:  # counted from the tokens of the row
        return (inputs["attention_mask"].sum(1, keepdim=True) + delta).expand(3, -1, -1)
    length = inputs["input_ids"].shape[1]  # counted from the padded length
    return (length + delta).expand(3, -1, -1)


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


# 4. The training forward says of a completion what generating it said.


def training_inputs(batch: Batch, output, lengths: list[int]) -> dict:
    """The prompts and the first `lengths` tokens of their completions, with labels."""
    inputs = dict(batch.inputs)
    prompt_length = inputs["input_ids"].shape[1]
    longest = max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    completion = output.sequences[:, prompt_length : prompt_length + longest]
    completion = completion.masked_fill(~real, 0)
    labels = completion.masked_fill(~real, -100)
    later = {
        "input_ids": completion, "attention_mask": real.long(),
        "mm_token_type_ids": torch.zeros_like(completion),
    }  # fmt: skip
    for name, more in later.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], dim=1)
    unlabelled = torch.full_like(batch.inputs["input_ids"], -100)
    return inputs | {"labels": torch.cat([unlabelled, labels], dim=1)}


@pytest.mark.feature("training forward")
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("boundary", ["prompt_length", "labels", "logits_to_keep"])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_training_forward_repeats_the_scores(shared_models, build_batch, name, boundary, sampled):
    """However the boundary of the prompt is told: by itself, by labels, or as trl does."""
    model, batch = shared_models(10).pruned, build_batch(PROMPTS[name])
    importance = model.glimpse(**batch.inputs).importance
    settings = {"prune_threshold": threshold_that_keeps(importance, 0.4)}
    torch.manual_seed(0)
    output = generate(model, batch.inputs, do_sample=sampled, **settings)
    lengths = [6, 3, 5][: len(batch.rows)]
    inputs = training_inputs(batch, output, lengths)
    prompt_length = batch.inputs["input_ids"].shape[1]
    told = {"prompt_length": prompt_length, "logits_to_keep": max(lengths) + 1}
    if boundary != "labels":
        del inputs["labels"]
        settings |= {boundary: told[boundary]}
    outputs = model(**inputs, **settings)
    losses = []
    for row, length in enumerate(lengths):
        of_row = outputs.logits[row, -max(lengths) - 1 :][:length]
        expected = step_logits(output, row)[:length].log_softmax(-1)
        assert_near(of_row.log_softmax(-1), expected)
        tokens = completion_of(output, batch, row)[:length]
        losses.append(-expected.gather(1, tokens[:, None]))
    if boundary == "labels":
        assert_near(outputs.loss, torch.cat(losses).mean())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_training_forward_repeats_rollouts(build_models, build_batch, sampled, checkpointing):
    """As in reinforcement learning: a rollout's own mask, its scores, and a forward that trains."""
    model, batch = build_models(10).pruned, build_batch(PROMPTS["ragged_batch"])
    with torch.no_grad():
        importance = model.glimpse(**batch.inputs).importance
        settings = {"prune_threshold": threshold_that_keeps(importance, 0.4), "output_scores": True}
        torch.manual_seed(1)
        output = generate(model, batch.inputs, do_sample=sampled, top_k=0, **settings)
    lengths = [6, 3, 5][: len(batch.rows)]
    inputs = training_inputs(batch, output, lengths)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = cache_of(output).glimpse.keep_mask
    assert 0 < mask.sum() < len(mask)
    logits = model(**inputs, visual_keep_mask=mask).logits
    suppressed = model.generation_config.suppress_tokens
    logits = logits.index_fill(-1, torch.tensor(suppressed), float("-inf"))
    for row, length in enumerate(lengths):
        tokens = completion_of(output, batch, row)[:length, None]
        found = logits[row, -max(lengths) - 1 :][:length].log_softmax(-1).gather(1, tokens)
        scores = torch.stack(output.scores)[:length, row]
        assert_near(found, scores.log_softmax(-1).gather(1, tokens))
    found.sum().backward()
    for name, gradient in gradients_of(model).items():
        assert gradient is None or gradient.isfinite().all(), name


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_scoring_in_place_leaves_the_prompt_alone(shared_models, build_batch, name):
    """Stage 1 keeps every token: the prompt never sees the glimpse token, the answer does."""
    models, batch = shared_models(10), build_batch(PROMPTS[name])
    output = generate(models.stock, batch.inputs, 4)
    inputs = training_inputs(batch, output, [4, 2, 3][: len(batch.rows)])
    outputs = models.pruned(**inputs, in_place=True)
    expected = models.stock(**inputs)
    prompt_length = batch.inputs["input_ids"].shape[1]
    real = batch.inputs["attention_mask"].bool()
    assert outputs.logits.shape == expected.logits.shape
    assert_near(outputs.logits[:, :prompt_length][real], expected.logits[:, :prompt_length][real])
    seen = batch.visual_counts.index(max(batch.visual_counts))
    change = (outputs.logits - expected.logits)[seen, prompt_length : prompt_length + 2]
    assert change.abs().amax(-1).min() > 1e-3
    importance = models.pruned.glimpse(**batch.inputs).importance
    scored = cache_of(models.pruned(**inputs, in_place=True, use_cache=True)).glimpse
    assert_near(scored.importance, importance)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def hidden_loss(models: Models, batch: Batch, keep: torch.Tensor, output, lengths) -> torch.Tensor:
    """Mean cross-entropy of the completions by the reference, with gradients."""
    losses = []
    rows = zip(batch.rows, batch.split(keep), lengths, strict=True)
    for row, (prompt, mask, length) in enumerate(rows):
        tokens = completion_of(output, batch, row)[:length]
        layer = cache_of(output).glimpse.prune_layer
        logits = run_hidden(models.stock, prompt, tokens[:-1], mask, layer).logits[-length:]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("glimpse_layer", [0, 1, 2])
def test_training_gradients_equal_hidden(build_models, build_batch, glimpse_layer):
    """Loss and gradients of every base weight, those below and above the glimpse layer."""
    models = build_models(11, glimpse={"glimpse_layer": glimpse_layer})
    batch, lengths = build_batch(PROMPTS["ragged_batch"]), [4, 2, 3]
    keep = torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(4)) < 0.4
    with torch.no_grad():
        output = generate(models.pruned, batch.inputs, 4, visual_keep_mask=keep)
    expected_loss = hidden_loss(models, batch, keep, output, lengths)
    expected_loss.backward()
    inputs = training_inputs(batch, output, lengths)
    loss = models.pruned.train()(**inputs, visual_keep_mask=keep).loss
    loss.backward()
    assert_near(loss, expected_loss)
    found = gradients_of(models.pruned)
    for name, expected in gradients_of(models.stock).items():
        if expected is None:  # CLIP's last block is none of the features
            assert found[name] is None, name
            continue
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            continue  # it shifts all scores of a query alike: its gradient is rounding
        scale = expected.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=1e-3 * scale.item(), msg=name
        )


def test_own_choice_trains_without_nan(build_models, build_batch):
    """The hard choice passes no gradient to the glimpse, and none that is not a number."""
    model, batch = build_models(12).pruned.train(), build_batch(PROMPTS["ragged_batch"])
    with torch.no_grad():
        output = generate(model, batch.inputs, 4, max_keep_ratio=0.3)
    model(**training_inputs(batch, output, [4, 1, 2]), max_keep_ratio=0.3).loss.backward()
    for name, gradient in gradients_of(model).items():
        if name.startswith("model.glimpse."):
            assert gradient is None or not gradient.any(), name
        elif gradient is not None:  # CLIP's last block is none of the features
            assert gradient.isfinite().all() and gradient.any(), name
