"""What is assumed of transformers, each assumption a test of its own against the installed release.

When a release renames or drops something that the models rely on, a test here fails first, by name,
and its message says what relies on it. Everything that differs between releases is in
`modeling_glimpseprune/stock.py`.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import FAMILIES, IMAGE_TOKEN, VIDEO_TOKEN, build_batch, build_models
from llava_prompts import PINPOINTS, SIDE, TILE
from PIL import Image
from reference import positions
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlavaNextProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    cache_utils,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.auto import tokenization_auto
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)
from transformers.utils.hub import get_checkpoint_shard_files

from modeling_glimpseprune.decoder_layers import query_logits, run_attention, run_mlp
from modeling_glimpseprune.encoder_subset import EncoderSubset
from modeling_glimpseprune.pruned_cache import PrunedLayer
from modeling_glimpseprune.stock import (
    CACHE_NAME,
    CACHE_NAMES,
    ENCODES_FIRST,
    QUANTIZED_LAYER,
    TRANSFORMERS_5,
    cache_of,
    causal_mask,
    clip_transformer,
    counts_positions,
    encoder_fields,
    file_of,
    given_cache,
    lacks_weights,
    outputs_with_cache,
    token_types,
)
from modeling_glimpseprune.visual_features import token_geometry

CODE = Path(__file__).resolve().parents[1] / "modeling_glimpseprune"
DECODERS = {
    "qwen2_5_vl": {"family": "qwen2_5_vl"},
    "qwen3_vl": {"family": "qwen3_vl"},
    "llama": {"family": "llava"},
    "mistral": {"family": "llava", "text_model_type": "mistral"},
}
PROMPT = [[3, (2, 3), 4], [2, (2, 2), 3]]


# How an assumption is stated.


def installed() -> str:
    return f"transformers {transformers.__version__}"


def assert_takes(function: Callable, names: tuple[str, ...], why: str) -> None:
    """Fail unless a function shows arguments of these names."""
    shown = list(inspect.signature(function).parameters)
    missing = [name for name in names if name not in shown]
    assert not missing, (
        f"{installed()}: {function.__qualname__} does not take {', '.join(missing)} (it takes "
        f"{', '.join(shown)}), but {why}"
    )


def assert_begins_with(function: Callable, names: tuple[str, ...], why: str) -> None:
    """Fail unless a function's first arguments are these, in this order."""
    shown = [name for name in inspect.signature(function).parameters if name != "self"]
    assert tuple(shown[: len(names)]) == names, (
        f"{installed()}: the first arguments of {function.__qualname__} are "
        f"{', '.join(shown[: len(names)])} and not {', '.join(names)}, but {why}"
    )


