"""Look ahead: drop at the prune layer P what the glimpse, read ahead at K, finds unneeded.

`look_ahead_reference.py` scores slowly, over whole sequences with explicit masks and stale states;
`reference.py` generates with the chosen mask and P in K's place.
"""

import random

import pytest
import torch
from conftest import Batch, Models, counts_from_ids, has_windows, sees_videos
from double_precision import as_double, in_double_precision
from generation_checks import (
    assert_cache_equals,
    assert_near,
    assert_same_output,
    completion_of,
    generate,
    step_logits,
    threshold_that_keeps,
)
from generation_prompts import (
    FAMILY_NAMES,
    GLIMPSE_VARIANTS,
    random_prompts,
)
from look_ahead_reference import Corrections, Earlier, score_ahead
from random_cases import random_cases

from modeling_glimpseprune.prune_request import PruneRequest
from modeling_glimpseprune.stock import cache_of, given_cache

LAYERS, GLIMPSE_LAYER = 5, 3
RAGGED = [[2, (2, 3), 1, (3, 1), 3], [5, (2, 2), 2], [1, (3, 4), 2]]


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    callspec = getattr(request.node, "callspec", None)
    windowed = callspec and "windowed" in callspec.params.values()
    if windowed and not has_windows(request.param):
        pytest.skip("its vision encoder has no windows")
    return request.param


def models_of(build, seed: int = 4, **glimpse) -> Models:
    return build(seed, glimpse={"glimpse_layer": GLIMPSE_LAYER} | glimpse, num_layers=LAYERS)


def corrections_of(model) -> Corrections:
    """The low-rank additions of a model, as the reference takes them."""

    def matrices(additions):
        return {
            (int(index), name): (pair.down.weight.detach(), pair.up.weight.detach())
            for index, of_layer in (additions or {}).items()
            for name, pair in of_layer.items()
        }

    glimpse = model.model.glimpse
    return Corrections(matrices(glimpse.token_additions), matrices(glimpse.stale_additions))


def assert_scores_equal_the_reference(models: Models, batch: Batch, prune_layer: int) -> None:
    record = models.pruned.glimpse(**batch.inputs, prune_layer=prune_layer)
    assert (record.prune_layer, record.glimpse_layer) == (
        prune_layer,
        models.pruned.config.glimpse_layer,
    )
    glimpse, config = models.pruned.model.glimpse, models.pruned.config
    corrections = corrections_of(models.pruned)
    for prompt, scores in zip(batch.rows, batch.split(record.importance), strict=True):
        if len(scores):
            expected = score_ahead(models.stock, glimpse, config, prompt, prune_layer, corrections)
            assert_near(scores, expected)


@pytest.mark.parametrize("seed", random_cases(40, at_once=14))
@torch.no_grad()
def test_scores_equal_the_slow_reference(build_models, build_batch, seed, family):
    chance = random.Random(seed)
    glimpse_layer = chance.randint(1, LAYERS - 1)
    layers = chance.sample(range(glimpse_layer + 1), chance.randint(1, min(3, glimpse_layer + 1)))
    tokens = chance.choice([0, 1, 1, 2, 3])
    glimpse = {
        "glimpse_layer": glimpse_layer,
        "attention_layers": layers,
        "attention_scores": chance.choice(["logits", "log_probabilities"]),
        "num_glimpse_tokens": tokens,
        "glimpse_lora_rank": chance.choice([0, 0, 3]),
        "stale_rank": chance.choice([0, 0, 2]),
    }
    if tokens:
        glimpse["glimpse_embedding_layers"] = chance.choice([list(range(LAYERS)), [0], [0, 2]])
    models = build_models(
        seed, chance.choice(["sdpa", "eager"]), glimpse=glimpse, num_layers=LAYERS
    )
    batch = build_batch(random_prompts(chance), seed)
    assert_scores_equal_the_reference(models, batch, chance.randint(0, glimpse_layer - 1))


