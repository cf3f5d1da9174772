"""Arguments reach the models under the names that callers use, and none is ignored in silence.

The cache has two names, one of them per release of transformers; models take both on every release.
What a prompt with pruning does not know is refused.
"""

import copy
import inspect

import pytest
import torch
import transformers
from conftest import FAMILIES
from generation_checks import (
    assert_near,
    assert_same_output,
    completion_of,
    generate,
    step_logits,
)
from generation_prompts import family  # noqa: F401 (a fixture)
from reference import positions
from test_turns import follow
from transformers import DynamicCache, GenerationMixin, Trainer, TrainingArguments

from glimpseprune.loading import TINY_MODEL
from modeling_glimpseprune import stock as stock_file
from modeling_glimpseprune.stock import (
    CACHE_NAME,
    CACHE_NAMES,
    IDLE_ARGUMENTS,
    NEWEST_TESTED,
    cache_of,
    given_cache,
    warn_if_untested,
)

PADDED = [[3, (3, 4), 4], [2, (2, 2), 3]]
SETTINGS = {"max_keep_ratio": 0.4}
LEVELS = ("model", "backbone", "text model")


def call_at(level: str, model, inputs: dict, **arguments):
    """Call the model, its backbone, or its text model, which takes no pixels, with a batch."""
    if level == "text model":
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model.model.language_model(**inputs, **arguments)
    return (model if level == "model" else model.model)(**inputs, **arguments)


# The cache under its names.


@torch.no_grad()
def test_left_padded_rows_equal_the_rows_alone(shared_models, build_batch):
    model, batch = shared_models(40).pruned, build_batch(PADDED)
    assert not batch.inputs["attention_mask"][1].all()
    together = generate(model, batch.inputs, 5, **SETTINGS)
    for row, prompt in enumerate(batch.rows):
        alone = generate(model, prompt, 5, **SETTINGS)
        expected = alone.sequences[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(completion_of(together, batch, row), expected)
        assert_near(step_logits(together, row), step_logits(alone, 0))


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_later_turn_takes_the_cache_under_both_names(shared_models, build_batch, name):
    """A kept cache and new images: as with the release's own name, and not as without a cache."""
    model = shared_models(40).pruned
    first, second = build_batch(PADDED), build_batch([[2, (2, 3), 3]] * 2, 1)
    start = generate(model, first.inputs, 3, **SETTINGS)
    inputs = follow(first, second, start, second)
    expected = generate(model, copy.deepcopy(inputs), 4, **SETTINGS)
    inputs[name] = inputs.pop(CACHE_NAME)
    found = generate(model, inputs, 4, **SETTINGS)
    assert_same_output(found, expected, 0.0)
    assert inputs[name] is cache_of(found)
    assert cache_of(found).get_seq_length() == found.sequences.shape[1] - 1


@pytest.mark.parametrize("how", ["generate", "forward"])
@torch.no_grad()
def test_the_record_is_read_under_every_name_that_outputs_have(shared_models, build_batch, how):
    model, batch = shared_models(40).pruned, build_batch(PADDED)
    if how == "generate":
        output = generate(model, batch.inputs, 2, **SETTINGS)
    else:
        output = model(**batch.inputs, use_cache=True, **SETTINGS)
    names = [name for name in CACHE_NAMES if hasattr(output, name)]
    assert CACHE_NAME in names
    for name in names:
        record = getattr(output, name).glimpse
        assert record is cache_of(output).glimpse and output[name].glimpse is record
        assert torch.equal(record.keep_mask, model.glimpse(**batch.inputs, **SETTINGS).keep_mask)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_every_part_takes_the_cache_under_both_names(shared_models, build_batch, level, name):
    model, batch, cache = shared_models(40).pruned, build_batch(PADDED), DynamicCache()
    outputs = call_at(level, model, batch.inputs, **{name: cache}, use_cache=True)
    assert cache_of(outputs) is cache
    assert cache.get_seq_length() == batch.inputs["input_ids"].shape[1]
    assert hasattr(cache, "glimpse") == (level != "text model")


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_every_part_takes_the_cache_by_position(shared_models, build_batch, level):
    model, batch, cache = shared_models(40).pruned, build_batch(PADDED), DynamicCache()
    inputs = dict(batch.inputs)
    part = {"model": model, "backbone": model.model, "text model": model.model.language_model}
    parameters = list(inspect.signature(part[level].forward).parameters)
    place = next(index for index, name in enumerate(parameters) if name in CACHE_NAMES)
    ahead = [inputs.pop(name, None) for name in parameters[:place]]
    rest = {} if level == "text model" else inputs
    outputs = part[level](*ahead, cache, **rest, use_cache=True)
    assert cache_of(outputs) is cache and cache.get_seq_length() > 0


@pytest.mark.parametrize("level", LEVELS)
def test_two_caches_are_refused(shared_models, build_batch, level):
    model, batch = shared_models(40).pruned, build_batch(PADDED)
    both = {name: DynamicCache() for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="give one of cache and past_key_values, not both"):
        call_at(level, model, batch.inputs, **both)
    with pytest.raises(ValueError, match="give one of cache and past_key_values, not both"):
        generate(model, batch.inputs, 2, **both)


@pytest.mark.parametrize("level", LEVELS)
def test_a_cache_under_an_unknown_name_is_refused(shared_models, build_batch, level):
    """As a release would hand it over that renames the argument again."""
    model, batch = shared_models(40).pruned, build_batch(PADDED)
    message = f"a cache came as 'kv_cache'.*transformers {transformers.__version__}; tested up to "
    with pytest.raises(ValueError, match=message + NEWEST_TESTED):
        call_at(level, model, batch.inputs, kv_cache=DynamicCache())
    with pytest.raises(ValueError, match=message + NEWEST_TESTED):
        generate(model, batch.inputs, 2, kv_cache=DynamicCache())


# Arguments that a prompt with pruning does not know.


def packed(batch) -> dict:
    """What tells a flash attention that a row holds several texts."""
    length = batch.inputs["input_ids"].shape[1]
    bounds = torch.tensor([0, 3, length], dtype=torch.int32)
    lengths = {"max_length_q": length - 3, "max_length_k": length - 3}
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}