def assert_takes_any(function: Callable, why: str) -> None:
    """Fail unless a function takes keyword arguments that it does not name."""
    kinds = [each.kind for each in inspect.signature(function).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds, (
        f"{installed()}: {function.__qualname__} takes no keyword arguments but those it names, "
        f"but {why}"
    )


def assert_has(thing: object, names: tuple[str, ...], why: str) -> None:
    """Fail unless an object has attributes of these names."""
    missing = [name for name in names if not hasattr(thing, name)]
    kind = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    assert not missing, f"{installed()}: {kind} has no {', '.join(missing)}, but {why}"


def test_an_argument_that_was_renamed_is_named():
    def forward(self, states, kv_cache=None): ...

    with pytest.raises(AssertionError) as failure:
        assert_takes(forward, ("states", "cache"), "the split forward hands the cache over")
    assert f"{installed()}: " in str(failure.value)
    assert "forward does not take cache (it takes self, states, kv_cache), " in str(failure.value)
    assert "but the split forward hands the cache over" in str(failure.value)


def test_arguments_in_another_order_are_named():
    def forward(self, mask, states): ...

    with pytest.raises(AssertionError, match="are mask, states and not states, mask, but we call"):
        assert_begins_with(forward, ("states", "mask"), "we call it by position")


def test_keywords_that_are_not_passed_on_are_named():
    def forward(self, states): ...

    with pytest.raises(AssertionError, match="forward takes no keyword arguments but those it nam"):
        assert_takes_any(forward, "use_cache is handed to it")


def test_an_attribute_that_is_gone_is_named():
    with pytest.raises(AssertionError, match="DynamicLayer has no slots, but we count them"):
        assert_has(DynamicLayer(), ("keys", "slots"), "we count them")


def test_a_broken_assumption_fails_by_name(monkeypatch):
    """One of the tests below, run while the stock library has another signature."""

    def get_rope_index(self, ids, image_grids): ...

    monkeypatch.setattr(Qwen2_5_VLModel, "get_rope_index", get_rope_index)
    with pytest.raises(AssertionError, match="get_rope_index does not take input_ids, image_grid_"):
        test_qwen_derives_positions_from_ids_and_grids()


def record_calls(monkeypatch, model: PreTrainedModel, *names: str) -> list["Call"]:
    """Note the calls of a model's methods, in order."""
    calls = []

    def recorded(name: str, stock: Callable) -> Callable:
        @functools.wraps(stock)
        def method(*args, **kwargs):
            call = Call(name, tuple(map(as_given, args)), dict(kwargs), [])
            calls.append(call)
            call.returned.append(stock(*args, **kwargs))
            return call.returned[0]

        return method

    for name in names:
        monkeypatch.setitem(model.__dict__, name, recorded(name, getattr(model, name)))
    return calls


def as_given(argument: object) -> object:
    """A dictionary as it is now, for `generate` goes on changing it."""
    return dict(argument) if isinstance(argument, dict) else argument


class Call(NamedTuple):
    """One call of a method; `returned` holds one value once it is over."""

    name: str
    args: tuple
    kwargs: dict
    returned: list


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(params=list(DECODERS))
def decoder(request):
    """The stock text model of each kind."""
    from conftest import build_models

    return build_models(31, "eager", **DECODERS[request.param]).stock.model.language_model


# Our code keeps to the one file.


@pytest.mark.parametrize("file", sorted(CODE.glob("*.py")), ids=lambda file: file.stem)
def test_one_file_knows_releases(file):
    """No other file asks for a version or names the cache as one release does; see its table."""
    if file.stem == "stock":
        return
    found = re.findall(r"__version__|TRANSFORMERS_5|past_key_values|importlib", file.read_text())
    assert not found, f"{file.name} has {found}: what differs between releases is for stock.py"


# What `generate` calls, and with what.


GENERATION_STEPS = (
    "_prepare_model_inputs",
    "_expand_inputs_for_generation",
    "_prepare_cache_for_generation",
    "prepare_inputs_for_generation",
    "forward",
)


@pytest.fixture
def generation(shared_models, build_batch, monkeypatch):
    """Calls of a stock generation of three tokens for two prompts with images, and its output."""
    stock, batch = shared_models(31).stock, build_batch(PROMPT)
    names = GENERATION_STEPS
    if TRANSFORMERS_5:
        names += ("_prepare_position_ids_for_generation",)
    calls = record_calls(monkeypatch, stock, *names)
    output = stock.generate(
        **batch.inputs,
        **given_cache(DynamicCache()),
        num_beams=2,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
    )
    return calls, output


def first_call(calls: list[Call], name: str) -> Call:
    found = [call for call in calls if call.name == name]
    assert found, f"{installed()}: generate does not call {name}, which our models wrap"
    return found[0]


def test_generate_takes_the_cache_under_one_of_two_names(family):
    stock_class = FAMILIES[family].stock_class
    for method in (stock_class.prepare_inputs_for_generation, stock_class.forward):
        assert_takes(method, (CACHE_NAME,), f"the cache is handed to it as {CACHE_NAME}")
        shown = [name for name in CACHE_NAMES if name in inspect.signature(method).parameters]
        assert shown == [CACHE_NAME], (
            f"{installed()}: {method.__qualname__} names the cache {' and '.join(shown)}, so "
            "stock.CACHE_NAME cannot be told from the signature"
        )


def test_generate_goes_step_by_step(generation):
    calls, _ = generation
    order = list(dict.fromkeys(call.name for call in calls if call.name in GENERATION_STEPS))
    assert order == list(GENERATION_STEPS), (
        f"{installed()}: generate calls {order}, but visuals that the cache holds are left out "
        "before the inputs are expanded, and the prompt's end, which is noted there, is forgotten "
        "where a cache is prepared"
    )


def test_generate_prepares_model_inputs_with_the_cache_and_visuals(generation):
    call = first_call(generation[0], "_prepare_model_inputs")
    why = "_prepare_model_inputs of our models takes (inputs, bos_token_id, model_kwargs)"
    assert_begins_with(
        GenerationMixin._prepare_model_inputs, ("inputs", "bos_token_id", "model_kwargs"), why
    )
    given = [*call.args, *call.kwargs.values()]
    assert len(given) == 3, f"{installed()}: called otherwise, but {why}"
    inputs, name, _ = call.returned[0]
    assert name == "input_ids" and inputs.shape[0] == 2
    for expected in (CACHE_NAME, "pixel_values", "attention_mask"):
        assert expected in given[2], (
            f"{installed()}: {expected} is not among the model inputs when they are prepared, but "
            "visuals of earlier turns are left out there"
        )


def test_generate_expands_inputs_by_keyword(generation):
    call = first_call(generation[0], "_expand_inputs_for_generation")
    expected = ("expand_size", "is_encoder_decoder", "input_ids")
    why = "the keep mask and the images of a row are repeated there for its beams"
    assert_begins_with(GenerationMixin._expand_inputs_for_generation, expected, why)
    assert not call.args and set(expected) <= set(call.kwargs), (
        f"{installed()}: _expand_inputs_for_generation is called with {list(call.kwargs)}, "
        f"but {why}"
    )
    assert call.kwargs["expand_size"] == 2 and call.kwargs["input_ids"].shape[0] == 2


def test_visuals_are_encoded_before_inputs_are_expanded(generation):
    """Earlier releases expand pixels and encode afterwards: LLaVA's rows are our own there."""
    arguments = first_call(generation[0], "_expand_inputs_for_generation").kwargs
    encoded = "image" in (arguments.get("mm_encoder_outputs") or {})
    assert encoded == ENCODES_FIRST and (arguments.get("pixel_values") is None) == encoded, (
        f"{installed()}: whether images are encoded at this point is {encoded}, but beams repeat "
        f"{'encoded images' if ENCODES_FIRST else 'pixels'}"
    )


def test_generate_prepares_the_cache_with_its_settings(generation):
    call = first_call(generation[0], "_prepare_cache_for_generation")
    why = "static caches and prefill in chunks are refused there"
    assert_begins_with(
        GenerationMixin._prepare_cache_for_generation, ("generation_config", "model_kwargs"), why
    )
    given = [*call.args, *call.kwargs.values()]
    assert isinstance(given[0], GenerationConfig) and CACHE_NAME in given[1], (
        f"{installed()}: _prepare_cache_for_generation is called with something else, but {why}"
    )


@pytest.mark.parametrize("name", ["prefill_chunk_size", "cache_implementation", "use_cache"])
def test_generation_settings(name):
    assert_has(GenerationConfig(), (name,), "it decides whether a prompt can be pruned")


def test_static_caches_are_told_by_name():
    names = set(ALL_STATIC_CACHE_IMPLEMENTATIONS)
    assert "static" in names and not names & {"dynamic", "quantized", "offloaded"}, (
        f"{installed()}: ALL_STATIC_CACHE_IMPLEMENTATIONS is {sorted(names)}, but exactly the "
        "static caches are refused by it"
    )


def test_who_counts_positions(generation):
    """Where `generate` does, later turns get plain ones from `_prepare_position_ids...`."""
    assert counts_positions(GenerationMixin) == TRANSFORMERS_5, (
        f"{installed()}: _prepare_position_ids_for_generation comes or goes, but one of the "
        "backbone and generate is told to count positions on from the cache"
    )
    if not TRANSFORMERS_5:
        return
    why = "our models choose there between plain positions and those of the visuals"
    assert_begins_with(
        GenerationMixin._prepare_position_ids_for_generation,
        ("inputs_tensor", "model_kwargs"),
        why,
    )
    call = first_call(generation[0], "_prepare_position_ids_for_generation")
    given = [*call.args, *call.kwargs.values()]
    assert len(given) == 2 and CACHE_NAME in given[1], f"{installed()}: called otherwise, but {why}"


def test_steps_are_prepared_with_ids_first_and_the_cache_by_keyword(generation):
    stock_method = GenerationMixin.prepare_inputs_for_generation
    why = "our prepare_inputs_for_generation takes input_ids by position and the rest by keyword"
    assert_begins_with(stock_method, ("input_ids",), why)
    assert_takes(stock_method, ("inputs_embeds", "attention_mask"), why)
    call = first_call(generation[0], "prepare_inputs_for_generation")
    assert call.args[0].ndim == 2 and isinstance(call.kwargs.get(CACHE_NAME), Cache), (
        f"{installed()}: prepare_inputs_for_generation is called otherwise, but {why}"
    )


def test_a_prefill_asks_for_the_last_logits(generation):
    call = first_call(generation[0], "forward")
    assert not call.args and call.kwargs.get("logits_to_keep") == 1, (
        f"{installed()}: generate's prefill is not called with logits_to_keep=1, by which our "
        "forward knows that hidden states need not be laid out again"
    )
    assert isinstance(call.kwargs.get(CACHE_NAME), Cache)


def test_a_step_runs_new_tokens_over_the_cache_that_forward_returned(generation):
    calls, output = generation
    steps = [call for call in calls if call.name == "forward"]
    returned = cache_of(steps[0].returned[0])
    assert returned is not None and steps[1].kwargs[CACHE_NAME] is returned, (
        f"{installed()}: the cache that forward returns is not the one of the next step, but the "
        "record of the glimpse travels on it"
    )
    assert steps[1].kwargs["input_ids"].shape[1] == 1
    assert cache_of(output) is returned


def test_an_assistant_asks_for_as_many_logits_as_it_guessed(
    shared_models, build_batch, monkeypatch
):
    stock, batch = shared_models(31).stock, build_batch(PROMPT[:1])
    calls = record_calls(monkeypatch, stock, "forward")
    stock.generate(**batch.inputs, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
    length = batch.inputs["input_ids"].shape[1]
    for call in calls:
        ids, kept = call.kwargs["input_ids"], call.kwargs["logits_to_keep"]
        prompt_length = ids.shape[1] - kept + 1
        assert ids.shape[1] < length or prompt_length == length, (
            f"{installed()}: assisted decoding keeps {kept} logits of {ids.shape[1]} tokens, but "
            "the prompt's end is told from their number"
        )


@pytest.mark.skipif(not ENCODES_FIRST, reason="this release repeats pixels")

# Outputs.


def test_outputs_carry_the_cache_under_the_arguments_name():
    names = [field.name for field in fields(BaseModelOutputWithPast)]
    expected = ["last_hidden_state", CACHE_NAME, "hidden_states", "attentions"]
    assert names == expected, (
        f"{installed()}: BaseModelOutputWithPast has the fields {names}, but the split forward "
        f"returns {expected}"
    )
    cache = DynamicCache()
    output = outputs_with_cache(torch.zeros(1, 1, 1), cache, attentions=())
    assert cache_of(output) is cache and output[CACHE_NAME] is cache and output[1] is cache
    assert cache_of(outputs_with_cache(torch.zeros(1, 1, 1), None)) is None


def test_encoders_return_what_visual_features_extend():
    names = [field.name for field in fields(BaseModelOutputWithPooling)]
    assert names[:2] == ["last_hidden_state", "pooler_output"], (
        f"{installed()}: BaseModelOutputWithPooling has the fields {names}, but VisualFeatures "
        "puts embeddings into pooler_output"
    )


@torch.no_grad()
def test_model_outputs_may_be_changed(shared_models, build_batch):
    """Attentions are laid out over the prompt after the stock forward returned them."""
    decoder = shared_models(31).stock.model.language_model
    outputs = decoder(input_ids=torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    assert len(outputs.hidden_states) == len(decoder.layers) + 1
    outputs.attentions = (torch.zeros(1),)
    assert outputs.attentions[0] == 0


# From the model through the backbone to the text model.


def test_the_parts_of_a_model(shared_models):
    stock = shared_models(31).stock
    assert_has(stock, ("model", "lm_head", "loss_function"), "it is built of them")
    assert_has(stock.model, ("language_model", "get_placeholder_mask"), "the backbone is ours")


@torch.no_grad()
def test_unknown_keywords_travel_to_the_text_model(shared_models, build_batch):
    """`prune_request` and the arguments of `PruningArguments` do, through the stock forwards."""
    stock, batch = shared_models(31).stock, build_batch(PROMPT)
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs, positional=args)
        kwargs.pop("prune_request")
        return args, kwargs

    hook = stock.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    cache, request = DynamicCache(), object()
    with hook:
        stock(**batch.inputs, **given_cache(cache), use_cache=True, prune_request=request)
    assert seen.get("prune_request") is request, (
        f"{installed()}: keyword arguments that the stock forwards do not know do not reach the "
        "text model, but the request to prune travels so"
    )
    assert seen[CACHE_NAME] is cache and not seen["positional"]
    assert seen["inputs_embeds"].ndim == 3 and seen["attention_mask"].shape == (2, len_of(batch))


def len_of(batch) -> int:
    return batch.inputs["input_ids"].shape[1]


def test_positional_arguments_of_a_text_model(decoder):
    names = ("input_ids", "attention_mask", "position_ids", CACHE_NAME, "inputs_embeds")
    assert_begins_with(type(decoder).forward, names, "ours takes them in this order")
    assert_takes(type(decoder).forward, ("use_cache",), "ours hands it on")
    assert_takes_any(type(decoder).forward, "ours hands other arguments on")


def test_the_parts_of_a_text_model(decoder):
    assert_has(decoder, ("embed_tokens", "layers", "norm", "rotary_emb"), "the split forward runs")
    names = ("use_cache", "output_hidden_states", "output_attentions", "_attn_implementation")
    assert_has(decoder.config, names, "it is the default of a call")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    assert_has(decoder.config, names, "the glimpse is built by it")


def test_sliding_layers_are_told_by_the_configuration(decoder):
    """Those of Qwen2.5-VL, by `layer_types`; other decoders have none."""
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    assert kinds == {"full_attention"}, (
        f"{installed()}: layer_types of a decoder without sliding windows is {kinds}, but "
        "sliding_attention among them is refused"
    )


# Decoder layers.


def test_arguments_of_a_decoder_layer(decoder):
    layer = decoder.layers[0]
    names = ("attention_mask", "position_embeddings", "use_cache", CACHE_NAME)
    assert_begins_with(type(layer).forward, ("hidden_states",), "states come by position")
    assert_takes(type(layer).forward, names, "run_layer calls it with them")


def test_arguments_of_attention(decoder):
    attention = decoder.layers[0].self_attn
    names = ("hidden_states", "attention_mask", "position_embeddings", CACHE_NAME)
    assert_takes(type(attention).forward, names, "run_attention calls it with them")
    assert_takes_any(type(attention).forward, "use_cache is handed to it")


def test_the_parts_of_a_decoder_layer(decoder):
    layer = decoder.layers[1]
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    assert_has(layer, parts, "its halves run by themselves")
    assert_has(layer, ("gradient_checkpointing",), "it is switched off while activations are kept")
    assert_has(layer.self_attn, ("q_proj", "head_dim", "scaling", "layer_idx"), "logits need them")
    assert layer.self_attn.layer_idx == 1


def test_checkpointing_goes_through_a_function_of_the_layer(decoder):
    enable = "activation_checkpointing_enable"  # transformers 5.24 deprecates the other name
    if not hasattr(decoder, enable):
        enable = "gradient_checkpointing_enable"
    getattr(decoder, enable)({"use_reentrant": False})
    layer = decoder.layers[0]
    assert layer.gradient_checkpointing is True
    assert_has(layer, ("_gradient_checkpointing_func",), "our layers are checkpointed with it")
    states = torch.ones(2, requires_grad=True)
    assert layer._gradient_checkpointing_func(lambda given: given * 2, states).tolist() == [2, 2]


class Calls:
    """A cache that notes what a layer hands it."""

    def __init__(self):
        self.updates = []

    def update(self, keys, values, *args, **kwargs):
        self.updates.append((keys, values, args, kwargs))
        return keys, values


def run_inputs(decoder, length: int = 5) -> tuple[torch.Tensor, tuple]:
    """Random states, and rotary embeddings of a text's positions."""
    states = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))
    place = torch.arange(length).expand(2, -1)
    if "Qwen" in type(decoder).__name__:
        place = place.expand(3, -1, -1)
    return states, decoder.rotary_emb(states, place)


