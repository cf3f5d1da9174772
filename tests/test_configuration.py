"""Fields of the configuration: what may stand in them, wherever they are set, how they are kept.

Every field is tried with values out of range and of wrong types, at each of the places where it can
be given.
"""

import copy
import inspect
import json
import math
import re

import pytest
import torch
from conftest import FAMILIES, TEXT_INPUTS, TRANSFORMERS_5, build_config_fields, sees_videos
from transformers import AutoConfig, Qwen2_5_VLConfig

from modeling_glimpseprune.configuration_glimpseprune import (
    GlimpsePruneConfigMixin,
    GlimpsePruneQwen2_5_VLConfig,
)
from modeling_glimpseprune.glimpse_fields import BUILT_IN_FIELDS, GLIMPSE_FIELDS

PROMPTS = [[3, (2, 3), 2], [(2, 2), 4]]
SMALL = {"predictor_hidden_size": 16, "predictor_condition_size": 16, "predictor_num_heads": 2}
NO_NUMBERS = ["1", None, [1], True]
NO_LAYERS = [[], [-1], [99], [[0]], [0.0], [True], [None], ["0"], "0", 0]
NO_WORDS = ["softmax", None, 1, ["logits"]]
NO_FLAGS = ["yes", 1, None, [True]]
WRONG = {  # the tiny models of every family have three decoder layers and three vision blocks
    "glimpse_layer": [3, 99, -1, 1.0, *NO_NUMBERS],
    "attention_layers": [[2], [0, 2], *NO_LAYERS],
    "attention_scores": NO_WORDS,
    "num_glimpse_tokens": [-1, 1.5, *NO_NUMBERS],
    "glimpse_embedding_layers": [[1], [0, 3], [0, 2, 1], [0, 0], *NO_LAYERS],
    "prune_layer": [-1, 3, 1.5, "1", [1], True],
    "glimpse_lora_rank": [-1, 1.5, *NO_NUMBERS],
    "stale_rank": [-1, 1.5, *NO_NUMBERS],
    "glimpse_norm": NO_WORDS,
    "glimpse_dropout": [-0.1, 1.5, math.nan, *NO_NUMBERS],
    "vision_layers": [[9, 9, 9], [4], *NO_LAYERS],
    "predictor_hidden_size": [0, -16, 16.0, *NO_NUMBERS],
    "predictor_condition_size": [0, -16, 16.0, *NO_NUMBERS],
    "predictor_use_vision": NO_FLAGS,
    "predictor_num_heads": [0, -2, 3, 16, 2.0, *NO_NUMBERS],
    "predictor_hidden_act": ["sillu", None, 1, ["silu"]],
    "predictor_windowed": NO_FLAGS,
    "redundant_patches": [-1, 256, math.nan, "16", [0], True],
    "anchor_corners": [["top"], ["top_left", "middle"], [["top_left"]], [0], "top_left", None],
    "prune_threshold": [7, -0.1, 1.5, math.nan, math.inf, *NO_NUMBERS],
    "max_keep_ratio": [0.0, -0.5, 1.01, math.nan, "1", [1], True],
    "min_keep_tokens": [-1, 1.5, 4.0, *NO_NUMBERS],
}
# Left out, or None in their place, these follow the base.
MAY_BE_NONE = {"glimpse_layer", "attention_layers", "glimpse_embedding_layers", "vision_layers"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def fields(family):
    """Keyword arguments of a valid configuration; K is 1."""
    return FAMILIES[family].config_fields() | SMALL


@pytest.fixture
def config_class(family):
    return FAMILIES[family].family.config_class


@pytest.fixture
def folder(config_class, fields, tmp_path):
    """A saved configuration."""
    config_class(**fields).save_pretrained(tmp_path)
    return tmp_path


def refused(name: str, value: object):
    """Expect an error that names field and value."""
    return pytest.raises(ValueError, match=rf"{name}\b.* must .*{re.escape(repr(value))}$")


def test_every_field_has_wrong_values_and_a_description():
    assert WRONG.keys() == set(GLIMPSE_FIELDS)
    for name in GLIMPSE_FIELDS:
        assert f"\n    {name}: " in inspect.getdoc(GlimpsePruneConfigMixin)


@pytest.mark.parametrize("name", WRONG)
def test_a_new_configuration_is_checked(config_class, fields, name):
    for value in WRONG[name]:
        if value is None and name in MAY_BE_NONE:
            given, left_out = config_class(**fields, **{name: None}), config_class(**fields)
            assert given.to_dict() == left_out.to_dict()
            continue
        with refused(name, value):
            config_class(**(fields | {name: value}))


@pytest.mark.parametrize("name", WRONG)
def test_fields_given_with_a_stored_configuration_are_checked(config_class, folder, name):
    for value in WRONG[name]:
        with refused(name, value):
            config_class.from_pretrained(folder, **{name: value})


@pytest.mark.parametrize("name", WRONG)
def test_fields_set_afterwards_are_checked(family, config_class, fields, tmp_path, name):
    """Before such a configuration is written, and before a model is built on it."""
    config = config_class(**fields)
    for value in WRONG[name]:
        setattr(config, name, value)
        with refused(name, value):
            config.save_pretrained(tmp_path)
        assert not any(tmp_path.iterdir())
    with refused(name, WRONG[name][-1]):
        FAMILIES[family].family.model_class(config)


@pytest.mark.parametrize("name", WRONG)
def test_fields_of_a_stored_file_are_checked(config_class, folder, name):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: WRONG[name][0]}))
    with refused(name, WRONG[name][0]):
        config_class.from_pretrained(folder)


