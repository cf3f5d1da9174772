"""Calls: whatever the stock class of a family answers to one, ours answers too.

With `prune=False` bit for bit, and with every visual token kept up to rounding; see
`stock_comparison.py`. Nothing here names a family, so that a new one is held to it.
"""

import copy
import inspect
from functools import partial

import pytest
import torch
from conftest import FAMILIES, TEXT_INPUTS, build_batch
from generation_checks import (
    assert_near,
)
from stock_comparison import (
    MODES,
    UNPRUNED,
    batch_of,
    build_pair,
    compare,
    pair_of,
)
from transformers import DynamicCache, StaticCache

from modeling_glimpseprune.stock import ENCODES_FIRST, TRANSFORMERS_5, cache_of, given_cache

PARTS = ("model", "backbone")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def batch(family):
    return batch_of(family)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def pair(shared_models, mode, batch):
    return pair_of(shared_models(5), mode, batch)


def labels_of(inputs: dict, count: int = 2) -> torch.Tensor:
    """Labels on the last tokens."""
    labels = inputs["input_ids"].clone()
    labels[:, :-count] = -100
    return labels


def embeddings_of(pair, inputs: dict) -> torch.Tensor:
    return pair.stock.get_input_embeddings()(inputs["input_ids"])


def without(inputs: dict, *names: str) -> dict:
    return {name: value for name, value in inputs.items() if name not in names}


# What comes back.

CALLS = {
    "nothing more": {},
    "no cache": {"use_cache": False},
    "a cache": {"use_cache": True},
    "tuples": {"return_dict": False},
    "tuples of all": {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
    },
    "hidden states": {"output_hidden_states": True},
    "hidden states of a layer": {"output_hidden_states": 2},
    "hidden states of the ends": {"output_hidden_states": [0, -1]},
    "no hidden states": {"output_hidden_states": 0},
    "hidden states of none": {"output_hidden_states": []},
    "attentions": {"output_attentions": True},
    "no attentions": {"output_attentions": False},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_a_call_returns_what_the_stock_models_does(
    shared_models, batch, mode, attention, part, name
):
    """A stock encoder that was asked for single layers may lack those that its projector reads."""
    if attention == "sdpa" and CALLS[name].get("output_attentions") and not TRANSFORMERS_5:
        pytest.skip("what stands for attentions that nobody kept differs from family to family")
    pair = pair_of(shared_models(5, attention), mode, batch)
    by_index = "hidden states of" in name
    compare(
        lambda model, settings: model(**pair.inputs, **CALLS[name], **settings),
        pair.parts[part],
        better=TypeError if by_index else (),
    )


OF_THE_HEAD = {
    "labels of nothing": {
        "labels": lambda inputs: torch.full_like(inputs["input_ids"], -100),
        "use_cache": lambda inputs: False,  # rows that end apart come without a cache
    },
    "every logit": {"logits_to_keep": lambda inputs: inputs["input_ids"].shape[1]},
    "more logits than there are": {"logits_to_keep": lambda inputs: 1000},
    "labels": {"labels": labels_of},
    "labels and a count": {
        "labels": labels_of,
        "num_items_in_batch": lambda inputs: torch.tensor(7),
    },
    "labels and tuples": {"labels": labels_of, "return_dict": lambda inputs: False},
    "the last logits": {"logits_to_keep": lambda inputs: 1},
    "three logits": {"logits_to_keep": lambda inputs: 3},
    "logits by index": {"logits_to_keep": lambda inputs: torch.tensor([-5, -2, -1])},
}


@pytest.mark.parametrize("name", OF_THE_HEAD)
@torch.no_grad()
def test_losses_and_logits(pair, name):
    more = {key: make(pair.inputs) for key, make in OF_THE_HEAD[name].items()}
    compare(lambda model, settings: model(**pair.inputs, **more, **settings), pair)


@torch.no_grad()
def test_labels_on_every_token(pair):
    labels = pair.inputs["input_ids"]
    compare(
        lambda model, settings: model(**pair.inputs, labels=labels, **settings),
        pair,
        refusal="labels on every token",
    )


FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "use_cache": False,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FIELDS)
@torch.no_grad()
def test_the_configuration_says_what_comes_back(
    shared_models, batch, mode, monkeypatch, part, name
):
    """Stock whole models take no tuples of their backbone, and ours neither.

    Some stock backbones take none of their text model; ours does.
    """
    pair = pair_of(shared_models(5, "eager"), mode, batch)
    for model in pair[:2]:
        if name != "use_cache":
            monkeypatch.setattr(model.config, name, FIELDS[name])
        if name != "return_dict":
            monkeypatch.setattr(model.config.get_text_config(), name, FIELDS[name])
    of_tuples = AttributeError if name == "return_dict" else ()
    compare(
        lambda model, settings: model(**pair.inputs, **settings),
        pair.parts[part],
        raises=of_tuples if part == "model" else (),
        better=of_tuples if part == "backbone" else (),
    )


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_text_alone(pair, family, part):
    text = build_batch([[7], [4]], family=family).inputs
    named = {"output_hidden_states": True}
    if "visual_keep_mask" in pair.settings:
        pair = pair._replace(settings={})
    compare(
        lambda model, settings: model(**text, **named, **settings),
        pair._replace(inputs=text).parts[part],
    )