@torch.no_grad()
def test_rotary_embeddings(decoder):
    """A cosine and a sine of each token; transformers 4 keeps Qwen's three axes apart."""
    _, rotary = run_inputs(decoder)
    head_dim = decoder.layers[0].self_attn.head_dim
    shapes = {tuple(part.shape) for part in rotary}
    assert len(rotary) == 2 and shapes <= {(2, 5, head_dim), (3, 2, 5, head_dim)}, (
        f"{installed()}: rotary_emb returns {shapes}, but one token's part is taken out of "
        "(batch, length, head_dim), or of three of them"
    )


@torch.no_grad()
def test_attention_updates_the_cache_and_returns_weights(decoder):
    layer, cache = decoder.layers[1], Calls()
    states, rotary = run_inputs(decoder)
    returned = layer.self_attn(
        hidden_states=states, attention_mask=None, position_embeddings=rotary, use_cache=True,
        **given_cache(cache),
    )  # fmt: skip
    assert len(cache.updates) == 1, f"{installed()}: attention does not call the cache's update"
    keys, values, args, _ = cache.updates[0]
    shape = (2, 2, 5, layer.self_attn.head_dim)
    assert keys.shape == values.shape == shape and args[0] == 1, (
        f"{installed()}: attention hands keys of {tuple(keys.shape)} and {args} to the cache, but "
        f"layers hold {shape} and are told by their number"
    )
    assert returned[0].shape == states.shape and returned[1].shape == (2, 4, 5, 5)