@pytest.mark.parametrize("variant", GLIMPSE_VARIANTS)
@torch.no_grad()
def test_every_variant_looks_ahead(build_models, build_batch, variant):
    glimpse = {"glimpse_layer": GLIMPSE_LAYER} | GLIMPSE_VARIANTS[variant]
    models = build_models(4, glimpse=glimpse, num_layers=LAYERS)
    for prune_layer in range(models.pruned.config.glimpse_layer):
        assert_scores_equal_the_reference(models, build_batch(RAGGED[:2]), prune_layer)


@torch.no_grad()
def test_videos_and_images_look_ahead_together(shared_models, build_batch, family):
    if not sees_videos(family):
        pytest.skip("only Qwen takes videos")
    batch = build_batch([[3, (2, 3, 3), 2], [1, (2, 2, 2), 1]])
    assert_scores_equal_the_reference(models_of(shared_models), batch, 1)


@pytest.mark.parametrize("prune_layer", range(GLIMPSE_LAYER + 1))
@torch.no_grad()
def test_generation_equals_hidden(shared_models, build_batch, prune_layer):
    """Ids, logits and cache are those of the mask chosen, with P in K's place."""
    models, batch = models_of(shared_models), build_batch(RAGGED)
    importance = models.pruned.glimpse(**batch.inputs, prune_layer=prune_layer).importance
    threshold = threshold_that_keeps(importance, 0.4)
    output = generate(
        models.pruned, batch.inputs, prune_layer=prune_layer, prune_threshold=threshold
    )
    masks = batch.split(cache_of(output).glimpse.keep_mask)
    assert 0 < sum(int(mask.sum()) for mask in masks) < batch.num_visual
    from reference import run_hidden

    for row, (prompt, mask) in enumerate(zip(batch.rows, masks, strict=True)):
        completion = completion_of(output, batch, row)
        expected = run_hidden(models.stock, prompt, completion[:-1], mask, prune_layer)
        logits = expected.logits[prompt["input_ids"].shape[1] - 1 :]
        assert_near(step_logits(output, row), logits)
        assert torch.equal(completion, logits.argmax(-1))
        assert_cache_equals(cache_of(output), row, expected)


@torch.no_grad()
def test_without_a_distance_nothing_differs(shared_models, build_batch):
    """P = K, given or by default, to the last bit."""
    models, batch = models_of(shared_models), build_batch(RAGGED)
    default = generate(models.pruned, batch.inputs)
    given = generate(models.pruned, batch.inputs, prune_layer=GLIMPSE_LAYER)
    assert_same_output(given, default, 0.0)
    first, second = cache_of(default).glimpse, cache_of(given).glimpse
    assert torch.equal(first.importance, second.importance)


@torch.no_grad()
def test_the_configuration_says_where(build_models, build_batch):
    models, batch = models_of(build_models), build_batch(RAGGED)
    called = models.pruned.glimpse(**batch.inputs, prune_layer=1)
    models.pruned.config.prune_layer = 1
    assert torch.equal(models.pruned.glimpse(**batch.inputs).importance, called.importance)
    late = models.pruned.glimpse(**batch.inputs, prune_layer=GLIMPSE_LAYER)
    assert late.prune_layer == GLIMPSE_LAYER
    assert not torch.allclose(late.importance, called.importance)


@pytest.mark.parametrize("ranks", [(0, 0), (2, 2)])
@torch.no_grad()
def test_a_batch_equals_its_rows(shared_models, build_batch, ranks):
    lora, stale = ranks
    models = models_of(shared_models, glimpse_lora_rank=lora, stale_rank=stale)
    batch = build_batch(RAGGED)
    together = generate(models.pruned, batch.inputs, prune_layer=1)
    scores = batch.split(cache_of(together).glimpse.importance)
    for row, inputs in enumerate(batch.rows):
        alone = generate(models.pruned, inputs, prune_layer=1)
        assert_near(cache_of(alone).glimpse.importance, scores[row])
        assert torch.equal(alone.sequences[0, -6:], together.sequences[row, -6:])


