"""Weights: saved, loaded, tied, resized, converted and placed as those of a family's stock class.

Every model that comes of it answers as the stock model of which the same was asked; see
`stock_comparison.py`. Nothing here names a family, so that a new one is held to it.
"""

import copy
from functools import cache

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import FAMILIES, VOCABULARY, Models
from safetensors import safe_open
from stock_comparison import (
    MODES,
    UNPRUNED,
    batch_of,
    build_pair,
    compare,
    pair_of,
)

OF_GLIMPSE = "model.glimpse."


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def batch(family):
    return batch_of(family)


def tie(fields: dict) -> None:
    """Let the head share the embeddings' weights."""
    fields["tie_word_embeddings"] = fields["text_config"]["tie_word_embeddings"] = True


TIES = {"apart": None, "tied": tie}


@cache
def _made(family: str, ties: str) -> Models:
    return build_pair(family, change=TIES[ties])


def made(family: str, ties: str) -> Models:
    return copy.deepcopy(_made(family, ties))


@pytest.fixture(params=TIES)
def models(request, family):
    return made(family, request.param)


def call(inputs: dict):
    return lambda model, settings: model(**inputs, **settings).logits


def base_weights(model, others: bool = False) -> dict[str, torch.Tensor]:
    """Weights under the stock names."""
    weights = model.state_dict()
    return {name: weights[name] for name in weights if others or not name.startswith(OF_GLIMPSE)}


def assert_same_weights(found, expected) -> None:
    found, expected = base_weights(found), base_weights(expected)
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


def is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def saved(models, folder) -> list:
    """Folders of both models."""
    folders = [folder / "stock", folder / "pruned"]
    for model, each in zip(models, folders, strict=True):
        model.save_pretrained(each)
    return folders