# How it may be called.


def signature(method) -> list:
    """Names, kinds and defaults of arguments that have a name."""
    parameters = inspect.signature(method).parameters.values()
    named = [each for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
    return [(each.name, each.kind, each.default) for each in named]


METHODS = {
    "model": lambda model: model.forward,
    "backbone": lambda model: model.model.forward,
    "text model": lambda model: model.model.language_model.forward,
    "image features": lambda model: model.get_image_features,
    "image features of the backbone": lambda model: model.model.get_image_features,
    "video features": lambda model: getattr(model, "get_video_features", None),
    "video features of the backbone": lambda model: getattr(
        model.model, "get_video_features", None
    ),
    "prepared inputs": lambda model: model.prepare_inputs_for_generation,
    "generation": lambda model: model.generate,
}


@pytest.mark.parametrize("name", METHODS)
def test_signatures_are_the_stock_ones(shared_models, name):
    """Stock names in the stock order; what is ours stands behind, by name alone."""
    stock, pruned = (METHODS[name](model) for model in shared_models(5))
    if stock is None:
        assert pruned is None
        return
    expected, found = signature(stock), signature(pruned)
    if name == "prepared inputs":
        expected, found = expected[:1], found[:1]  # what else it takes comes by keyword
    assert found[: len(expected)] == expected
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in found[len(expected) :])


@torch.no_grad()
def test_arguments_come_by_position(pair):
    def question(model, settings):
        names = [name for name, *_ in signature(model.forward)][:5]
        rest = without(pair.inputs, *names)
        return model(*(pair.inputs.get(name) for name in names), **rest, **settings)

    for each in pair.parts.values():
        compare(question, each)


@torch.no_grad()
def test_the_text_model_is_called_as_the_stock_one(shared_models, batch):
    pair = pair_of(shared_models(5), UNPRUNED, batch)
    states, mask = embeddings_of(pair, batch.inputs), batch.inputs["attention_mask"]
    ids = batch.inputs["input_ids"]

    def ask(question):
        compare(lambda model, settings: question(model.model.language_model), pair)

    ask(lambda model: model(ids, mask))
    ask(lambda model: model(None, mask, None, None, states))
    ask(lambda model: model(inputs_embeds=states, output_hidden_states=True, return_dict=False))
    ask(lambda model: cache_of(model(ids, mask, use_cache=True)))
    ask(lambda model: cache_of(model(ids, mask, use_cache=False)))
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": states}):
        compare(
            lambda model, settings, wrong=wrong: model.model.language_model(**wrong),
            pair,
            raises=(ValueError, TypeError),
        )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", ["embeddings", "both"])
