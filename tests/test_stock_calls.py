"""What comes back from a call, and how it may be made, where people met a difference to the stock.

`test_stock_contract.py` asks in general what is asked here of single troubles.
"""

import inspect

import pytest
import torch
from generation_checks import (
    assert_near,
)
from generation_prompts import (
    FAMILY_NAMES,
)

from modeling_glimpseprune.stock import CACHE_NAME, TRANSFORMERS_5

PROMPT = [[2, (2, 3), 3]]
VISUALS = ("pixel_values", "image_grid_thw", "image_sizes")
PRUNING = [{"prune": False}, {"max_keep_ratio": 0.5}]
OF_TRANSFORMERS_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="encoders return lists there")


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    return request.param


def shapes(value):
    """What a nested output holds."""
    if isinstance(value, (list, tuple)):
        return [shapes(each) for each in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value)


def parts(model) -> dict:
    return {"model": model, "backbone": model.model}


@pytest.fixture
def tuples_by_configuration(build_models):
    """Models whose configuration wants tuples."""
    models = build_models(5)
    for model in models:
        model.config.return_dict = model.model.config.return_dict = False
    return models


@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("how", PRUNING, ids=["unpruned", "pruned"])
@torch.no_grad()
def test_tuples_hold_what_the_stock_models_do(shared_models, build_batch, part, how):
    models, inputs = shared_models(5), build_batch(PROMPT).inputs
    asked = {"return_dict": False, "use_cache": False, "output_hidden_states": True}
    expected = parts(models.stock)[part](**inputs, **asked)
    found = parts(models.pruned)[part](**inputs, **asked, **how)
    assert isinstance(found, tuple) and shapes(found) == shapes(expected)
    if how == {"prune": False}:
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("how", PRUNING, ids=["unpruned", "pruned"])
@torch.no_grad()
def test_the_configuration_may_want_tuples(tuples_by_configuration, build_batch, how):
    models, inputs = tuples_by_configuration, build_batch(PROMPT).inputs
    found = models.pruned.model(**inputs, use_cache=False, **how)
    assert isinstance(found, tuple) and found[0].shape[:2] == inputs["input_ids"].shape
    outputs = models.pruned.model(**inputs, return_dict=True, **how)
    assert outputs.last_hidden_state.shape == found[0].shape
    try:
        expected = models.stock.model(**inputs, use_cache=False)
    except AttributeError:
        return  # a release whose stock backbone cannot
    assert shapes(found) == shapes(expected)


@torch.no_grad()
def test_a_glimpse_is_taken_where_the_configuration_wants_tuples(
    tuples_by_configuration, build_batch
):
    batch = build_batch(PROMPT)
    assert tuples_by_configuration.pruned.glimpse(**batch.inputs).total == batch.num_visual


@OF_TRANSFORMERS_5
@pytest.mark.parametrize("part", ["model", "backbone"])
@torch.no_grad()
def test_image_features_have_the_stock_fields(shared_models, build_batch, part):
    models, inputs = shared_models(5), build_batch(PROMPT).inputs
    visuals = {name: inputs[name] for name in VISUALS if name in inputs}
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = parts(models.stock)[part].get_image_features(**visuals, **asked)
    found = parts(models.pruned)[part].get_image_features(**visuals, **asked)
    assert isinstance(found, type(expected))
    assert found.keys() - expected.keys() == {"glimpse_views"}
    for name in expected:
        assert shapes(found[name]) == shapes(expected[name])
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    as_tuple = {"return_dict": False}
    assert shapes(parts(models.pruned)[part].get_image_features(**visuals, **as_tuple)) == shapes(
        parts(models.stock)[part].get_image_features(**visuals, **as_tuple)
    )


@OF_TRANSFORMERS_5
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
@pytest.mark.parametrize("part", ["model", "backbone"])
@torch.no_grad()
def test_video_features_have_the_stock_fields(shared_models, build_batch, part):
    models, inputs = shared_models(5), build_batch([[2, (2, 2, 3), 3]]).inputs
    names = ("pixel_values_videos", "video_grid_thw")
    visuals = {name: inputs[name] for name in names}
    expected = parts(models.stock)[part].get_video_features(**visuals, output_hidden_states=True)
    found = parts(models.pruned)[part].get_video_features(
        *visuals.values(), output_hidden_states=True
    )
    assert {name: shapes(found[name]) for name in expected} == {
        name: shapes(expected[name]) for name in expected
    }
    assert isinstance(
        parts(models.pruned)[part].get_video_features(*visuals.values(), return_dict=False), tuple
    )


