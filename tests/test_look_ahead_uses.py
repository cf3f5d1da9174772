"""What users do with a model that looks ahead: every kind of prompt, cache, turn and training.

The prune layer P lies below the glimpse layer K in all of it. Scores are held to
`look_ahead_reference.py`, answers to `reference.py` with P in K's place.
"""

import random

import pytest
import torch
from conftest import IMAGE_TOKEN, Models, sees_videos
from generation_checks import (
    assert_equals_reference,
    assert_near,
    assert_same_output,
    completion_of,
    decode,
    generate,
    gradients_of,
    hidden_loss,
    second_turn,
    step_logits,
    threshold_that_keeps,
    training_inputs,
)
from generation_prompts import (
    FAMILY_NAMES,
    ONE,
    PROMPTS,
    RAGGED,
    random_keep,
    random_mask,
    random_prompts,
)
from look_ahead_reference import Earlier, score_ahead
from random_cases import random_cases
from reference import run_hidden, select_slowly
from test_deployment import NoStream, flash_attention_in_words
from test_look_ahead import assert_scores_equal_the_reference, corrections_of
from test_soft_mask import hard_log_keep
from test_turns import (
    TURNS,
    OpenlyRoundedLayer,
    RoundedLayer,
    assert_equals_two_turns,
    cache_of_layers,
    conversation,
    follow,
)
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_glimpseprune import decoder_layers
from modeling_glimpseprune.stock import cache_of, given_cache

LAYERS, GLIMPSE_LAYER, PRUNE_LAYER = 4, 2, 0
RANKS = [(0, 0), (2, 2)]


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    named = request.node.callspec.params.get("name")
    if "video" in str(named) and not sees_videos(request.param):
        pytest.skip("CLIP sees no videos")
    return request.param


def models_of(build, seed: int = 40, attention: str = "sdpa", ranks=(2, 2), **glimpse) -> Models:
    """Models whose configuration looks ahead, with low-rank additions unless told otherwise."""
    fields = {"glimpse_layer": GLIMPSE_LAYER, "prune_layer": PRUNE_LAYER}
    fields |= {"glimpse_lora_rank": ranks[0], "stale_rank": ranks[1]}
    return build(seed, attention, fields | glimpse, num_layers=LAYERS)


def settings_of(models: Models, batch, share: float = 0.4) -> dict:
    """A threshold of its own choice that is far from every score."""
    importance = models.pruned.glimpse(**batch.inputs).importance
    return {"prune_threshold": threshold_that_keeps(importance, share)}


def chosen(batch, output) -> list[torch.Tensor]:
    """The keep mask of each row; both kinds of tokens must be there."""
    mask = cache_of(output).glimpse.keep_mask
    assert 0 < mask.sum() < len(mask)
    return batch.split(mask)


# Prompts.


@pytest.mark.parametrize("seed", random_cases(10, at_once=4))
@torch.no_grad()
def test_random_generations_equal_hidden(build_models, build_batch, seed):
    """Own choices and callers' masks, by call and by configuration, at every distance."""
    chance = random.Random(2000 + seed)
    glimpse_layer = chance.randint(1, LAYERS - 1)
    prune_layer = chance.randrange(glimpse_layer)
    attention, ranks = chance.choice(["sdpa", "eager"]), chance.choice(RANKS)
    configured = chance.choice([prune_layer, glimpse_layer, None])
    models = models_of(
        build_models, seed, attention, ranks, glimpse_layer=glimpse_layer, prune_layer=configured
    )
    called = {} if configured == prune_layer else {"prune_layer": prune_layer}
    for _ in range(2):
        batch = build_batch(random_prompts(chance), chance.randrange(1000))
        masks = [random_mask(chance, count) for count in batch.visual_counts]
        given = generate(
            models.pruned, batch.inputs, 3, visual_keep_mask=torch.cat(masks), **called
        )
        assert cache_of(given).glimpse.prune_layer == prune_layer
        assert_equals_reference(models, batch, given, masks)
        importance = models.pruned.glimpse(**batch.inputs, **called).importance
        threshold = threshold_that_keeps(importance, chance.random())
        own = generate(models.pruned, batch.inputs, 3, prune_threshold=threshold, **called)
        record = cache_of(own).glimpse
        assert (record.prune_layer, record.glimpse_layer) == (prune_layer, glimpse_layer)
        assert_near(record.importance, importance, 1e-5)
        masks = batch.split(record.keep_mask)
        for scores, mask in zip(batch.split(importance), masks, strict=True):
            assert mask.tolist() == select_slowly(scores.tolist(), threshold, None, 1)
        assert_equals_reference(models, batch, own, masks)