@torch.no_grad()
def test_ids_or_embeddings(pair, part, way):
    inputs = pair.inputs | {"inputs_embeds": embeddings_of(pair, pair.inputs)}
    if way == "embeddings":
        inputs = without(inputs, "input_ids")

    def question(model, settings):
        model.base_model.rope_deltas = None  # of a call before, which embeddings alone would use
        return model(**inputs, **settings)

    compare(question, pair.parts[part], raises=ValueError if way == "both" else ())


@pytest.mark.parametrize("part", PARTS)
def test_neither_ids_nor_embeddings(pair, part):
    stock, pruned = pair.parts[part][:2]
    inputs = without(pair.inputs, "input_ids")
    with pytest.raises((ValueError, TypeError)):
        stock(**inputs)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        pruned(**inputs, **pair.settings)


WRONG = {
    "an image too few": lambda inputs: inputs | {"input_ids": inputs["input_ids"][:, -5:]},
    "no such token": lambda inputs: inputs | {"input_ids": inputs["input_ids"] + 10_000},
    "ids of numbers": lambda inputs: inputs | {"input_ids": inputs["input_ids"].float()},
    "labels of another length": lambda inputs: inputs | {"labels": labels_of(inputs)[:, :-1]},
}


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_what_the_stock_model_refuses(pair, name):
    inputs = WRONG[name](pair.inputs)
    compare(lambda model, settings: model(**inputs, **settings), pair, raises=(Exception,))


def four_dimensional(inputs: dict) -> torch.Tensor:
    """`(batch, 1, length, length)` bool: what each token may see."""
    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal & real[:, None, None] | torch.eye(length, dtype=torch.bool)


MASKS = {
    "bool": (lambda inputs: inputs["attention_mask"].bool(), None),
    "float": (lambda inputs: inputs["attention_mask"].float(), None),
    "ones": (lambda inputs: torch.ones_like(inputs["attention_mask"]), None),
    "short": (lambda inputs: inputs["attention_mask"][:, :3], "short mask"),
    "4-D": (four_dimensional, "4-D mask"),
}


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_kinds_of_masks(pair, name):
    make, refusal = MASKS[name]
    positions = torch.arange(pair.inputs["input_ids"].shape[1]).expand(len(pair.real), -1)
    inputs = pair.inputs | {"attention_mask": make(pair.inputs)}
    if name == "4-D":
        inputs["position_ids"] = positions
    compare(lambda model, settings: model(**inputs, **settings), pair, refusal, raises=IndexError)


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_no_mask_and_no_positions(shared_models, family, mode, part):
    batch = batch_of(family, rows=1)
    pair = pair_of(shared_models(5), mode, batch)
    inputs = without(pair.inputs, "attention_mask")
    compare(lambda model, settings: model(**inputs, **settings), pair.parts[part])


@torch.no_grad()
def test_positions_are_the_callers(pair):
    positions = pair.inputs["attention_mask"].cumsum(-1) + 2
    compare(
        lambda model, settings: model(**pair.inputs, position_ids=positions, **settings).logits,
        pair,
    )


@torch.no_grad()
def test_right_padding(pair):
    text = [name for name in pair.inputs if name in TEXT_INPUTS]
    padding = (~pair.real).sum(1).tolist()
    inputs = dict(pair.inputs)
    for name in text:
        rows = zip(inputs[name], padding, strict=True)
        inputs[name] = torch.stack([row.roll(-count) for row, count in rows])
    compare(lambda model, settings: model(**inputs, **settings), pair, refusal="right padding")


@torch.no_grad()
def test_rows_of_a_batch_are_rows_alone(pair, batch):
    """Sums over padded rows come in another order: near, also without pruning."""
    together = pair.pruned(**batch.inputs, **pair.settings).logits
    counts = batch.visual_counts
    for i, row in enumerate(batch.rows):
        settings = pair.settings
        if "visual_keep_mask" in settings:
            settings = {"visual_keep_mask": torch.ones(counts[i], dtype=torch.bool)}
        alone = pair.pruned(**row, **settings).logits[0]
        found = together[i, pair.real[i]]
        assert_near(found, alone, 1e-5)