@torch.no_grad()
def test_a_layer_is_its_two_halves(decoder):
    layer = decoder.layers[0]
    states, rotary = run_inputs(decoder)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    whole = layer(states, attention_mask=mask, position_embeddings=rotary, use_cache=True)
    whole = whole[0] if isinstance(whole, tuple) else whole
    halves = run_mlp(layer, run_attention(layer, states, mask, rotary, Calls()))
    torch.testing.assert_close(
        halves, whole, msg=f"{installed()}: a decoder layer is more than its two halves, between "
        "which visual tokens are dropped"
    )  # fmt: skip


@torch.no_grad()
def test_query_logits_are_those_of_attention(decoder):
    """Softmax of our products with the cached keys gives the stock weights of the last token."""
    layer, cache = decoder.layers[0], DynamicCache()
    states, rotary = run_inputs(decoder)
    weights = layer.self_attn(
        hidden_states=layer.input_layernorm(states), attention_mask=None,
        position_embeddings=rotary, **given_cache(cache),
    )[1]  # fmt: skip
    last = tuple((part[0] if part.ndim == 4 else part)[:, -1:] for part in rotary)
    logits = query_logits(layer, states[:, -1:], cache.layers[0].keys, last)
    torch.testing.assert_close(
        logits.softmax(-1), weights[:, :, -1], msg=f"{installed()}: attention is computed in "
        "another way than from q_proj, rotary embedding and scaling, which the glimpse reads"
    )  # fmt: skip