@pytest.mark.feature("prune layer below the glimpse layer")
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_every_kind_of_prompt_looks_ahead(shared_models, build_batch, name, ranks):
    models, batch = models_of(shared_models, ranks=ranks), build_batch(PROMPTS[name])
    output = generate(models.pruned, batch.inputs, 4, **settings_of(models, batch))
    assert_equals_reference(models, batch, output, chosen(batch, output))
    scores = batch.split(cache_of(output).glimpse.importance)
    for prompt, together in zip(batch.rows, scores, strict=True):
        if len(together):
            assert_near(models.pruned.glimpse(**prompt).importance, together)
    if name != "images_and_videos":  # the reference takes one kind a row
        assert_scores_equal_the_reference(models, batch, PRUNE_LAYER)


@torch.no_grad()
def test_a_class_token_runs_ahead(build_models, build_batch, family):
    """LLaVA's strategy `full` puts a token before an image's patches that is never dropped."""
    if family != "llava":
        pytest.skip("only LLaVA keeps class tokens")
    models, batch = models_of(build_models), build_batch([[2, (3, 3), 3]])
    ids = batch.inputs["input_ids"]
    ids = torch.cat([ids[:, :2], torch.full((1, 1), IMAGE_TOKEN), ids[:, 2:]], dim=1)
    inputs = batch.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["vision_feature_select_strategy"] = "full"
    full = batch._replace(inputs=inputs, rows=[inputs])
    assert_scores_equal_the_reference(models, full, PRUNE_LAYER)
    plain = models.pruned.glimpse(**batch.inputs).importance
    assert (models.pruned.glimpse(**inputs).importance - plain).abs().max() > 1e-3


@torch.no_grad()
def test_a_prompt_may_end_in_an_image(build_models, build_batch):
    models, batch = models_of(build_models), build_batch([[3, (2, 3)], [2, (2, 2), 2]])
    assert_scores_equal_the_reference(models, batch, PRUNE_LAYER)
    output = generate(models.pruned, batch.inputs, 3, **settings_of(models, batch))
    assert_equals_reference(models, batch, output, chosen(batch, output))


@torch.no_grad()
def test_the_last_token_must_run_where_it_is_the_one_that_looks(build_models, build_batch, family):
    """Without a glimpse token: a visual token stands still, and no other token looks for it."""
    models = models_of(build_models, num_glimpse_tokens=0)
    batch = build_batch([[2, (2, 2), 2], [3, (2, 3)]])
    if family != "llava":  # in others an image ends in a token of its own
        assert_scores_equal_the_reference(models, batch, PRUNE_LAYER)
        return
    for inputs in (batch.inputs, batch.rows[1]):
        with pytest.raises(ValueError, match="ends in an image.* prune_layer 0: .*glimpse_layer 2"):
            models.pruned.glimpse(**inputs)
    late = models.pruned.glimpse(**batch.inputs, prune_layer=GLIMPSE_LAYER)
    assert late.importance.isfinite().all()


@torch.no_grad()
def test_an_image_alone_is_a_prompt(build_models, build_batch):
    """There is no text to run ahead, in one row or in all."""
    models = models_of(build_models)
    for prompts in ([[(2, 3)]], [[(2, 3)], [4, (2, 2), 3]]):
        assert_scores_equal_the_reference(models, build_batch(prompts), PRUNE_LAYER)