@torch.no_grad()
def test_rows_of_several_sequences(shared_models, family, mode):
    """Positions start again where a sequence does."""
    batch = batch_of(family, rows=1)
    pair = pair_of(shared_models(5), mode, batch)
    inputs = without(batch.inputs, "attention_mask")
    length = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(length - 3), torch.arange(3)])[None]
    if pair.pruned.model.positions_from_ids:
        positions = positions.expand(4, 1, -1)
    compare(
        lambda model, settings: model(**inputs, position_ids=positions, **settings).logits,
        pair,
        "packed rows",
    )


# Encoded visuals.


def visuals_of(inputs: dict) -> dict[str, dict]:
    """For each kind what its encoder takes."""
    given = {"image": {}, "video": {}}
    for name, value in inputs.items():
        if name not in TEXT_INPUTS:
            given["video" if "video" in name else "image"][name] = value
    return {kind: values for kind, values in given.items() if values}


ASKED_OF_ENCODERS = {"nothing more": {}}
if TRANSFORMERS_5:
    ASKED_OF_ENCODERS["tuples"] = {"return_dict": False}
    ASKED_OF_ENCODERS["layers"] = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ASKED_OF_ENCODERS)
@torch.no_grad()
def test_encoders_return_what_the_stock_ones_do(shared_models, batch, part, name):
    pair = pair_of(shared_models(5, "eager"), UNPRUNED, batch).parts[part]
    for kind, inputs in visuals_of(batch.inputs).items():

        def question(model, settings, method=f"get_{kind}_features", inputs=inputs):
            return getattr(model, method)(**inputs, **ASKED_OF_ENCODERS[name])

        compare(question, pair)


def encoded_by(model, inputs: dict, **more) -> dict:
    """Of the class that the model's encoders return."""
    return {
        kind: getattr(model, f"get_{kind}_features")(**values, **more)
        for kind, values in visuals_of(inputs).items()
    }


@pytest.mark.skipif(not ENCODES_FIRST, reason="visuals come as pixels alone")
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_encoded_visuals_stand_for_pixels(pair, part):
    inputs = {name: pair.inputs[name] for name in pair.inputs if "pixel" not in name}

    def question(model, settings, encoder, inputs=inputs):
        encoded = encoded_by(encoder or model, pair.inputs)
        return model(**inputs, mm_encoder_outputs=encoded, **settings)

    pair = pair.parts[part]
    compare(partial(question, encoder=None), pair)
    compare(partial(question, encoder=pair.stock), pair, "foreign encodings")
    compare(partial(question, encoder=None, inputs=pair.inputs), pair, raises=ValueError)


@pytest.mark.skipif(not ENCODES_FIRST, reason="visuals come as pixels alone")
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_from_encoded_visuals(pair, beams):
    inputs = {name: pair.inputs[name] for name in pair.inputs if "pixel" not in name}
    wishes = {"max_new_tokens": 2, "do_sample": False, "num_beams": beams}

    def question(model, settings, encoder):
        encoded = encoded_by(encoder or model, pair.inputs)
        return model.generate(**inputs, mm_encoder_outputs=encoded, **wishes, **settings)

    compare(partial(question, encoder=None), pair)
    compare(partial(question, encoder=pair.stock), pair, "foreign encodings")


# Gradients.


def gradients_of(model, inputs: dict, settings: dict) -> dict[str, torch.Tensor]:
    """Of the loss on the last tokens, under the stock names."""
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=labels_of(inputs), use_cache=False, **settings).loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