def test_arguments_of_the_rotary_embedding():
    assert_begins_with(apply_rotary_pos_emb, ("q", "k", "cos", "sin"), "they come by position")


# Masks.


def test_arguments_of_the_mask():
    names = ["config", "attention_mask", CACHE_NAME]
    names += ["inputs_embeds"] if TRANSFORMERS_5 else ["input_embeds", "cache_position"]
    assert_takes(create_causal_mask, tuple(names), "causal_mask calls it with them")


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_covers_the_slots_of_the_first_layer(decoder, padded):
    """Four slots after three dropped tokens, and two new tokens."""
    layer = PrunedLayer()
    layer.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    layer.dropped = 3
    cache = DynamicCache()
    cache.layers = [layer]
    given = torch.ones(1, 9, dtype=torch.bool)
    given[:, 3] = not padded  # the first slot
    mask = causal_mask(decoder.config, torch.zeros(1, 2, 32), given, cache, 7)
    expected = torch.ones(2, 6, dtype=torch.bool).tril(4)
    expected[:, 0] &= not padded
    assert torch.equal(mask[0, 0] == 0, expected), (
        f"{installed()}: the mask over a pruned cache shows {(mask[0, 0] == 0).int().tolist()}, "
        "but slots stand behind as many columns as tokens were dropped"
    )


# Caches.


def test_what_a_cache_layer_can(decoder):
    names = ("update", "crop", "reset", "reorder_cache", "batch_repeat_interleave", "prefetch")
    names += ("batch_select_indices", "get_seq_length", "get_mask_sizes", "is_initialized")
    assert_has(DynamicLayer(), names, "a pruned layer extends it")