@torch.no_grad()
def test_a_later_turn_looks_ahead_over_what_was_kept(shared_models, build_batch, family):
    models = models_of(shared_models)
    first, second = build_batch([RAGGED[0]], 1), build_batch([[2, (2, 2), 3]], 2)
    cache = cache_of(models.pruned(**first.inputs, use_cache=True, prune_layer=1))
    keep_mask = cache.glimpse.keep_mask
    assert 0 < keep_mask.sum() < len(keep_mask)
    joined = {
        name: torch.cat([first.inputs[name], second.inputs[name]], dim=1)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in first.inputs
    }
    pixels = {name: value for name, value in second.inputs.items() if name not in joined}
    output = models.pruned.generate(
        **joined, **pixels, **given_cache(cache), prune_layer=0, max_new_tokens=1,
        return_dict_in_generate=True,
    )  # fmt: skip
    whole = joined | {
        name: torch.cat([first.inputs[name], value]) for name, value in pixels.items()
    }
    expected = score_ahead(
        models.stock,
        models.pruned.model.glimpse,
        models.pruned.config,
        whole,
        0,
        earlier=Earlier(first.rows[0], keep_mask, 1),
        turn=second.rows[0],
    )
    assert_near(cache_of(output).glimpse.importance, expected)


@torch.no_grad()
def test_prompts_given_as_embeddings(shared_models, build_batch, family):
    if counts_from_ids(family):
        pytest.skip("Qwen counts the positions of images from the ids")
    models, batch = models_of(shared_models), build_batch(RAGGED[:2])
    expected = generate(models.pruned, batch.inputs, prune_layer=1)
    inputs = dict(batch.inputs)
    inputs["inputs_embeds"] = models.pruned.get_input_embeddings()(inputs.pop("input_ids"))
    output = generate(models.pruned, inputs, prune_layer=1)
    assert torch.equal(output.sequences[:, -6:], expected.sequences[:, -6:])


@torch.no_grad()
def test_layers_above_the_prune_layer_hold_kept_tokens_only(shared_models, build_batch):
    """Nothing of the look-ahead enters the cache."""
    models, batch = models_of(shared_models), build_batch([RAGGED[0]])
    output = generate(models.pruned, batch.inputs, 2, prune_layer=1, max_keep_ratio=0.3)
    kept = int(cache_of(output).glimpse.keep_mask.sum())
    text = batch.inputs["input_ids"].shape[1] - batch.num_visual
    assert {layer.keys.shape[2] for layer in cache_of(output).layers} == {text + kept + 1}


@pytest.mark.parametrize("prune_layer", [0, 2, GLIMPSE_LAYER])
@torch.no_grad()
def test_additions_of_zero_change_nothing(build_models, build_batch, prune_layer):
    plain = models_of(build_models)
    with_additions = models_of(build_models, glimpse_lora_rank=2, stale_rank=2)
    missing, unexpected = with_additions.pruned.load_state_dict(
        plain.pruned.state_dict(), strict=False
    )
    assert not unexpected and missing
    assert all("_additions." in name for name in missing)
    for name, weight in with_additions.pruned.named_parameters():
        if name.endswith(".up.weight"):
            weight.zero_()
    batch = build_batch(RAGGED)
    one, other = (
        models.pruned.glimpse(**batch.inputs, prune_layer=prune_layer).importance
        for models in (plain, with_additions)
    )
    assert_near(one, other)  # glimpse rows run apart from the text, which rounds differently


