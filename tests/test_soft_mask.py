"""Soft masks: at 0 and -inf they are the hard ones, between them gradients flow to the scores."""

import pytest
import torch
from double_precision import as_double, in_double_precision
from generation_checks import (
    assert_near,
    generate,
    training_inputs,
)
from generation_prompts import (
    FAMILY_NAMES,
    IMAGE_PROMPTS,
    PROMPTS,
)

from glimpseprune.training.soft_mask import log_keep_probability
from glimpseprune.training.stage1_losses import distillation_loss
from modeling_glimpseprune.stock import cache_of


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    return request.param


def completed(models, batch, lengths=(4, 2, 3)) -> tuple[dict, int]:
    """The batch with greedy answers behind its prompts, and the prompts' length."""
    with torch.no_grad():
        output = generate(models.stock, batch.inputs, max(lengths))
    inputs = training_inputs(batch, output, list(lengths[: len(batch.rows)]))
    return inputs, batch.inputs["input_ids"].shape[1]


def random_keep(batch, share: float = 0.4) -> torch.Tensor:
    return torch.rand(batch.num_visual, generator=torch.Generator().manual_seed(4)) < share


def hard_log_keep(keep: torch.Tensor) -> torch.Tensor:
    return torch.where(keep, 0.0, float("-inf"))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", IMAGE_PROMPTS)
@torch.no_grad()
def test_zero_and_one_are_the_hard_mask(shared_models, build_batch, name, attention, share):
    models, batch = shared_models(13, attention), build_batch(PROMPTS[name])
    inputs, prompt_length = completed(models, batch)
    keep = random_keep(batch, share)
    hard = models.pruned(**inputs, visual_keep_mask=keep)
    soft = models.pruned(**inputs, visual_log_keep=hard_log_keep(keep))
    supervised = inputs["labels"] != -100
    last = torch.zeros_like(supervised)
    last[:, prompt_length - 1] = True
    assert_near(soft.logits[supervised | last], hard.logits[supervised | last], 1e-5)
    assert_near(soft.loss, hard.loss, 1e-5)
    assert soft.logits.isfinite().all() and cache_of(soft) is None


@pytest.mark.parametrize("glimpse_layer", [0, 2])
@torch.no_grad()
def test_it_acts_where_hard_pruning_does(build_models, build_batch, glimpse_layer):
    """At the first and the last layer; with the glimpse layer off by one it is another forward."""
    batch = build_batch(PROMPTS["ragged_batch"])
    keep, logits = random_keep(batch), {}
    for layer in (glimpse_layer, 1):
        models = build_models(14, glimpse={"glimpse_layer": layer})
        inputs, _ = completed(models, batch)
        hard = models.pruned(**inputs, visual_keep_mask=keep).loss
        logits[layer] = models.pruned(**inputs, visual_log_keep=hard_log_keep(keep)).loss
        assert_near(logits[layer], hard, 1e-5)
    assert (logits[glimpse_layer] - logits[1]).abs() > 1e-4


@torch.no_grad()
def test_it_is_continuous_and_weighs(shared_models, build_batch):
    """A keep probability of one half is a bias of log(1/2): between the two hard masks."""
    models, batch = shared_models(13), build_batch(PROMPTS["one_image"])
    inputs, _ = completed(models, batch)
    keep = random_keep(batch)

    def loss(log_keep):
        return models.pruned(**inputs, visual_log_keep=log_keep).loss

    hard, nearly = loss(hard_log_keep(keep)), loss(torch.where(keep, 0.0, -20.0))
    assert_near(nearly, hard, 1e-4)
    half, all_kept = loss(torch.where(keep, 0.0, 0.5).log().where(~keep, 0.0)), loss(keep * 0.0)
    assert min((half - hard).abs(), (half - all_kept).abs()) > 1e-4