def test_a_layer_holds_keys_and_values_along_the_third_axis():
    layer, part = DynamicLayer(), torch.zeros(1, 2, 3, 4)
    assert layer.get_seq_length() == 0 and not layer.is_initialized
    for length in (3, 6):
        returned = layer.update(part, part + 1)
        assert layer.is_initialized and layer.get_seq_length() == length
        assert returned[0] is layer.keys and returned[1] is layer.values
        assert layer.keys.shape == (1, 2, length, 4), (
            f"{installed()}: a layer holds {tuple(layer.keys.shape)}, but slots are gathered "
            "along the third axis"
        )
    layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2]
    assert layer.get_seq_length() == 2, (
        f"{installed()}: a layer counts its tokens in another way than by its keys"
    )


def test_the_state_of_a_layer_is_its_attributes():
    """A layer is adopted with what it holds by taking over its attributes."""
    layer, part = DynamicLayer(), torch.zeros(1, 2, 3, 4)
    layer.update(part, part)
    pruned = PrunedLayer()
    pruned.__dict__.update(layer.__dict__)
    assert pruned.get_seq_length() == 3 and pruned.keys is layer.keys


def test_layers_of_a_cache_may_be_put_in_its_place():
    cache, layer = Cache(layers=[DynamicLayer()]), PrunedLayer()
    cache.layers = [layer]
    cache.glimpse = cache.rope_deltas = "travels along"
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert layer.get_seq_length() == 3 == cache.get_seq_length(), (
        f"{installed()}: a cache counts its tokens in another way than by its first layer"
    )
    assert DynamicCache().layers == []


def test_a_cache_hands_changes_to_its_layers(monkeypatch):
    seen = []
    for name in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
        monkeypatch.setattr(
            PrunedLayer, name, lambda self, value, name=name: seen.append((name, value))
        )
    cache = Cache(layers=[PrunedLayer()])
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    rows = torch.tensor([0])
    cache.crop(-1)
    cache.reorder_cache(rows)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(rows)
    expected = [("crop", -1), ("reorder_cache", rows)]
    expected += [("batch_repeat_interleave", 2), ("batch_select_indices", rows)]
    assert [name for name, _ in seen] == [name for name, _ in expected], (
        f"{installed()}: a cache hands {seen} to its layers, but pruned ones follow these changes"
    )
    assert seen[0][1] == -1 and seen[1][1] is rows


def test_a_quantized_layer_stands_behind_a_compact_prompt():
    why = "a pruned layer hands its prompt to it"
    names = ("update", "get_seq_length", "reset", "reorder_cache")
    assert_has(QUANTIZED_LAYER, names, why)
    assert issubclass(QUANTIZED_LAYER, DynamicLayer), f"{installed()}: it is another kind of layer"
    for name in ("QuantoQuantizedLayer", "HQQQuantizedLayer"):
        layer = getattr(cache_utils, name)
        assert issubclass(layer, QUANTIZED_LAYER), (
            f"{installed()}: {name} is no {QUANTIZED_LAYER.__name__}, by which quantized caches "
            "are known"
        )


def test_an_offloaded_layer_is_fetched_before_it_is_gathered():
    assert_has(DynamicLayer, ("offload", "prefetch"), "an offloaded layer is gathered on a device")
    assert_takes(Cache.__init__, ("offloading",), "a cache is offloaded by it")


# Encoders of images and videos.


@torch.no_grad()
def test_images_are_encoded_one_by_one(shared_models, build_batch):
    """`encoder_fields` has each image's placeholders, by the arguments that our families name."""
    models, batch = shared_models(31), build_batch(PROMPT)
    names = models.pruned.model.visual_inputs["image"]
    assert_takes(type(models.stock.model).get_image_features, names, "images are encoded with them")
    given = {name: batch.inputs[name] for name in names if name in batch.inputs}
    outputs = models.stock.model.get_image_features(**given)
    fields = encoder_fields(outputs, models.pruned.model.adds_between_layers)
    embeddings = fields["pooler_output"]
    token_id = models.stock.config.image_token_id
    expected = [(int((row["input_ids"] == token_id).sum()), 32) for row in batch.rows]
    assert [tuple(of_image.shape) for of_image in embeddings] == expected, (
        f"{installed()}: get_image_features returns {[each.shape for each in embeddings]}, but "
        f"the images take {expected}"
    )
    for layer in fields.get("deepstack_features", ()):
        assert [tuple(of_image.shape) for of_image in layer] == expected, (
            f"{installed()}: what is added between layers is laid out in another way than images"
        )


@torch.no_grad()
def test_placeholders_are_found_and_counted(shared_models, build_batch):
    stock, batch = shared_models(31).stock, build_batch(PROMPT)
    ids = batch.inputs["input_ids"]
    embeddings = stock.get_input_embeddings()(ids)
    expected = ids == stock.config.image_token_id
    for given_ids in (ids, None):
        features = torch.zeros(int(expected.sum()), 32)
        found = stock.model.get_placeholder_mask(given_ids, embeddings, image_features=features)
        found = found[0] if isinstance(found, tuple) else found
        assert found.dtype == torch.bool and torch.equal(found[..., 0], expected), (
            f"{installed()}: get_placeholder_mask returns something else than where images are, "
            "in its last axis's first entry"
        )
        with pytest.raises(ValueError, match="do not match"):
            stock.model.get_placeholder_mask(given_ids, embeddings, image_features=features[1:])


