"""The training forward says of a completion what generating it said."""

import pytest
import torch
from generation_checks import (
    assert_near,
    completion_of,
    generate,
    gradients_of,
    hidden_loss,
    step_logits,
    threshold_that_keeps,
    training_inputs,
)
from generation_prompts import (
    PROMPTS,
    family,  # noqa: F401 (a fixture)
)

from modeling_glimpseprune.stock import cache_of


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
