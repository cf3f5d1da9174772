"""The slow reference of the look-ahead is right: checks that need no fast code."""

import pytest
import torch
from conftest import Models, has_windows
from generation_checks import (
    assert_near,
)
from generation_prompts import (
    FAMILY_NAMES,
    GLIMPSE_VARIANTS,
)
from look_ahead_reference import (
    Corrections,
    attention_ahead,
    score_ahead,
    start_sequence,
)
from reference import positions, score_slowly, visual_positions, weights_of

LAYERS, GLIMPSE_LAYER = 5, 3
PARTS = [2, (2, 3), 1, (3, 1), 3]


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    if "windowed" in request.node.callspec.params.values() and not has_windows(request.param):
        pytest.skip("CLIP sees no windows")
    return request.param


def models_of(shared_models, **glimpse) -> Models:
    return shared_models(4, glimpse={"glimpse_layer": GLIMPSE_LAYER} | glimpse, num_layers=LAYERS)


def score(models: Models, prompt: dict, prune_layer: int, **options) -> torch.Tensor:
    glimpse, config = models.pruned.model.glimpse, models.pruned.config
    return score_ahead(models.stock, glimpse, config, prompt, prune_layer, **options)


def looks_at(models: Models, sequence, prune_layer: int) -> torch.Tensor:
    weights, config = weights_of(models.pruned.model.glimpse), models.pruned.config
    return attention_ahead(models.stock, weights, config, sequence, prune_layer)


@pytest.mark.parametrize("variant", GLIMPSE_VARIANTS)
@torch.no_grad()
def test_without_a_distance_it_is_the_late_glimpse(build_models, build_batch, variant):
    models = build_models(4, glimpse=GLIMPSE_VARIANTS[variant], num_layers=4)
    prompt, config = build_batch([PARTS]).rows[0], models.pruned.config
    expected = score_slowly(models.stock, models.pruned.model.glimpse, config, prompt)
    assert_near(score(models, prompt, config.glimpse_layer), expected)


@pytest.mark.parametrize("prune_layer", range(-1, GLIMPSE_LAYER))
@torch.no_grad()
def test_if_nothing_froze_it_would_be_the_late_glimpse(shared_models, build_batch, prune_layer):
    models, prompt = models_of(shared_models), build_batch([PARTS]).rows[0]
    sequence = start_sequence(models.stock, models.pruned.config, prompt)
    late = looks_at(models, sequence, GLIMPSE_LAYER)
    moving = sequence._replace(frozen=torch.zeros_like(sequence.frozen))
    assert torch.equal(looks_at(models, moving, prune_layer), late)
    assert (looks_at(models, sequence, prune_layer) - late).abs().max() > 0.1


@pytest.mark.parametrize("prune_layer", range(GLIMPSE_LAYER))
@torch.no_grad()
def test_stock_layers_over_stale_states_say_the_same(shared_models, build_batch, prune_layer):
    """The stock decoder itself, with the visual tokens' states put back before each layer."""
    glimpse = {"num_glimpse_tokens": 0, "attention_layers": [GLIMPSE_LAYER, 1]}
    models, prompt = models_of(shared_models, **glimpse), build_batch([PARTS]).rows[0]
    visual, layers = (
        visual_positions(models.stock, prompt),
        models.stock.model.language_model.layers,
    )
    kept = {}

    def note_stale(norm, args):
        kept["stale"] = args[0][:, visual].clone()

    def put_back(layer, args, kwargs):
        states = args[0].clone()
        states[:, visual] = kept["stale"]
        return (states, *args[1:]), kwargs

    hooks = [layers[prune_layer].post_attention_layernorm.register_forward_pre_hook(note_stale)]
    for layer in layers[prune_layer + 1 :]:
        hooks.append(layer.register_forward_pre_hook(put_back, with_kwargs=True))
    models.stock.set_attn_implementation("eager")
    length = prompt["input_ids"].shape[1]
    position_ids = positions(models.stock, prompt, length)
    outputs = models.stock(**prompt | {"position_ids": position_ids}, output_attentions=True)
    models.stock.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    sequence = start_sequence(models.stock, models.pruned.config, prompt)
    found = looks_at(models, sequence, prune_layer).softmax(-1).split(4)
    for layer, weights in zip(models.pruned.config.attention_layers, found, strict=True):
        assert_near(weights, outputs.attentions[layer][0, :, -1], 1e-5)