def tensors_of(folder):
    """Names and shapes in a folder's file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            yield name, tuple(file.get_slice(name).get_shape())


def load_both(models, folders, **options):
    return type(models)(
        *(
            type(model).from_pretrained(folder, **options).eval()
            for model, folder in zip(models, folders, strict=True)
        )
    )


# Saved and loaded.


@torch.no_grad()
def test_saved_and_loaded(models, batch, mode, tmp_path):
    folders = saved(models, tmp_path)
    loaded = load_both(models, folders)
    assert is_tied(loaded.pruned) == is_tied(loaded.stock) == is_tied(models.stock)
    assert_same_weights(loaded.pruned, models.stock)
    assert_same_weights(loaded.pruned, loaded.stock)
    assert not loaded.pruned.training
    compare(call(batch.inputs), pair_of(loaded, mode, batch))


def test_what_loading_reports(models, tmp_path):
    folders, reports = saved(models, tmp_path), []
    for model, folder in zip(models, folders, strict=True):
        _, report = type(model).from_pretrained(folder, output_loading_info=True)
        reports.append({name: sorted(map(str, report[name])) for name in report if report[name]})
    assert reports[1] == reports[0]


def test_as_much_is_saved(models, tmp_path):
    """Shared weights once; the glimpse's stand beside the base's."""
    saved(models, tmp_path)
    stock, pruned = (list(tensors_of(tmp_path / name)) for name in ("stock", "pruned"))
    of_base = [shape for name, shape in pruned if "glimpse" not in name]
    assert sorted(of_base) == sorted(shape for _, shape in stock)


@torch.no_grad()
def test_saved_in_shards_and_as_a_state(models, batch, tmp_path):
    model = models.pruned
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = type(model)(model.config)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for loaded in (other, type(model).from_pretrained(tmp_path / "shards")):
        assert_same_weights(loaded, models.stock)
        assert is_tied(loaded) == is_tied(models.stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_loaded_in_a_dtype(models, batch, dtype, tmp_path):
    """Every weight is of the dtype of the stock one, and answers are the same to the bit."""
    loaded = load_both(models, saved(models, tmp_path), dtype=dtype)
    assert_same_weights(loaded.pruned, loaded.stock)
    assert loaded.pruned.dtype == loaded.stock.dtype == dtype
    compare(call(batch.inputs), pair_of(loaded, UNPRUNED, batch))
    again = load_both(models, saved(loaded, tmp_path / "again"), dtype="auto")
    assert_same_weights(again.pruned, again.stock)
    assert again.pruned.dtype == dtype


@torch.no_grad()
def test_converted_to_a_dtype(models, batch):
    for convert in (lambda model: model.bfloat16(), lambda model: model.to(torch.float64)):
        converted = type(models)(*map(convert, copy.deepcopy(models)))
        assert_same_weights(converted.pruned, converted.stock)
        compare(call(batch.inputs), pair_of(converted, UNPRUNED, batch))


def test_the_configuration_keeps_the_stock_fields(models, tmp_path):
    """All that the stock configuration says, ours says too, before and after it was saved."""
    folders = saved(models, tmp_path)
    reloaded = [
        type(model.config).from_pretrained(folder)
        for model, folder in zip(models, folders, strict=True)
    ]
    for stock, pruned in ([model.config for model in models], reloaded):
        expected, found = (fields_of(config) for config in (stock, pruned))
        assert {name: found[name] for name in expected} == expected


def fields_of(config) -> dict:
    """Without those that name a class."""
    fields = config.to_dict()
    for each in (fields, fields["text_config"], fields["vision_config"]):
        for name in ("architectures", "model_type", "auto_map"):
            each.pop(name, None)
    return fields


# What a model says of itself.

ATTRIBUTES = (
    "main_input_name",
    "input_modalities",
    "base_model_prefix",
    "supports_gradient_checkpointing",
    "is_gradient_checkpointing",
    "framework",
    "dtype",
    "device",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_can_compile_fullgraph",
    "_skip_keys_device_placement",
    "_tied_weights_keys",
    "_tp_plan",
    "_is_stateful",
    "accepts_loss_kwargs",
)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_it_says_of_itself(shared_models, name):
    for stock, pruned in (shared_models(5), [model.model for model in shared_models(5)]):
        missing = object()
        assert getattr(pruned, name, missing) == getattr(stock, name, missing)


def test_its_parts(shared_models):
    stock, pruned = shared_models(5)
    assert (pruned.base_model is pruned.model) == (stock.base_model is stock.model)
    for model in (stock, pruned):
        assert model.can_generate()
        assert model.get_output_embeddings() is model.lm_head
    for part in (lambda model: model, lambda model: model.model):
        decoders = [type(part(model).get_decoder()) for model in (pruned, stock)]
        assert issubclass(*decoders) and decoders[0].__name__.endswith(decoders[1].__name__)
        assert part(pruned).get_input_embeddings() is pruned.model.language_model.embed_tokens
    counted = sum(weight.numel() for weight in pruned.model.glimpse.parameters())
    assert pruned.num_parameters() - counted == stock.num_parameters()
    expected = set(stock._no_split_modules or ())
    assert expected < set(pruned._no_split_modules)


def test_fresh_weights_are_drawn_as_the_stock_ones(family):
    """Where draws have no spread, every weight is what the stock class makes of it."""

    def no_spread(fields):
        for config in (fields, fields["text_config"], fields["vision_config"]):
            config["initializer_range"] = 0.0
        fields["vision_config"]["initializer_factor"] = 0.0

    classes = FAMILIES[family]
    fields = classes.config_fields()
    no_spread(fields)
    stock = classes.stock_class(classes.stock_config_class(**copy.deepcopy(fields)))
    pruned = classes.family.model_class(classes.family.config_class(**fields))
    expected = base_weights(stock)
    for name, weight in base_weights(pruned).items():
        if expected[name].unique().numel() == 1:  # others are drawn whatever the configuration says
            assert torch.equal(weight, expected[name]), name


# Other embeddings.


@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 2])
@torch.no_grad()
def test_resized_embeddings(models, batch, size, tmp_path):
    """Larger and smaller; saved and loaded with them; the new rows are those of the stock model."""
    answered = call(batch.inputs)
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.get_text_config().vocab_size == size
    assert is_tied(models.pruned) == is_tied(models.stock)
    assert_same_weights(models.pruned, models.stock)
    compare(answered, pair_of(models, UNPRUNED, batch))
    loaded = load_both(models, saved(models, tmp_path))
    assert is_tied(loaded.pruned) == is_tied(loaded.stock)
    assert_same_weights(loaded.pruned, models.stock)
    compare(answered, pair_of(loaded, UNPRUNED, batch))


def test_padded_embeddings(models):
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY + 1, pad_to_multiple_of=64)
    assert_same_weights(models.pruned, models.stock)
    assert len(models.pruned.lm_head.weight) % 64 == 0


@torch.no_grad()
def test_embeddings_of_the_callers(models, batch):
    torch.manual_seed(0)
    embeddings = torch.nn.Embedding(VOCABULARY, 32)
    head = torch.nn.Linear(32, VOCABULARY, bias=False)
    for model in models:
        model.set_input_embeddings(copy.deepcopy(embeddings))
        model.set_output_embeddings(copy.deepcopy(head))
    compare(call(batch.inputs), pair_of(models, UNPRUNED, batch))
    for model in models:
        model.tie_weights()
    assert is_tied(models.pruned) == is_tied(models.stock)
    compare(call(batch.inputs), pair_of(models, UNPRUNED, batch))


def test_gradients_reach_tied_weights(models, batch, mode):
    labels = batch.inputs["input_ids"].clone()
    labels[:, :-2] = -100

    def question(model, settings):
        model.zero_grad()
        model(**batch.inputs, labels=labels, **settings).loss.backward()
        return model.get_input_embeddings().weight.grad

    compare(question, pair_of(models, mode, batch))


# Other attention, other places.


@torch.no_grad()
def test_attention_is_changed_and_changed_back(models, batch):
    pair = pair_of(models, UNPRUNED, batch)
    for name in ("eager", "sdpa"):
        for model in models:
            model.set_attn_implementation(name)
            assert model.config.get_text_config()._attn_implementation == name
        compare(call(batch.inputs), pair)


@torch.no_grad()
def test_attention_is_asked_for_when_loading(family, batch, tmp_path):
    models = made(family, "apart")
    folders = saved(models, tmp_path)
    wishes = "eager", {"text_config": "eager", "vision_config": "sdpa"}
    for wish in wishes:
        loaded = load_both(models, folders, attn_implementation=wish)
        for part in ("text_config", "vision_config"):
            of_stock, of_ours = (getattr(model.config, part) for model in loaded)
            assert of_ours._attn_implementation == of_stock._attn_implementation
        compare(call(batch.inputs), pair_of(loaded, UNPRUNED, batch))


@torch.no_grad()
def test_weights_that_are_fetched_when_needed(family, batch, mode, tmp_path):
    """By accelerate, from memory and from disk; older Qwen3-VL cannot, stock or not."""
    models = made(family, "apart")
    for name, model in zip(("stock", "pruned"), models, strict=True):
        if mode == UNPRUNED:
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path / name), torch.device("cpu"))
    raises = NotImplementedError if family == "qwen3_vl" else ()
    compare(call(batch.inputs), pair_of(models, mode, batch), raises=raises)