def test_qwen_tells_images_from_videos():
    names = ("input_ids", "inputs_embeds", "image_features", "video_features")
    assert_takes(Qwen2_5_VLModel.get_placeholder_mask, names, "both kinds are placed by it")
    names = ("pixel_values_videos", "video_grid_thw")
    assert_takes(Qwen2_5_VLModel.get_video_features, names, "videos are encoded with them")


def test_qwen_derives_positions_from_ids_and_grids():
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    names += ("attention_mask", *token_types(*torch.zeros(2, 1, 1, dtype=torch.bool)))
    assert_takes(Qwen2_5_VLModel.get_rope_index, names, "positions of a later turn come from it")


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@torch.no_grad()
def test_qwen_returns_positions_and_what_later_ones_add(shared_models, build_batch):
    stock, batch = shared_models(31).stock, build_batch(PROMPT)
    ids = batch.inputs["input_ids"]
    found, deltas = stock.model.get_rope_index(
        ids,
        attention_mask=batch.inputs["attention_mask"],
        image_grid_thw=batch.inputs["image_grid_thw"],
        **token_types(ids == IMAGE_TOKEN, ids == VIDEO_TOKEN),
    )
    assert found.shape == (3, *ids.shape) and deltas.shape == (2, 1), (
        f"{installed()}: get_rope_index returns {tuple(found.shape)} and {tuple(deltas.shape)}"
    )
    expected = positions(stock, batch.rows[0], batch.rows[0]["input_ids"].shape[1])
    real = batch.inputs["attention_mask"][0].bool()
    assert torch.equal(found[:, :1, real], expected)
    stock(**batch.inputs, use_cache=True)
    assert torch.equal(stock.model.rope_deltas.view(-1), deltas.view(-1)), (
        f"{installed()}: the backbone does not keep rope_deltas, which go with a cache to later "
        "turns"
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_qwens_encoders_are_told_where_patches_are(family):
    """By arguments that take the grid's place, or else by methods that read it."""
    models, batch = build_models(family=family), build_batch([[1, (3, 4), 2]], family=family)
    backbone, grid = models.pruned.model, batch.inputs["image_grid_thw"]
    geometry, everything = token_geometry(grid // torch.tensor([1, 2, 2]), [12]), torch.ones(12) > 0
    images = torch.zeros(12, dtype=torch.long)
    subset = EncoderSubset.of_tokens(everything, geometry, images, grid, 2)
    told = backbone.tell_encoder("image", subset, everything, geometry, images)
    inputs = {"pixel_values": batch.inputs["pixel_values"]}
    whole = models.stock.model.get_image_features(**inputs, image_grid_thw=grid)
    part = backbone.run_encoder("image", **inputs, **told, image_grid_thw=subset.grid_for(told))
    whole, part = (encoder_fields(each, family == "qwen3_vl") for each in (whole, part))
    assert torch.equal(torch.cat(list(part["pooler_output"])), whole["pooler_output"][0]), (
        f"{installed()}: the encoder does not take places by {list(told) or 'its own methods'}"
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_the_parts_of_qwens_encoder(shared_models):
    stock = shared_models(31).stock
    assert_has(stock.model.visual, ("blocks", "spatial_merge_size"), "blocks are tapped")
    names = ("depth", "window_size", "patch_size", "spatial_merge_size", "fullatt_block_indexes")
    assert_has(stock.config.vision_config, names, "windows of tokens are counted by it")


@pytest.mark.parametrize("family", ["llava", "llava_next"], indirect=True)
@torch.no_grad()
def test_the_parts_of_clips_tower(shared_models):
    """What its blocks return are its hidden states, the norm of the embeddings first."""
    stock = shared_models(31).stock
    tower = stock.model.vision_tower
    assert_has(clip_transformer(tower), ("pre_layrnorm", "encoder"), "they are tapped")
    names = ("image_size", "patch_size", "num_hidden_layers", "hidden_size")
    assert_has(stock.config.vision_config, names, "patches are counted by it")
    outputs = []
    modules = [clip_transformer(tower).pre_layrnorm, *clip_transformer(tower).encoder.layers]
    for module in modules:
        module.register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    hidden = tower(torch.randn(1, 3, TILE, TILE), output_hidden_states=True).hidden_states
    assert len(hidden) == len(outputs) and all(map(torch.equal, hidden, outputs)), (
        f"{installed()}: what CLIP's blocks return is not its hidden states, which vision_layers "
        "number"
    )


def test_llava_next_cuts_images_into_tiles():
    names = ("image_size", "grid_pinpoints", "patch_size")
    assert_begins_with(get_anyres_image_grid_shape, names, "they come by position")
    assert_begins_with(unpad_image, ("tensor", "original_size"), "they come by position")
    assert get_anyres_image_grid_shape(torch.tensor([40, 20]), PINPOINTS, TILE) == (2, 1)
    grid = torch.zeros(5, 2 * SIDE, SIDE)
    assert unpad_image(grid, torch.tensor([20, 40])).shape == (5, 1 + SIDE % 2, SIDE), (
        f"{installed()}: unpad_image cuts rows and columns in another way"
    )


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_llava_next_ends_rows_with_a_parameter_of_the_backbone(shared_models):
    assert_has(shared_models(31).stock.model, ("image_newline",), "rows of a grid end with it")


# Loading and saving.


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "here.json").write_text("{}")
    assert file_of(tmp_path, "here.json") == str(tmp_path / "here.json")
    assert file_of(tmp_path, "gone.json") is None, (
        f"{installed()}: cached_file does not return None for a file that a folder lacks"
    )


def test_shards_come_sorted_by_name(tmp_path):
    weight_map = {"a": "second.safetensors", "b": "first.safetensors", "c": "second.safetensors"}
    for name in weight_map.values():
        (tmp_path / name).write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    files, _ = get_checkpoint_shard_files(str(tmp_path), str(index))
    assert [Path(file).name for file in files] == sorted(set(weight_map.values())), (
        f"{installed()}: shards are {files}, but they are told by their order"
    )


def test_a_configuration_is_read_as_a_dictionary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "glimpse_base": {"a": 1}}))
    content, _ = PretrainedConfig.get_config_dict(tmp_path)
    assert content["glimpse_base"] == {"a": 1}


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_an_index_may_name_files_by_absolute_paths_and_other_names(shared_models, tmp_path):
    """How the weights of a glimpse-only repository are put together from two places."""
    from safetensors.torch import save_file

    stock = shared_models(31).stock
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "somewhere.safetensors"
    weights = {f"other.{name}": weight for name, weight in stock.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})
    folder = tmp_path / "folder"
    stock.config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, str(file))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded, info = type(stock).from_pretrained(
        folder, key_mapping={r"^other\.": ""}, output_loading_info=True
    )
    assert not info["missing_keys"], (
        f"{installed()}: from_pretrained takes no absolute paths in an index, or no key_mapping"
    )
    expected = stock.state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    if TRANSFORMERS_5:
        assert_has(loaded, ("_weight_conversions",), "a model is saved under its own names by it")


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_weights_that_were_loaded_are_marked(shared_models, tmp_path):
    """Where a release initialises loaded modules too, the mark tells them from fresh ones."""
    stock = shared_models(31).stock
    weights = {n: w for n, w in stock.state_dict().items() if n != "lm_head.weight"}
    stock.save_pretrained(tmp_path, state_dict=weights)
    lacking = []

    class Noting(type(stock)):
        def _init_weights(self, module):
            if lacks_weights(module):
                lacking.append(module)

    loaded = Noting.from_pretrained(tmp_path)
    assert loaded.lm_head in lacking, f"{installed()}: a fresh weight is marked as a loaded one"
    loaded_modules = [each for each in loaded.model.modules() if isinstance(each, torch.nn.Linear)]
    assert not any(each is other for each in loaded_modules for other in lacking), (
        f"{installed()}: loaded weights are not marked, by which the glimpse is known as trained"
    )