@pytest.mark.parametrize("name", ["one_image", "ragged_batch"])
@torch.no_grad()
def test_embeddings_may_stand_for_ids(shared_models, build_batch, name):
    """Scores and answers are those of the same prompt given by ids at the same positions."""
    models, batch = models_of(shared_models), build_batch(PROMPTS[name])
    inputs = {key: value for key, value in batch.inputs.items() if key != "mm_token_type_ids"}
    ids = inputs.pop("input_ids")
    embeddings = models.pruned.get_input_embeddings()(ids)
    plain = inputs["attention_mask"].cumsum(-1) - 1
    if models.pruned.model.positions_from_ids:
        plain = plain.expand(3, -1, -1)
    settings = {"max_keep_ratio": 0.4, "prune_threshold": 0.0}
    by_ids = models.pruned(
        **inputs, input_ids=ids, position_ids=plain, use_cache=True, logits_to_keep=1, **settings
    )
    expected = cache_of(by_ids).glimpse
    output = generate(models.pruned, inputs, inputs_embeds=embeddings, **settings)
    record = cache_of(output).glimpse
    assert_near(record.importance, expected.importance)
    assert torch.equal(record.keep_mask, expected.keep_mask)
    assert_near(output.logits[0], by_ids.logits[:, -1])
    if not models.pruned.model.positions_from_ids:
        assert_scores_equal_the_reference(models, batch, PRUNE_LAYER)
        assert_equals_reference_of_embeddings(models, batch, output)


def assert_equals_reference_of_embeddings(models: Models, batch, output) -> None:
    """As `assert_equals_reference`, where `generate` returns the new tokens alone."""
    masks = batch.split(cache_of(output).glimpse.keep_mask)
    for row, (prompt, mask) in enumerate(zip(batch.rows, masks, strict=True)):
        completion = output.sequences[row]
        hidden = run_hidden(models.stock, prompt, completion[:-1], mask, PRUNE_LAYER)
        assert_near(step_logits(output, row), hidden.logits[prompt["input_ids"].shape[1] - 1 :])


# How the answer is generated.


@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_cached_equals_uncached(shared_models, build_batch, name):
    models, batch = models_of(shared_models), build_batch(PROMPTS[name])
    settings = settings_of(models, batch)
    expected = generate(models.pruned, batch.inputs, **settings)
    uncached = generate(models.pruned, batch.inputs, use_cache=False, **settings)
    assert_same_output(uncached, expected, 1e-4)
    given = generate(models.pruned, batch.inputs, **given_cache(DynamicCache()), **settings)
    assert_same_output(given, expected)