def test_new_additions_start_at_zero(build_models):
    built = models_of(build_models, glimpse_lora_rank=2, stale_rank=2).pruned
    fresh = type(built)(built.config)
    ups, downs = (
        [weight for name, weight in fresh.named_parameters() if f".{half}.weight" in name]
        for half in ("up", "down")
    )
    assert len(ups) == len(downs) == 7 * (GLIMPSE_LAYER + 1) + 2 * GLIMPSE_LAYER
    assert not any(weight.any() for weight in ups) and all(weight.any() for weight in downs)


def test_gradients_reach_the_glimpse_alone_and_are_right(build_models, build_batch):
    """Finite differences in float64, through stale states, additions and both kinds of rows."""
    models = models_of(build_models, glimpse_lora_rank=2, stale_rank=2, attention_layers=[1, 3])
    model, batch = in_double_precision(models.pruned), build_batch(RAGGED[:2])
    inputs = {name: as_double(value) for name, value in batch.inputs.items()}
    for name, weight in model.named_parameters():
        weight.requires_grad_(".glimpse." in name)

    def total() -> torch.Tensor:
        outputs = model.model(
            **inputs, prune=True, only_glimpse=True, prune_layer=0, use_cache=True
        )
        importance = cache_of(outputs).glimpse.importance
        weights = torch.linspace(-1, 1, len(importance), dtype=torch.float64)
        return (importance * weights).sum()

    total().backward()
    step, generator = 1e-6, torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            assert weight.grad is None, name
            continue
        idle = "output_projection.bias" in name  # the same for every token; the weights sum to 0
        if weight.grad is None or not weight.grad.any():
            # Of layer K nothing is read but the glimpse's query and the visual tokens' keys.
            read = (f"token_additions.{GLIMPSE_LAYER}.q", f"stale_additions.{GLIMPSE_LAYER}.k")
            of_last = f"_additions.{GLIMPSE_LAYER}." in name
            assert idle or (of_last and not any(part in name for part in read)), name
            continue
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight += step * direction
            above_it = total()
            weight -= 2 * step * direction
            below_it = total()
            weight += step * direction
        slope = (above_it - below_it) / (2 * step)
        expected = (weight.grad * direction).sum()
        # Central differences are exact to step ** 2 and rounding, 1e-16 / step of the values.
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_hidden_states_and_attentions_have_the_callers_shape(shared_models, build_batch):
    models, batch = models_of(shared_models), build_batch(RAGGED)
    output = models.pruned(
        **batch.inputs, prune_layer=1, output_hidden_states=True, max_keep_ratio=0.3
    )
    length = batch.inputs["input_ids"].shape[1]
    assert [each.shape[1] for each in output.hidden_states] == [length] * (LAYERS + 1)
    zeros = [int((each.abs().sum(-1) == 0).sum()) for each in output.hidden_states]
    assert zeros[0] == zeros[1] == 0 and zeros[2] == zeros[-1] > 0


@pytest.mark.parametrize("prune_layer", [GLIMPSE_LAYER + 1, -2, -1, 1.5, True, "1"])
def test_a_layer_that_cannot_be_is_refused(shared_models, build_batch, prune_layer):
    models, batch = models_of(shared_models), build_batch([RAGGED[0]])
    with pytest.raises(ValueError, match="prune_layer must be None or one of the layers 0"):
        models.pruned.glimpse(**batch.inputs, prune_layer=prune_layer)


def test_a_glimpse_in_place_cannot_be_read_ahead(shared_models, build_batch):
    models, batch = models_of(shared_models), build_batch([RAGGED[0]])
    with pytest.raises(ValueError, match="in_place needs the glimpse token in the sequence"):
        models.pruned(**batch.inputs, in_place=True, prune_layer=1)


def test_a_callers_mask_needs_no_look_ahead():
    request = PruneRequest(None, None, 3, None, [], 0.5, None, 1, prune_layer=1)
    assert request.looks_ahead
    request.visual_keep_mask = torch.ones(4, dtype=torch.bool)
    assert not request.looks_ahead and not request.runs_beside