UNKNOWN = {
    "mask": lambda batch: {"padding_mask": batch.inputs["attention_mask"]},
    "packed rows": packed,
    "masks by kind": lambda batch: {"masks": {"full": batch.inputs["attention_mask"]}},
    "images in a list": lambda batch: {"images": [torch.zeros(3, 4, 4)]},
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("level", LEVELS[:2])
@torch.no_grad()
def test_unknown_tensors_are_refused_where_visuals_are_pruned(
    shared_models, build_batch, level, name
):
    models, batch = shared_models(40), build_batch(PADDED)
    unknown = UNKNOWN[name](batch)
    message = f"{next(iter(unknown))!r} is an argument that a prompt with pruning does not know"
    with pytest.raises(ValueError, match=message):
        call_at(level, models.pruned, batch.inputs, **unknown)
    found = call_at(level, models.pruned, batch.inputs, prune=False, **unknown)[0]
    assert_near(found, call_at(level, models.stock, batch.inputs, **unknown)[0], 0.0)


def values_of_stock_arguments(models, batch) -> dict:
    """A value for each argument of any family's stock forward on any release."""
    ids = batch.inputs["input_ids"]
    return batch.inputs | {
        "position_ids": positions(models.stock, batch.rows[0], ids.shape[1]),
        "cache": DynamicCache(),
        "past_key_values": DynamicCache(),
        "inputs_embeds": models.stock.get_input_embeddings()(ids),
        "use_cache": True,
        "labels": torch.full_like(ids, -100),  # others say where the prompt ends
        "logits_to_keep": 0,
        "output_attentions": False,
        "output_hidden_states": True,
        "return_dict": True,
        "cache_position": torch.arange(ids.shape[1]),
        "rope_deltas": torch.zeros(1, 1, dtype=torch.long),
        "pixel_values_videos": None,
        "video_grid_thw": None,
        "second_per_grid_ts": None,
        "mm_token_type_ids": torch.isin(ids, models.pruned.model.visual_token_ids).int(),
        "vision_feature_layer": models.stock.config.to_dict().get("vision_feature_layer"),
        "vision_feature_select_strategy": "default",
        "image_sizes": batch.inputs.get("image_sizes"),
        "mm_encoder_outputs": None,
    }


@pytest.mark.parametrize("level", LEVELS[:2])
@torch.no_grad()
def test_every_argument_of_the_stock_forward_is_taken(shared_models, build_batch, level):
    """One after another, beside the prompt: nothing legitimate is refused, nor changes a thing."""
    models, batch = shared_models(40), build_batch(PADDED[:1])
    stock = models.stock if level == "model" else models.stock.model
    expected = call_at(level, models.pruned, batch.inputs, **SETTINGS)[0]
    values = values_of_stock_arguments(models, batch)
    names = list(inspect.signature(type(stock).forward).parameters)[1:-1]
    unknown = set(names) - set(values)
    assert not unknown, (
        f"transformers {transformers.__version__}: {type(stock).__name__}.forward takes "
        f"{unknown}: decide what a pruned prefill makes of it, and give it a value here"
    )
    for name in names:
        inputs = batch.inputs | {name: values[name]}
        if name == "inputs_embeds":
            takes_both = models.pruned.model.takes_ids_beside_embeddings
            inputs["position_ids" if takes_both else "input_ids"] = None
            if models.pruned.model.positions_from_ids and not takes_both:
                inputs["position_ids"] = values["position_ids"]
        outputs = call_at(level, models.pruned, inputs, **SETTINGS)
        found = outputs.logits if level == "model" else outputs.last_hidden_state
        assert_near(found, expected, 1e-5)


@torch.no_grad()
def test_idle_arguments_change_nothing(shared_models, build_batch):
    model, batch = shared_models(40).pruned, build_batch(PADDED)
    expected = model.model(**batch.inputs, **SETTINGS).last_hidden_state
    length = batch.inputs["input_ids"].shape[1]
    for name in sorted(IDLE_ARGUMENTS - {"cache_position", "mm_token_type_ids", "rope_deltas"}):
        given = {name: torch.zeros(2, length, dtype=torch.long)}
        found = model.model(**batch.inputs, **given, **SETTINGS).last_hidden_state
        assert_near(found, expected, 0.0)


COUNTED = ({}, {"num_items_in_batch": 12})


@torch.no_grad()
def test_arguments_of_the_loss(shared_models, build_batch):
    """As `Trainer` gives them: the number of tokens that all micro-batches supervise, or labels."""
    (stock, model), batch = shared_models(40), build_batch(PADDED)
    ids = batch.inputs["input_ids"]
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
    loss = model(**batch.inputs, labels=labels, **SETTINGS).loss
    of_stock = [stock(**batch.inputs, labels=labels, **more).loss for more in COUNTED]
    if of_stock[0] == of_stock[1]:
        pytest.skip("this release's stock class takes no number of tokens")
    for number in (12, torch.tensor(12)):
        arguments = {"labels": labels, "num_items_in_batch": number}
        summed = model(**batch.inputs, **arguments, **SETTINGS).loss
        assert_near(summed, loss * 6 / 12, 1e-6)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    given = {"labels": labels, "shift_labels": shifted}
    assert_near(model(**batch.inputs, **given, **SETTINGS).loss, loss, 1e-6)


# What transformers reads in signatures.


def test_forward_shows_the_arguments_of_the_stock_forward_and_ours(shared_models):
    models = shared_models(40)
    shown = inspect.signature(models.pruned.forward).parameters
    assert set(inspect.signature(models.stock.forward).parameters) <= set(shown)
    ours = {"prune", "prune_threshold", "max_keep_ratio", "min_keep_tokens", "visual_keep_mask"}
    assert ours <= set(shown) and "visual_log_keep" not in shown


def test_generate_shows_the_arguments_of_the_stock_method(shared_models):
    model = shared_models(40).pruned
    assert inspect.signature(model.generate) == inspect.signature(
        GenerationMixin.generate.__get__(model)
    )
    prepares = inspect.signature(model.prepare_inputs_for_generation).parameters
    assert "inputs_embeds" in prepares  # or generation from embeddings is refused


def test_a_misspelt_argument_of_generate_is_refused(shared_models, build_batch):
    model, batch = shared_models(40).pruned, build_batch(PADDED)
    with pytest.raises(ValueError, match="not used by the model.*max_keep_ration"):
        generate(model, batch.inputs, 2, max_keep_ration=0.5)


def test_a_trainer_keeps_the_columns_that_forward_takes(shared_models, tmp_path):
    models = shared_models(40)
    trainer = Trainer(models.pruned, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    trainer._set_signature_columns_if_needed()
    columns = set(trainer._signature_columns)
    assert set(inspect.signature(models.stock.forward).parameters) <= columns
    assert {"visual_keep_mask", "prompt_length", "labels"} <= columns


# Releases that were not tested.


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0.dev0", "10.1"])
def test_a_newer_release_is_said_once(monkeypatch, caplog, version):
    monkeypatch.setattr(transformers, "__version__", version)
    warn_if_untested()
    warn_if_untested()
    said = [record for record in caplog.records if record.name == stock_file.__name__]
    assert len(said) == 1 and said[0].levelname == "WARNING"
    assert f"up to {NEWEST_TESTED}; installed is {version}" in said[0].getMessage()


@pytest.mark.parametrize("version", ["4.57.6", "5.8.1", NEWEST_TESTED, f"{NEWEST_TESTED}.7.dev0"])
def test_a_tested_release_is_not_spoken_of(monkeypatch, caplog, version):
    monkeypatch.setattr(transformers, "__version__", version)
    warn_if_untested()
    assert not caplog.records


def test_the_installed_release_was_tested(caplog):
    warn_if_untested()
    assert not caplog.records, "test this release, then raise stock.NEWEST_TESTED"


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_a_model_of_a_newer_release_loads(monkeypatch, caplog, family):  # noqa: F811
    monkeypatch.setattr(stock_file, "NEWEST_TESTED", "4.1")
    model = FAMILIES[family].family.model_class.from_pretrained(TINY_MODEL)
    said = [each for each in caplog.messages if "tested with transformers up to 4.1" in each]
    assert len(said) == 1 and model.model.glimpse.trained
    cache = DynamicCache()
    model(torch.arange(1, 9)[None], **given_cache(cache), use_cache=True)
    assert cache.get_seq_length() == 8