@pytest.mark.parametrize("options", [{}, {"max_keep_ratio": 0.2}])
@pytest.mark.parametrize("name", ["ragged_batch", "batch_with_text_only_row"])
@torch.no_grad()
def test_beams_of_a_batch_equal_its_rows(shared_models, build_batch, name, options):
    models, batch = models_of(shared_models), build_batch(PROMPTS[name])
    options = settings_of(models, batch, 0.5) | {"num_beams": 3} | options
    together = generate(models.pruned, batch.inputs, 5, **options)
    for row, prompt in enumerate(batch.rows):
        alone = generate(models.pruned, prompt, 5, **options)
        expected = alone.sequences[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(completion_of(together, batch, row), expected)


@torch.no_grad()
def test_generations_with_different_layers_do_not_disturb_each_other(shared_models, build_batch):
    """Early, late and unpruned answers of one model, token by token in turn."""
    model = models_of(shared_models).pruned
    batches = [build_batch(ONE), build_batch(RAGGED, 1), build_batch(RAGGED, 2)]
    explicit_positions = True  # the stock model keeps those of unpruned prompts on the module
    settings = [
        {"max_keep_ratio": 0.4},
        {"max_keep_ratio": 0.4, "prune_layer": GLIMPSE_LAYER},
        {"prune": False},
    ]
    pairs = list(zip(batches, settings, strict=True))
    expected = [generate(model, batch.inputs, 4, **options).logits for batch, options in pairs]
    loops = [
        decode(model, batch.inputs, 4, explicit_positions, **options) for batch, options in pairs
    ]
    for step, together in enumerate(zip(*loops, strict=True)):
        for logits, of_loop in zip(together, expected, strict=True):
            assert_near(logits, of_loop[step])


@torch.no_grad()
def test_long_texts_run_in_parts(shared_models, build_batch, monkeypatch):
    models, batch = models_of(shared_models), build_batch(RAGGED)
    expected = models.pruned.glimpse(**batch.inputs).importance
    monkeypatch.setattr(decoder_layers, "MLP_CHUNK", 5)
    assert_near(models.pruned.glimpse(**batch.inputs).importance, expected, 1e-5)
    output = generate(models.pruned, batch.inputs, 3, **settings_of(models, batch))
    assert_equals_reference(models, batch, output, chosen(batch, output))


@torch.no_grad()
def test_a_flash_kernel_sees_no_look_ahead(build_models, build_batch, monkeypatch):
    """Its masks are two-dimensional; the stand-in refuses any other."""
    models, batch = models_of(build_models), build_batch(RAGGED)
    settings = settings_of(models, batch)
    expected = models.pruned.glimpse(**batch.inputs).importance
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_attention_in_words)
    models.pruned.model.language_model.config._attn_implementation = "flash_attention_2"
    output = generate(models.pruned, batch.inputs, 4, **settings)
    assert_near(cache_of(output).glimpse.importance, expected)
    assert_equals_reference(models, batch, output, chosen(batch, output))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_near(build_models, build_batch, dtype):
    """Base and glimpse in half precision; a glimpse in float32 beside it, as in training."""
    batch = build_batch(RAGGED)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
    expected = models_of(build_models).pruned.glimpse(**batch.inputs).importance
    for mixed in (False, True):
        model = models_of(build_models).pruned.to(dtype)
        if mixed:
            model.model.glimpse.float()
        with torch.autocast("cpu", dtype, enabled=mixed):
            importance = model.glimpse(**inputs).importance.float()
        # Eight bits of mantissa through a decoder and a predictor of random weights.
        assert (importance - expected).abs().mean() < 0.15 * expected.std()


@torch.no_grad()
def test_an_own_glimpse_leaves_no_trace_in_the_layers(build_models, build_batch):
    """What layers return is what they return for the same mask from the caller."""
    model, batch = models_of(build_models, attention="eager").pruned, build_batch(RAGGED)
    asked = {"output_hidden_states": True, "output_attentions": True}
    own = model(**batch.inputs, max_keep_ratio=0.4, use_cache=True, **asked)
    keep = cache_of(own).glimpse.keep_mask
    assert 0 < keep.sum() < len(keep)
    given = model(**batch.inputs, visual_keep_mask=keep, **asked)
    real = batch.inputs["attention_mask"].bool()
    for found, wanted in zip(own.hidden_states, given.hidden_states, strict=True):
        assert_near(found[real], wanted[real])
    for found, wanted in zip(own.attentions, given.attentions, strict=True):
        assert_near(found.transpose(1, 2)[real], wanted.transpose(1, 2)[real])


# Caches.


@torch.no_grad()
def test_a_quantized_cache_never_sees_the_look_ahead(shared_models, build_batch):
    """Scores are exact however coarse it is, and it holds kept tokens, rounded."""
    models, batch = models_of(shared_models), build_batch(RAGGED)
    settings, step = settings_of(models, batch), 2.0**-4
    held = cache_of_layers(models.pruned, RoundedLayer, step, 99)
    openly = cache_of_layers(models.pruned, OpenlyRoundedLayer, step)
    output, expected, unrounded = (
        generate(models.pruned, batch.inputs, **given_cache(cache), **settings)
        for cache in (held, openly, None)
    )
    assert held.layers[0].dropped and held.layers[-1].store.get_seq_length()
    scores = cache_of(unrounded).glimpse.importance
    assert_near(held.glimpse.importance, scores, 1e-5)
    assert_same_output(output, expected)
    assert not torch.allclose(step_logits(output, 0), step_logits(unrounded, 0), atol=1e-2)