@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("how", PRUNING, ids=["unpruned", "pruned"])
@torch.no_grad()
def test_outputs_have_the_stock_fields(shared_models, build_batch, part, how):
    """Among them the encoded images, as `image_hidden_states` or `image_outputs`."""
    models, inputs = shared_models(5), build_batch(PROMPT).inputs
    expected = parts(models.stock)[part](**inputs)
    found = parts(models.pruned)[part](**inputs, **how)
    assert type(found) is type(expected) and list(found) == list(expected)
    names = {"image_hidden_states", "image_outputs"} & set(expected)
    for name in names:
        given, wanted = found[name], expected[name]
        if name == "image_outputs":
            given, wanted = (torch.cat([*each.pooler_output]) for each in (given, wanted))
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("how", PRUNING, ids=["unpruned", "pruned"])
@torch.no_grad()
def test_arguments_come_by_position(shared_models, build_batch, part, how):
    """As many as the stock forward names, labels among them, in its order."""
    models, inputs = shared_models(5), build_batch(PROMPT).inputs
    stock, pruned = (parts(model)[part] for model in models)
    names = list(inspect.signature(stock.forward).parameters)
    last = "labels" if part == "model" else "inputs_embeds"
    names = names[: names.index(last) + 1]
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    values = inputs | {"labels": labels}
    rest = {name: inputs[name] for name in inputs if name not in names}
    by_name = pruned(**inputs, **how, **({"labels": labels} if part == "model" else {}))
    found = pruned(*(values.get(name) for name in names), **rest, **how)
    assert torch.equal(found[0], by_name[0])


@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("method", ["forward", "get_image_features"])
def test_signatures_begin_as_the_stock_ones(shared_models, part, method):
    models = shared_models(5)
    stock, pruned = (
        list(inspect.signature(getattr(parts(model)[part], method)).parameters.values())
        for model in models
    )
    named = [each for each in stock if each.kind is not inspect.Parameter.VAR_KEYWORD]
    assert [(each.name, each.kind, each.default) for each in pruned[: len(named)]] == [
        (each.name, each.kind, each.default) for each in named
    ]


@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("how", PRUNING, ids=["unpruned", "pruned"])
@torch.no_grad()
def test_ids_or_embeddings(shared_models, build_batch, part, how, family):
    """Neither is refused; both where the stock refuses them."""
    models, inputs = shared_models(5), dict(build_batch(PROMPT).inputs)
    stock, pruned = (parts(model)[part] for model in models)
    embeddings = models.stock.get_input_embeddings()(inputs["input_ids"])
    sentence = "exactly one of input_ids or inputs_embeds"
    if family == "qwen2_5_vl":
        assert_near(
            pruned(**inputs, inputs_embeds=embeddings, **how)[0], pruned(**inputs, **how)[0]
        )
    else:
        with pytest.raises(ValueError) as of_stock:
            stock(**inputs, inputs_embeds=embeddings)
        with pytest.raises(ValueError, match=sentence) as of_ours:
            pruned(**inputs, inputs_embeds=embeddings, **how)
        assert str(of_ours.value) == str(of_stock.value)
    del inputs["input_ids"]
    with pytest.raises(ValueError, match=sentence):
        pruned(**inputs, **how)


def test_a_value_comes_once(shared_models, build_batch):
    ids = build_batch(PROMPT).inputs["input_ids"]
    for part in parts(shared_models(5).pruned).values():
        with pytest.raises(TypeError, match="multiple values for.*input_ids"):
            part(ids, input_ids=ids)
        with pytest.raises(TypeError, match="arguments"):
            part(*[None] * 50)
    assert CACHE_NAME in inspect.signature(shared_models(5).pruned.forward).parameters


@torch.no_grad()
def test_visuals_come_as_pixels_or_encoded(shared_models, build_batch, family):
    model, inputs = shared_models(5).pruned, build_batch(PROMPT).inputs
    pixels = {name: inputs[name] for name in VISUALS if name in inputs}
    encoded = {"image": model.model.encode_visual("image", **pixels)}
    with pytest.raises(ValueError, match="mm_encoder_outputs or pixels, not both"):
        model(**inputs, mm_encoder_outputs=encoded)
    text = {name: inputs[name] for name in inputs if name != "pixel_values"}
    assert torch.equal(model(**text, mm_encoder_outputs=encoded)[0], model(**inputs)[0])