def test_rotary_settings_are_written_under_a_name_that_is_translated(family):
    """`portable_text_config` translates what transformers 5 writes for transformers 4."""
    classes = FAMILIES[family]
    written = classes.stock_config_class(**classes.config_fields()).to_dict()["text_config"]
    place = written.get("rope_parameters") if TRANSFORMERS_5 else written
    assert place and "rope_theta" in place, (
        f"{installed()}: a text configuration is written without rope_theta in "
        f"{'rope_parameters' if TRANSFORMERS_5 else 'itself'}"
    )


# Processors.


PROCESSORS = [Qwen2_5_VLProcessor, LlavaProcessor, LlavaNextProcessor]


@pytest.mark.parametrize("processor_class", PROCESSORS, ids=lambda each: each.__name__)
def test_arguments_of_a_processor(processor_class):
    names = ("images", "text")
    assert_begins_with(processor_class.__call__, names, "checked processors show this order")
    assert_takes_any(processor_class.__call__, "checked processors hand the rest on")


def test_helpers_of_images():
    pixels = torch.zeros(3, 4, 5)
    assert len(make_flat_list_of_images([pixels, pixels])) == 2
    assert select_best_resolution((40, 20), PINPOINTS) == (2 * TILE, TILE)
    assert load_image(Image.new("L", (5, 4))).mode == "RGB"


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 believes every base")
@pytest.mark.parametrize("name", FAMILIES)
def test_bases_whose_tokenizer_class_is_ignored(name):
    family = FAMILIES[name].family
    ignored = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert (family.base_model_type in ignored) == family.tokenizer_as_filed, (
        f"{installed()}: say in families.py whether a {name} base's tokenizer.json counts alone"
    )
    assert family.config_class.model_type not in ignored


def test_llava_next_counts_the_tokens_of_a_grid():
    method = LlavaNextProcessor._get_unpadded_features
    names = ("height", "width", "patches_height", "patches_width", "scale_height", "scale_width")
    assert_begins_with(method, names, "they come by position")
    assert method(None, 40, 20, SIDE, SIDE, 2, 1) == (2 * SIDE * SIDE, 2 * SIDE), (
        f"{installed()}: _get_unpadded_features returns something else than visual tokens and rows"
    )


def test_settings_that_place_tokens_on_an_image():
    settings = transformers.CLIPImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}
    ).to_dict()
    assert settings["do_center_crop"] and settings["size"]["shortest_edge"] == TILE
    assert settings["crop_size"]["width"] == settings["crop_size"]["height"] == TILE