@torch.no_grad()
def test_an_offloaded_cache_is_pruned_early(shared_models, build_batch, monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: NoStream())
    models, batch = models_of(shared_models), build_batch(RAGGED)
    options = {"cache_implementation": "offloaded"} | settings_of(models, batch)
    output = generate(models.pruned, batch.inputs, **options)
    assert cache_of(output).offloading
    assert_equals_reference(models, batch, output, chosen(batch, output))


# Later turns.


@pytest.mark.parametrize("name", ["one_image", "ragged_batch"])
@torch.no_grad()
def test_a_second_turn_of_text_equals_hidden(shared_models, build_batch, name):
    models, batch = models_of(shared_models), build_batch(PROMPTS[name])
    first = generate(models.pruned, batch.inputs, 4, **settings_of(models, batch))
    masks = chosen(batch, first)
    inputs = second_turn(batch, first, num_tokens=3)
    second = generate(models.pruned, inputs, 4)
    later = inputs["input_ids"].shape[1] - batch.inputs["input_ids"].shape[1]
    assert_equals_reference(models, batch, second, masks, first_step=later)


@pytest.mark.feature("prune layer below the glimpse layer")
@pytest.mark.parametrize("name", [name for name in TURNS if name != "text after images"])
@torch.no_grad()
def test_a_later_image_looks_ahead_over_what_was_kept(shared_models, build_batch, name):
    """Scores and answers of a second turn: its own glimpse runs over the first turn's kept tokens.

    The first turn's text is exact in every layer; only the new visual tokens stand still.
    """
    models = models_of(shared_models)
    first, second = (build_batch(turn, seed) for seed, turn in enumerate(TURNS[name]))
    start = generate(models.pruned, first.inputs, 3, max_keep_ratio=0.5, prune_threshold=0.0)
    keeps = [torch.zeros(0, dtype=torch.bool)] * len(first.rows)
    if first.num_visual:
        keeps = first.split(cache_of(start).glimpse.keep_mask)
    answers = start.sequences[:, first.inputs["input_ids"].shape[1] :]
    both = conversation(first, second, answers)
    inputs = follow(first, second, start, second)
    output = generate(models.pruned, inputs, 4, max_keep_ratio=0.5, prune_threshold=0.0)
    record = cache_of(output).glimpse
    assert record.prune_layer == PRUNE_LAYER and 0 < record.kept < record.total
    scores, masks = second.split(record.importance), second.split(record.keep_mask)
    glimpse, config = models.pruned.model.glimpse, models.pruned.config
    for row, prompt in enumerate(both.rows):
        if name != "video after image":  # the reference takes one kind a row
            earlier = Earlier(first.rows[row], keeps[row], PRUNE_LAYER)
            expected = score_ahead(
                models.stock, glimpse, config, prompt, PRUNE_LAYER, corrections_of(models.pruned),
                earlier, second.rows[row],
            )  # fmt: skip
            assert_near(scores[row], expected)
        of_row = [keeps[row], masks[row]]
        assert_equals_two_turns(models, prompt, first.rows[row], of_row, output, row)


# Training.


@pytest.mark.parametrize("boundary", ["prompt_length", "labels", "logits_to_keep"])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_training_forward_repeats_the_scores(shared_models, build_batch, name, boundary):
    models, batch = models_of(shared_models), build_batch(PROMPTS[name])
    model, settings = models.pruned, settings_of(models, batch)
    output = generate(model, batch.inputs, **settings)
    lengths = [6, 3, 5][: len(batch.rows)]
    inputs = training_inputs(batch, output, lengths)
    told = {
        "prompt_length": batch.inputs["input_ids"].shape[1],
        "logits_to_keep": max(lengths) + 1,
    }
    if boundary != "labels":
        del inputs["labels"]
        settings |= {boundary: told[boundary]}
    logits = model(**inputs, **settings).logits
    for row, length in enumerate(lengths):
        of_row = logits[row, -max(lengths) - 1 :][:length]
        assert_near(of_row.log_softmax(-1), step_logits(output, row)[:length].log_softmax(-1))