CHECKPOINTING = {
    "none": None,
    "by default": {},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_gradients(build_models, batch, mode, name):
    """Of training, with every setting of checkpointing; reentrant checkpoints need an input that
    wants a gradient."""
    pair = pair_of(build_models(5), mode, batch)
    for model in pair[:2]:
        model.train()
        if CHECKPOINTING[name] is not None:
            model.gradient_checkpointing_enable(**CHECKPOINTING[name])
            assert model.is_gradient_checkpointing
        if name == "reentrant":
            model.enable_input_require_grads()
    compare(lambda model, settings: gradients_of(model, batch.inputs, settings), pair)


def test_training_without_labels(build_models, batch, mode):
    pair = pair_of(build_models(5), mode, batch)

    def question(model, settings):
        return model.train()(**batch.inputs, **settings).logits

    compare(question, pair, "no boundary")


def test_dropout_draws_the_same(family, batch):
    def change(fields):
        fields["text_config"]["attention_dropout"] = 0.5

    pair = pair_of(build_pair(family, change=change), UNPRUNED, batch)

    def question(model, settings):
        torch.manual_seed(3)
        return gradients_of(model.train(), batch.inputs, settings)

    compare(question, pair)


def test_layers_keep_their_gradients(shared_models, batch, mode):
    """Those of attentions up to the prune layer; above it weights are laid out anew."""
    pair = pair_of(shared_models(5, "eager"), mode, batch)

    def question(model, settings):
        output = model(
            **batch.inputs, output_hidden_states=True, output_attentions=True, **settings
        )
        layers = [*output.hidden_states, output.attentions[0]]
        for states in layers:
            states.retain_grad()
        output.logits[:, -1].square().sum().backward()
        model.zero_grad()
        return [states.grad for states in layers]

    compare(question, pair)


# Caches.


@pytest.fixture
def even_pair(shared_models, family, mode):
    """Rows of one length, which go on without a mask."""
    batch = build_batch([[4, (3, 3), 3], [2, (3, 3), 5]], family=family)
    return pair_of(shared_models(5), mode, batch)


def first_cache(pair, model, settings):
    return cache_of(model(**pair.inputs, use_cache=True, **settings))


def run_on(model, count: int, cache):
    """Run further tokens of text over a cache."""
    ids = torch.arange(20, 20 + 2 * count).view(2, count)
    past = cache.get_seq_length()
    held = len(cache.layers[0].keys)
    place = {} if TRANSFORMERS_5 else {"cache_position": torch.arange(past, past + count)}
    return model(
        input_ids=ids.repeat_interleave(held // 2, dim=0),
        use_cache=True,
        **given_cache(cache),
        **place,
    )


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_a_cache_goes_on(even_pair, tokens):
    def question(model, settings):
        cache, logits = first_cache(even_pair, model, settings), []
        for _ in range(2):
            output = run_on(model, tokens, cache)
            logits.append(output.logits)
            cache = cache_of(output)
        return logits, cache

    compare(question, even_pair)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@torch.no_grad()
def test_an_empty_cache_of_the_callers(pair, make):
    def question(model, settings):
        sizes = {"max_cache_len": 80} if make is StaticCache else {}
        cache = make(config=model.config.get_text_config(), **sizes)
        output = model(**pair.inputs, use_cache=True, **given_cache(cache), **settings)
        return output.logits, int(cache.get_seq_length())

    compare(question, pair, "made static cache" if make is StaticCache else None)


CHANGES = {
    "cropped": lambda cache: cache.crop(-2),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_cache_is_changed(even_pair, name):
    def question(model, settings):
        cache = first_cache(even_pair, model, settings)
        cache = cache_of(run_on(model, 4, cache))
        cache = CHANGES[name](cache) or cache
        length = cache.get_seq_length()
        return run_on(model, 1, cache).logits, length

    compare(question, even_pair)


@torch.no_grad()
def test_a_repeated_cache(even_pair):
    if even_pair.pruned.model.positions_from_ids and not TRANSFORMERS_5:
        pytest.skip("the stock model repeats no positions there")

    def question(model, settings):
        cache = first_cache(even_pair, model, settings)
        cache.batch_repeat_interleave(2)
        return run_on(model, 2, cache).logits

    compare(question, even_pair)
