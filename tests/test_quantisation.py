"""Quantised bases, float16 and automatic device maps: the glimpse stays whole and as it is.

Quantizers that are not installed are stood in for by transformers' own replacement of modules.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from conftest import FAMILIES, TRANSFORMERS_5
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.integrations import bitsandbytes as integration
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

PROMPTS = [[3, (3, 4), 4], [(2, 2), 3]]
SIZES = {"hidden_size": 128, "num_heads": 2, "num_key_value_heads": 1}
RANKS = {"glimpse_lora_rank": 4, "stale_rank": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def saved(build_models, tmp_path):
    """A model with every kind of glimpse weights, and a folder that holds it."""
    model = build_models(70, glimpse=RANKS, **SIZES).pruned
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def inputs_in(batch, dtype: torch.dtype) -> dict:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }


class Quantised(nn.Linear):
    """Stands in for a quantised map; made as bitsandbytes' are."""

    def __init__(self, in_features, out_features, bias, **settings):
        super().__init__(in_features, out_features, bias)


@pytest.mark.feature("quantised bases")
@pytest.mark.parametrize("skipped", [None, ["lm_head"], ["model.language_model.layers.0"]])
@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_no_quantizer_replaces_a_map_of_the_glimpse(
    build_models, monkeypatch, family, part, skipped
):
    """With the default list of exceptions, and with the caller's own."""
    stand_in = SimpleNamespace(nn=SimpleNamespace(Linear8bitLt=Quantised, Linear4bit=Quantised))
    imported_with_it = {"nn": nn, "Conv1D": Conv1D, "init_empty_weights": init_empty_weights}
    for name, value in {"bnb": stand_in, **imported_with_it}.items():
        monkeypatch.setattr(integration, name, value, raising=False)
    model = build_models(70, glimpse=RANKS).pruned
    model = model if part == "whole" else model.model
    spared = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    config = BitsAndBytesConfig(load_in_8bit=True)
    integration.replace_with_bnb_linear(model, spared, quantization_config=config)
    of_glimpse = set(model.glimpse_module().modules())
    of_glimpse_quantised = [part for part in of_glimpse if isinstance(part, Quantised)]
    quantised = [part for part in model.modules() if isinstance(part, Quantised)]
    assert not of_glimpse_quantised and len(quantised) > 10


@pytest.mark.feature("float16, bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_model_loaded_in_a_dtype(saved, build_batch, dtype, tmp_path):
    """In float16 the glimpse stays in float32, as what stays out of quantisation does."""
    model, folder = saved
    batch = build_batch(PROMPTS)
    expected = model.glimpse(**batch.inputs).importance
    loaded = type(model).from_pretrained(folder, dtype=dtype)
    glimpse = loaded.model.glimpse
    assert loaded.model.language_model.layers[0].mlp.up_proj.weight.dtype == dtype
    own = torch.float32 if dtype == torch.float16 else dtype
    assert {weight.dtype for weight in glimpse.parameters()} == {own}
    assert glimpse.trained.dtype == torch.bool and bool(glimpse.trained)
    inputs = inputs_in(batch, dtype)
    for settings in ({}, {"prune_layer": 0}):
        assert loaded(**inputs, **settings).logits.dtype == dtype
        assert loaded.generate(**inputs, max_new_tokens=2, **settings).shape[0] == 2
    scores = loaded.glimpse(**inputs).importance
    # bfloat16 keeps eight bits, and every layer below the scores rounds
    assert torch.corrcoef(torch.stack([scores.float(), expected]))[0, 1] > 0.95
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.glimpse.trained").get_dtype() == "BOOL"


def bits_and_bytes_4():
    return BitsAndBytesConfig(load_in_4bit=True)


def bits_and_bytes_8():
    return BitsAndBytesConfig(load_in_8bit=True)


def torch_ao():
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def quanto():
    return QuantoConfig(weights="int8")


QUANTIZERS = {
    "bitsandbytes": [bits_and_bytes_4, bits_and_bytes_8],
    "torchao": [torch_ao],
    "optimum.quanto": [quanto],
}


@pytest.mark.feature("quantised bases")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("library", "make_config"),
    [(name, make) for name, makers in QUANTIZERS.items() for make in makers],
)
@torch.no_grad()
def test_a_quantised_base_keeps_its_glimpse(saved, build_batch, library, make_config, dtype):
    """With the quantizers themselves, where they are installed; none of them needs a GPU."""
    pytest.importorskip(library)
    (model, folder), batch = saved, build_batch(PROMPTS)
    loaded = type(model).from_pretrained(folder, dtype=dtype, quantization_config=make_config())
    for part in loaded.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # its packed product crashes on some processors
    layers = zip(model.model.language_model.layers, loaded.model.language_model.layers, strict=True)
    for plain, quantised in layers:
        assert type(plain.mlp.up_proj.weight.data) is torch.Tensor
        weight = quantised.mlp.up_proj.weight
        assert type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor
    expected = model.model.glimpse.state_dict()
    for name, weight in loaded.model.glimpse.state_dict().items():
        assert type(weight) is torch.Tensor
        assert torch.equal(weight, expected[name].to(weight.dtype))
    inputs = inputs_in(batch, dtype)
    for settings in ({}, {"prune_layer": 0}):
        assert loaded.glimpse(**inputs, **settings).importance.isfinite().all()
        assert loaded.generate(**inputs, max_new_tokens=2, **settings).shape[0] == 2


@pytest.mark.feature("device_map, automatic")
@pytest.mark.parametrize("part", ["whole", "backbone"])
def test_an_automatic_device_map_leaves_the_glimpse_in_one_piece(build_models, part):
    """However little room the first device has."""
    model = build_models(70, glimpse=RANKS).pruned
    model, glimpse = (model, "model.glimpse") if part == "whole" else (model.model, "glimpse")
    whole = list(model._no_split_modules if TRANSFORMERS_5 else model._get_no_split_modules("auto"))
    assert any(name.endswith("DecoderLayer") for name in whole)  # the stock classes' as well
    total, cut = sum(weight.nbytes for weight in model.parameters()), 0
    for share in range(2, 40):
        device_map = infer_auto_device_map(
            model,
            max_memory={0: total * share // 40, "cpu": total},
            no_split_module_classes=whole,
        )
        of_glimpse = [name for name in device_map if name.startswith(f"{glimpse}.")]
        assert not of_glimpse, of_glimpse
        cut += len(set(device_map.values())) > 1
    assert cut > 20


@pytest.mark.feature("device_map, disk offload")
@torch.no_grad()
def test_a_glimpse_on_disk(saved, build_batch, tmp_path):
    """Weights that are fetched when needed score as those in memory."""
    (model, folder), batch = saved, build_batch(PROMPTS)
    others = {name for name, _ in model.model.named_children()} - {"glimpse"}
    others |= {name for name, _ in model.model.named_parameters(recurse=False)}
    device_map = dict.fromkeys([f"model.{name}" for name in others] + ["lm_head"], "cpu")
    loaded = type(model).from_pretrained(
        folder,
        dtype=torch.float32,
        device_map=device_map | {"model.glimpse": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert {weight.device.type for weight in loaded.model.glimpse.parameters()} == {"meta"}
    for settings in ({}, {"prune_layer": 0}):
        expected = model.glimpse(**batch.inputs, **settings).importance
        found = loaded.glimpse(**batch.inputs, **settings).importance
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # sums in another order