def test_gradients_are_finite_differences(build_models, build_batch):
    """Of a divergence by three scores, in double precision; a token is certainly dropped."""
    models = build_models(13)
    batch = build_batch(PROMPTS["ragged_batch"])
    inputs, prompt_length = completed(models, batch)
    model = in_double_precision(models.pruned.requires_grad_(False))
    inputs = {name: as_double(value) for name, value in inputs.items()}
    labels = inputs.pop("labels")[:, prompt_length:]
    inputs |= {"prompt_length": prompt_length, "logits_to_keep": labels.shape[1] + 1}
    teacher = model(**inputs, prune=False).logits[:, :-1]
    scores = some_scores(batch).double().requires_grad_()

    def loss(scores):
        student = model(**inputs, visual_log_keep=log_keep_probability(scores, 0.7)).logits[:, :-1]
        return distillation_loss(teacher, student, labels).sum()

    loss(scores).backward()
    assert scores.grad.isfinite().all() and scores.grad[3].abs() < 1e-12
    assert (scores.grad.abs() > 1e-9).sum() == batch.num_visual - 1
    with torch.no_grad():
        for token in (0, batch.num_visual // 2, batch.num_visual - 1):
            step = torch.zeros_like(scores)
            step[token] = 1e-5
            slope = (loss(scores + step) - loss(scores - step)) / 2e-5
            assert slope.item() == pytest.approx(scores.grad[token].item(), rel=1e-5, abs=1e-9)


def some_scores(batch) -> torch.Tensor:
    scores = torch.randn(batch.num_visual, generator=torch.Generator().manual_seed(7))
    scores[3] = -300.0
    return scores


def test_gradients_do_not_depend_on_the_attention(build_models, build_batch):
    batch, gradients = build_batch(PROMPTS["ragged_batch"]), []
    for attention in ("sdpa", "eager"):
        models = build_models(13, attention)
        inputs, _ = completed(models, batch)
        scores = some_scores(batch).requires_grad_()
        models.pruned.requires_grad_(False)
        models.pruned(**inputs, visual_log_keep=log_keep_probability(scores)).loss.backward()
        gradients.append(scores.grad)
    assert_near(gradients[0], gradients[1], 1e-6)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(build_models, build_batch, reentrant):
    models, batch = build_models(13), build_batch(PROMPTS["ragged_batch"])
    inputs, _ = completed(models, batch)
    model, gradients = models.pruned.requires_grad_(False).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        scores = torch.linspace(-3, 3, batch.num_visual, requires_grad=True)
        model(**inputs, visual_log_keep=log_keep_probability(scores)).loss.backward()
        gradients.append(scores.grad)
    assert_near(gradients[1], gradients[0], 1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_a_dropped_token_at_the_very_start_is_no_nan(shared_models, build_batch):
    """LLaVA-like prompts may begin with an image: its first token then sees nothing but itself."""
    models = shared_models(13)
    batch = build_batch([[(2, 2), 3], [5, (2, 2), 2]])
    inputs, _ = completed(models, batch, (3, 2))
    log_keep = hard_log_keep(torch.zeros(batch.num_visual, dtype=torch.bool)).requires_grad_()
    outputs = models.pruned(**inputs, visual_log_keep=log_keep)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all() and log_keep.grad.isfinite().all()


@torch.no_grad()
def test_bfloat16_is_finite(build_models, build_batch):
    models, batch = build_models(13), build_batch(PROMPTS["ragged_batch"])
    inputs, _ = completed(models, batch)
    keep = random_keep(batch)
    with torch.autocast("cpu", torch.bfloat16):
        hard = models.pruned(**inputs, visual_keep_mask=keep)
        soft = models.pruned(**inputs, visual_log_keep=hard_log_keep(keep))
    assert soft.logits.isfinite().all()
    assert_near(soft.loss.float(), hard.loss.float(), 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_log_keep": torch.ones(12, dtype=torch.bool)}, "must be a float tensor, got"),
        ({"visual_log_keep": torch.zeros(3)}, r"must have shape \(\d+,\).* got \(3,\)"),
        ({"in_place": True}, "cannot be combined with in_place"),
        ({"visual_keep_mask": True}, "cannot be combined with visual_keep_mask"),
    ],
)
def test_bad_soft_masks(shared_models, build_batch, options, message):
    models, batch = shared_models(13), build_batch(PROMPTS["one_image"])
    fitting = {"visual_log_keep": torch.zeros(batch.num_visual)}
    if "visual_keep_mask" in options:
        options = {"visual_keep_mask": fitting["visual_log_keep"] == 0}
    with pytest.raises(ValueError, match=message):
        models.pruned(**batch.inputs, **(fitting | options))


def test_generate_refuses_a_soft_mask(shared_models, build_batch):
    models, batch = shared_models(13), build_batch(PROMPTS["one_image"])
    with pytest.raises(ValueError, match="visual_log_keep"):
        generate(models.pruned, batch.inputs, visual_log_keep=torch.zeros(batch.num_visual))