@pytest.mark.parametrize("name", WRONG)
def test_fields_given_with_a_stored_model_are_checked(shared_models, family, tmp_path, name):
    shared_models(50).pruned.save_pretrained(tmp_path)
    with refused(name, WRONG[name][0]):
        FAMILIES[family].family.model_class.from_pretrained(tmp_path, **{name: WRONG[name][0]})


@pytest.mark.parametrize(
    ("stored", "given", "weight"),
    [
        ({"vision_layers": [1, 0]}, {"vision_layers": [0]}, "predictor.condition_projections.1"),
        ({"glimpse_lora_rank": 2}, {"glimpse_lora_rank": 0}, "token_additions.0"),
    ],
)
def test_fields_that_leave_no_place_for_stored_weights(
    build_models, family, tmp_path, stored, given, weight
):
    """Otherwise the model would answer without them."""
    build_models(52, glimpse=stored).pruned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no place for, model.glimpse.{weight}.* among them"):
        FAMILIES[family].family.model_class.from_pretrained(tmp_path, **given)


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_fields_of_a_built_model_are_checked(shared_models, build_batch, monkeypatch, name):
    """At the next call that sees an image, whatever it asks for."""
    model, batch = shared_models(50).pruned, build_batch(PROMPTS)
    visual = {each: batch.inputs[each] for each in batch.inputs if each not in TEXT_INPUTS}
    calls = (
        lambda: model.generate(**batch.inputs, max_new_tokens=1),
        lambda: model.glimpse(**batch.inputs),
        lambda: model(**batch.inputs, prune=False),
        lambda: model.model.get_image_features(**visual),
    )
    for index, value in enumerate(WRONG[name]):
        monkeypatch.setattr(model.config, name, value)
        with refused(name, value):
            calls[index % len(calls)]()


LEGAL_CHANGES = {
    "attention_layers": [0],
    "attention_scores": "log_probabilities",
    "num_glimpse_tokens": 2,
    "glimpse_embedding_layers": [0],
    "glimpse_lora_rank": 2,
    "stale_rank": 2,
    "glimpse_norm": "layer_norm",
    "glimpse_dropout": 0.5,
    "vision_layers": [0],
    "predictor_hidden_size": 32,
    "predictor_condition_size": 32,
    "predictor_use_vision": False,
    "predictor_num_heads": 4,
    "predictor_hidden_act": "gelu",
}


@pytest.mark.parametrize("name", BUILT_IN_FIELDS)
@torch.no_grad()
def test_a_built_model_keeps_what_its_weights_depend_on(
    shared_models, build_batch, monkeypatch, name
):
    model, batch = shared_models(50, glimpse={"glimpse_layer": 2}).pruned, build_batch(PROMPTS)
    built, changed = getattr(model.config, name), LEGAL_CHANGES[name]
    monkeypatch.setattr(model.config, name, changed)
    model.config.validate_glimpse_fields()
    message = f"{name} is {changed!r}, but the model was built with {built!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**batch.inputs, max_new_tokens=1)


@torch.no_grad()
def test_what_a_call_reads_may_be_set_on_a_built_model(build_models, build_batch):
    """Fields that hang together may be set one after the other."""
    batch, glimpse = build_batch(PROMPTS), {"glimpse_layer": 1, "attention_layers": [1]}
    model = build_models(51, glimpse=glimpse).pruned
    later = {"glimpse_layer": 2, "anchor_corners": ["top_left"], "max_keep_ratio": 0.4}
    expected = build_models(51, glimpse=glimpse | later).pruned.glimpse(**batch.inputs)
    for name, value in later.items():
        setattr(model.config, name, value)
    found = model.glimpse(**batch.inputs)
    assert torch.equal(found.importance, expected.importance)
    assert torch.equal(found.keep_mask, expected.keep_mask)
    model.config.glimpse_layer = 0
    with pytest.raises(
        ValueError, match=r"attention_layers must .*glimpse_layer \(0\), .* got \[1\]"
    ):
        model.glimpse(**batch.inputs)


def test_linked_fields_may_be_given_in_any_order(config_class, folder):
    given = {"glimpse_layer": 0, "attention_layers": [0]}
    for names in (list(given), list(given)[::-1]):
        config = config_class.from_pretrained(folder, **{name: given[name] for name in names})
        assert (config.glimpse_layer, config.attention_layers) == (0, [0])