@torch.no_grad()
def test_it_tells_neighbouring_layers_apart(shared_models, build_batch):
    """No comparison with it could pass with another prune layer."""
    models, prompt = models_of(shared_models), build_batch([PARTS]).rows[0]
    scores = [score(models, prompt, layer) for layer in range(-1, GLIMPSE_LAYER + 1)]
    for i, first in enumerate(scores):
        for second in scores[:i]:
            assert (first - second).abs().max() > 1e-2


@torch.no_grad()
def test_text_of_every_place_runs_ahead(shared_models, build_batch):
    """Text before, between and behind images matters above the prune layer, as do newlines."""
    models, prompt = models_of(shared_models), build_batch([PARTS]).rows[0]
    sequence = start_sequence(models.stock, models.pruned.config, prompt)
    expected = looks_at(models, sequence, 0)
    for place in (~sequence.frozen & ~sequence.is_glimpse).nonzero()[:, 0].tolist():
        frozen = sequence.frozen.clone()
        frozen[place] = True
        looks = looks_at(models, sequence._replace(frozen=frozen), 0)
        assert (looks - expected).abs().max() > 1e-3, place


def random_corrections(models: Models, rank: int, seed: int = 0) -> Corrections:
    generator = torch.Generator().manual_seed(seed)
    glimpse, stale = {}, {}
    for index in range(GLIMPSE_LAYER + 1):
        layer = models.stock.model.language_model.layers[index]
        for part in (layer.self_attn, layer.mlp):
            for name, module in part.named_children():
                if isinstance(module, torch.nn.Linear):
                    wide, out = module.in_features, module.out_features
                    pair = (
                        torch.randn(rank, wide, generator=generator) / wide**0.5,
                        torch.randn(out, rank, generator=generator) / rank**0.5,
                    )
                    glimpse[index, name] = pair
                    if name in ("k_proj", "v_proj"):
                        stale[index, name] = tuple(matrix.flip(0) for matrix in pair)
    return Corrections(glimpse, stale)


@torch.no_grad()
def test_each_correction_matters_where_it_should(shared_models, build_batch):
    """And nowhere else: stale ones up to the prune layer, or of zeros, change nothing."""
    models, prompt = models_of(shared_models), build_batch([PARTS]).rows[0]
    everything = random_corrections(models, rank=2)
    assert len(everything.glimpse) == 7 * (GLIMPSE_LAYER + 1)
    plain = score(models, prompt, 1)
    zeros = Corrections(
        *(
            {place: (down, 0 * up) for place, (down, up) in each.items()}
            for each in (everything.glimpse, everything.stale)
        )
    )
    assert torch.equal(score(models, prompt, 1, corrections=zeros), plain)
    for kind in ("glimpse", "stale"):
        for place, (down, up) in getattr(everything, kind).items():
            one = Corrections({}, {})
            getattr(one, kind)[place] = (down, up)
            change = (score(models, prompt, 1, corrections=one) - plain).abs().max()
            index, name = place
            reads_no_value = index == GLIMPSE_LAYER and name != "q_proj"
            of_visual_keys = kind == "stale" and name == "k_proj"
            is_idle = (reads_no_value and not of_visual_keys) or (kind == "stale" and index <= 1)
            assert (change == 0) == is_idle, (kind, place, change)


@torch.no_grad()
def test_a_class_token_runs_ahead(build_models, build_batch, family):
    """LLaVA's strategy `full` puts a token before an image's patches that is never dropped."""
    if family != "llava":
        pytest.skip("only LLaVA keeps class tokens")
    models, prompt = build_models(4), build_batch([[2, (3, 3), 3]]).rows[0]
    ids = prompt["input_ids"]
    ids = torch.cat([ids[:, :2], torch.full((1, 1), 190), ids[:, 2:]], dim=1)
    full = prompt | {"input_ids": ids, "vision_feature_select_strategy": "full"}
    assert visual_positions(models.stock, full) == list(range(3, 12))
    assert visual_positions(models.stock, prompt) == list(range(2, 11))
    sequence = start_sequence(models.stock, models.pruned.config, full)
    assert sequence.frozen.nonzero()[:, 0].tolist() == list(range(3, 12))