@pytest.mark.feature("prune layer below the glimpse layer")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("own_choice", [False, True])
def test_training_gradients_equal_hidden(build_models, build_batch, own_choice, checkpointing):
    """Of every base weight: the look-ahead, which only chooses, adds nothing to them."""
    models, batch = models_of(build_models), build_batch(RAGGED)
    lengths = [4, 2, 3]
    with torch.no_grad():
        settings = settings_of(models, batch)
        output = generate(models.pruned, batch.inputs, 4, **settings)
    keep = torch.cat(chosen(batch, output))
    expected_loss = hidden_loss(models, batch, keep, output, lengths)
    expected_loss.backward()
    model = models.pruned.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    how = settings if own_choice else {"visual_keep_mask": keep}
    loss = model(**training_inputs(batch, output, lengths), **how).loss
    loss.backward()
    assert_near(loss, expected_loss)
    found = gradients_of(model)
    for name, expected in gradients_of(models.stock).items():
        if expected is None or "vision_tower" in name and name.endswith("k_proj.bias"):
            continue  # see the test of the same name in test_training_forward.py
        scale = expected.abs().max().item()
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-3 * scale, msg=name)
    for name, gradient in found.items():
        if ".glimpse." in name:
            assert gradient is None or not gradient.any(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_of_scores_equal_kept_ones(build_models, build_batch, use_reentrant):
    """Stage 1 on a frozen base, with and without recomputed activations."""
    model, batch = models_of(build_models).pruned.train(), build_batch(RAGGED)
    model.requires_grad_(False)
    model.model.glimpse.requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        outputs = model.model(**batch.inputs, prune=True, only_glimpse=True, use_cache=True)
        cache_of(outputs).glimpse.importance.sigmoid().sum().backward()
        found.append(
            {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )
        model.zero_grad()
    assert found[0].keys() == found[1].keys() and any("stale" in name for name in found[0])
    for name, kept in found[0].items():
        assert_near(found[1][name], kept, 1e-4 * float(kept.abs().max()) + 1e-7)


@torch.no_grad()
def test_a_soft_mask_acts_where_tokens_would_be_dropped(build_models, build_batch):
    models, batch = models_of(build_models), build_batch(RAGGED)
    keep = random_keep(batch)
    inputs = training_inputs(batch, generate(models.stock, batch.inputs, 4), [4, 2, 3])
    losses = {}
    for layer in (PRUNE_LAYER, GLIMPSE_LAYER):
        hard = models.pruned(**inputs, visual_keep_mask=keep, prune_layer=layer).loss
        soft = models.pruned(**inputs, visual_log_keep=hard_log_keep(keep), prune_layer=layer)
        assert_near(soft.loss, hard, 1e-5)
        losses[layer] = hard
    assert (losses[PRUNE_LAYER] - losses[GLIMPSE_LAYER]).abs() > 1e-4


# Repositories.


@pytest.mark.parametrize("ranks", RANKS)
@torch.no_grad()
def test_a_reloaded_model_is_the_same(shared_models, build_batch, tmp_path, ranks):
    model, batch = models_of(shared_models, ranks=ranks).pruned, build_batch(RAGGED)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert reloaded.config.prune_layer == PRUNE_LAYER
    settings = {"max_keep_ratio": 0.4}
    expected = generate(model, batch.inputs, **settings)
    found = generate(reloaded, batch.inputs, **settings)
    assert_same_output(found, expected)
    first, second = (cache_of(output).glimpse.importance for output in (expected, found))
    assert_near(second, first)  # memory that is aligned otherwise is summed otherwise