def test_a_field_may_need_a_part_that_is_given_with_it(config_class, folder):
    given = {"text_config": {"num_hidden_layers": 5, "layer_types": None}, "glimpse_layer": 4}
    for names in (list(given), list(given)[::-1]):
        config = config_class.from_pretrained(folder, **{name: given[name] for name in names})
        assert config.glimpse_layer == 4
    with refused("glimpse_layer", 5):
        config_class.from_pretrained(folder, **(given | {"glimpse_layer": 5}))


def test_unused_arguments_come_back(config_class, folder):
    config, unused = config_class.from_pretrained(
        folder, prune_threshold=0.25, other=1, return_unused_kwargs=True
    )
    assert config.prune_threshold == 0.25 and unused["other"] == 1
    assert "prune_threshold" not in unused


def test_lists_are_the_configurations_own(config_class, fields):
    """Tuples are taken too, and written as lists."""
    given = {"vision_layers": (1, 0), "anchor_corners": ["top_left"], "glimpse_layer": 1}
    config = config_class(**fields, **given)
    given["anchor_corners"].append("middle")
    config.validate_glimpse_fields()
    assert config.vision_layers == [1, 0] and config.anchor_corners == ["top_left"]
    other = config_class(**fields)
    other.anchor_corners.append("top_left")
    assert config_class(**fields).anchor_corners == []


@pytest.mark.parametrize("form", ["dictionaries", "objects"])
@pytest.mark.parametrize("tied", [False, True, None])
def test_a_configuration_is_reloaded_as_a_stock_one(family, config_class, tmp_path, tied, form):
    """What a stock configuration gains or loses on its way through a file, and nothing else."""
    if form == "objects" and sees_videos(family) and not TRANSFORMERS_5:
        pytest.skip("the stock class of transformers 4 loses them")
    stock_class = FAMILIES[family].stock_config_class
    changes = []
    for class_, own in ((stock_class, {}), (config_class, SMALL)):
        fields = FAMILIES[family].config_fields()
        for part in (fields, fields["text_config"]):
            part["tie_word_embeddings"] = tied
            if tied is None:
                del part["tie_word_embeddings"]
        if form == "objects":
            stock = stock_class(**fields)
            fields |= {part: getattr(stock, part) for part in ("text_config", "vision_config")}
        config = class_(**fields, **own)
        config.save_pretrained(tmp_path / class_.__name__)
        reloaded = class_.from_pretrained(tmp_path / class_.__name__)
        changes.append(differences(config.to_dict(), reloaded.to_dict()))
    assert changes[1] == changes[0]


def differences(old: dict, new: dict) -> dict:
    """Names and values that differ, in nested dictionaries too."""
    found = {}
    for name in old.keys() | new.keys():
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            before, after = {"differences": differences(before, after)}, {"differences": {}}
        if before != after and name != "_name_or_path":
            found[name] = (before, after)
    return found


@pytest.mark.parametrize("rotary", [{}, {"rope_type": "default"}, {"rope_theta": 500.0}])
def test_rotary_settings_may_lack_the_base_frequency(family, config_class, rotary, tmp_path):
    """As stock configurations, which have a default for it; transformers 4 knows only its own."""
    fields, stock_class = FAMILIES[family].config_fields(), FAMILIES[family].stock_config_class
    text = fields["text_config"]
    del text["rope_theta"]
    section = text.pop("rope_scaling", {})
    text["rope_parameters"] = rotary | {
        name: value for name, value in section.items() if name == "mrope_section"
    }
    config = config_class(**copy.deepcopy(fields), **SMALL)
    if TRANSFORMERS_5:
        expected = stock_class(**copy.deepcopy(fields)).text_config.rope_parameters
        assert config.text_config.rope_parameters == expected
    else:
        default = type(config.text_config)().rope_theta
        assert config.text_config.rope_theta == rotary.get("rope_theta", default)
    config.save_pretrained(tmp_path)
    assert (
        config_class.from_pretrained(tmp_path).to_dict()["text_config"]
        == config.to_dict()["text_config"]
    )


def test_a_flat_configuration_is_read_as_the_stock_class_does(tmp_path):
    """Published Qwen2.5-VL bases hold the text model's fields in the outer configuration."""
    fields = build_config_fields()
    flat = {**fields.pop("text_config"), **fields, "model_type": "qwen2_5_vl"}
    ours = GlimpsePruneQwen2_5_VLConfig(**copy.deepcopy(flat), **SMALL).to_dict()["text_config"]
    assert ours == Qwen2_5_VLConfig(**copy.deepcopy(flat)).to_dict()["text_config"]


def test_the_automatic_class_checks_as_well(folder, family, config_class):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    with refused("glimpse_layer", 99):
        AutoConfig.from_pretrained(folder, glimpse_layer=99)
